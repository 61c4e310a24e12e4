"""What was computed once is read, to the last bit, and never taken for the result of something else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch import nn

from common.diffusion import GaussianDiffusion
from common.evaluation.kept import KeptSegmentations, KeptVolumes
from common.inferers import DiffusionSampler, GeneratorPass, VolumeInferer

AFFINE = torch.diag(torch.tensor([-2.0, -2.0, 5.0, 1.0], dtype=torch.float64))


class Generator(nn.Module):
    """Its options change what it makes and not its weights, as pix2pix's dropout. Remembers how many slices it made."""

    made = 0

    def __init__(self, gain: float = 0.1, shift: float = 0.0, levels: tuple[int, ...] = (1,)) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))
        self.inner = nn.Identity()
        self.inner.shift = shift
        self.levels = levels

    def noise_shape(self, height: int, width: int) -> tuple[int, ...]:
        return (1, height, width)

    def forward(self, image: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        Generator.made += len(image)
        weight = self.gain * len(self.levels) * torch.ones(1, 1, 1, 1)
        return torch.tanh(image / 16 + nn.functional.conv2d(noise, weight) + self.inner.shift)


class Inverted(Generator):
    """Another kind with the same weights and options, as one activation in another's place."""

    def forward(self, image: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return -super().forward(image, noise)


class Denoiser(Generator):
    """The same as a denoiser."""

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        return image / 16

    def forward(self, x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        Generator.made += len(x)
        return torch.cat([self.gain * x + condition, x], dim=1)


def volume(ids: int = 5, shape: tuple[int, ...] = (1, 1, 4, 4, 3)) -> MetaTensor:
    """A label volume whose first slice has no body."""
    labels = torch.full(shape, ids, dtype=torch.uint8)
    labels[..., 0] = 0
    return MetaTensor(labels, affine=AFFINE)


def inferer(generate=None, **options) -> VolumeInferer:
    return VolumeInferer(generate or GeneratorPass(), progress=False, **options)


def sampler(**options) -> DiffusionSampler:
    return DiffusionSampler(GaussianDiffusion(), **{"steps": 2} | options)


@pytest.fixture
def keep(tmp_path):
    """`keep(inferer, network, label)`: the volume, and how many slices the network made for it; as in a new process."""
    (tmp_path / "model.pt").write_bytes(b"weights")

    def sample(made_by=None, network=None, label=None, checkpoint="model.pt") -> tuple[torch.Tensor, int]:
        before = Generator.made
        made_by = made_by or inferer()
        options = {
            name: getattr(made_by, name) for name in ("batch_size", "seed", "noise_correlation", "amp", "progress")
        }
        kept = KeptVolumes(made_by.generate, folder=tmp_path / "kept", checkpoint=tmp_path / checkpoint, **options)
        result = kept(volume() if label is None else label, network or Generator())
        return result, Generator.made - before

    return sample


def test_a_volume_is_sampled_once(keep):
    expected = inferer()(volume(), Generator())
    for slices in (2, 0, 0):
        result, made = keep()
        assert made == slices
        assert torch.equal(result, expected) and result.dtype == torch.float32
        assert torch.equal(result.affine, AFFINE)
    assert expected.std() > 0.1  # there is something to be lost


def test_what_is_kept_can_be_deleted(keep, tmp_path):
    first, _ = keep()
    (file,) = (tmp_path / "kept").iterdir()
    file.unlink()
    again, made = keep()
    assert made == 2 and torch.equal(again, first)


OTHERS = {
    "label map": {"label": volume(6)},
    "shape of the label map": {"label": volume(5, (1, 1, 8, 2, 3))},
    "seed": {"made_by": inferer(seed=1)},
    "noise_correlation": {"made_by": inferer(noise_correlation=0.5)},
    "amp": {"made_by": inferer(amp=True)},
    "option of a module": {"network": Generator(shift=0.3)},
    "option of the network": {"network": Generator(levels=(1, 2))},
    "kind of the network": {"network": Inverted()},
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_another_origin_is_sampled_anew_and_kept_beside(keep, options):
    first, _ = keep()
    result, made = keep(**options)
    expected = options.get("made_by", inferer())(options.get("label", volume()), options.get("network", Generator()))
    assert made == 2 and torch.equal(result, expected)
    assert result.shape != first.shape or not torch.equal(result, first)
    for origin, expected in (({}, first), (options, result)):
        kept, made = keep(**origin)
        assert made == 0 and torch.equal(kept, expected)


def test_every_sampler_with_its_steps_and_options_has_volumes_of_its_own(keep):
    origins = [
        {"sampler": "ddpm"},
        {"sampler": "ddim"},
        {"sampler": "ddim", "options": {"eta": 1.0}},
        {"sampler": "dpmpp_2m"},
        {"sampler": "dpmpp_2m", "steps": 3},
        {"sampler": "dpmpp_2m", "options": {"spacing": "time"}},
    ]
    network = Denoiser()
    expected = [inferer(sampler(**origin))(volume(), network) for origin in origins]
    for kept in (False, True):
        for origin, volume_of_its_own in zip(origins, expected, strict=True):
            result, made = keep(inferer(sampler(**origin)), network)
            assert made == (0 if kept else 2 * origin.get("steps", 2))
            assert torch.equal(result, volume_of_its_own)


def test_weights_are_known_by_what_the_file_holds(keep, tmp_path):
    keep()
    (tmp_path / "copy.pt").write_bytes(b"weights")
    assert keep(checkpoint="copy.pt")[1] == 0
    (tmp_path / "model.pt").write_bytes(b"trained on")
    result, made = keep(network=Generator(gain=0.2))
    assert made == 2 and torch.equal(result, inferer()(volume(), Generator(gain=0.2)))


def test_batches_and_where_the_patient_lies_are_no_matter(keep):
    keep()
    moved = MetaTensor(volume().as_tensor(), affine=2 * AFFINE)
    result, made = keep(inferer(batch_size=1), label=moved)
    assert made == 0 and torch.equal(result.affine, 2 * AFFINE)


def test_what_breaks_leaves_nothing_to_be_read(keep, tmp_path):
    network = Generator()
    network.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        keep(network=network)
    assert not (tmp_path / "kept").exists()
    assert keep()[1] == 2


# ------------------------------------------------------------------------------------------------- segmentations


class Threshold:
    """A segmenter that knows the liver, and counts."""

    def __init__(self, hu: int = 50) -> None:
        self.settings = {"segmenter": "threshold", "hu": hu}
        self.hu = hu
        self.asked = 0

    def __call__(self, hu: np.ndarray, affine: np.ndarray) -> np.ndarray:
        self.asked += 1
        return np.where(hu > self.hu, 6, 0).astype(np.uint8)


def ct(changed: int = 0) -> np.ndarray:
    hu = np.arange(-60, 60, dtype=np.int16).reshape(4, 5, 6)
    hu[0, 0, 0] += changed
    return hu


def keep_segmentation(folder: Path, hu: np.ndarray, affine: np.ndarray, threshold: int) -> tuple[np.ndarray, int]:
    segmenter = Threshold(threshold)
    return KeptSegmentations(segmenter, folder)(hu, affine), segmenter.asked


def test_a_ct_is_segmented_once(tmp_path):
    first = (ct(), AFFINE.numpy(), 50)
    others = [
        (ct(changed=1), AFFINE.numpy(), 50),
        (ct(), 2 * AFFINE.numpy(), 50),
        (ct(), AFFINE.numpy(), 20),
        (ct().reshape(6, 5, 4), AFFINE.numpy(), 50),
        (ct().view(np.uint16), AFFINE.numpy(), 50),  # the same bytes
    ]
    for asked in (1, 0):
        for origin in (first, *others):
            result, times = keep_segmentation(tmp_path, *origin)
            assert times == asked
            assert result.dtype == np.uint8
            np.testing.assert_array_equal(result, np.where(origin[0] > origin[2], 6, 0))
    # The order of a volume's axes in memory is no part of it.
    result, times = keep_segmentation(tmp_path, np.asfortranarray(ct()), AFFINE.numpy(), 50)
    assert times == 0
    np.testing.assert_array_equal(result, np.where(ct() > 50, 6, 0))


def test_volumes_and_segmentations_share_a_folder(keep, tmp_path):
    sampled, _ = keep()
    segmented, _ = keep_segmentation(tmp_path / "kept", ct(), AFFINE.numpy(), 50)
    assert len(list((tmp_path / "kept").iterdir())) == 2
    assert torch.equal(keep()[0], sampled)
    again, times = keep_segmentation(tmp_path / "kept", ct(), AFFINE.numpy(), 50)
    assert times == 0
    np.testing.assert_array_equal(again, segmented)
