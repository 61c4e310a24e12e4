"""Training works: the loss falls, and organs come out as bright as the masks ask for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.networks.utils import eval_mode

from common.diffusion import GaussianDiffusion
from common.inferers import DiffusionSampler, GeneratorPass, VolumeInferer
from common.labels import ORGANS
from common.phantom import write_dataset

ITERATIONS = 240
LEARNING = {
    "device": "$torch.device('cpu')",
    "image_size": 32,
    "batch_size": 8,
    "iterations": ITERATIONS,
    "num_workers": 0,
    "picture_interval": 10 * ITERATIONS,
}
DENOISER = {
    "network_def#channels": [16, 32, 32],
    "network_def#num_res_blocks": 1,
    "network_def#attention_levels": [False, False, False],
    "network_def#num_head_channels": 32,
    "network_def#norm_num_groups": 8,
    "learning_rate": 2e-3,
    "ema_momentum": 0.03,
}
GANS = {
    "abdominal_ct_spade": {"network_def#channels": [16, 32, 32], "discriminator_channels": 16},
    "abdominal_ct_oasis": {
        "network_def#channels": [16, 32, 32],
        "discriminator_channels": [16, 32, 32],
        "learning_rate": 1e-3,
        "discriminator_learning_rate": 1e-3,
        "iterations": 600,  # it is told nothing but what a segmenter thinks of its slices
        "ema_momentum": 0.03,
    },
    "abdominal_ct_pix2pix": {
        "network_def#channels": [16, 32, 32, 32],
        "discriminator_channels": 16,
        "learning_rate": 2e-3,
    },
}


@pytest.fixture(scope="module")
def patients(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learning")
    write_dataset(folder, train=8, validation=1, shape=(32, 32, 16))
    return folder


def organ_means(labels: torch.Tensor, ct: torch.Tensor) -> np.ndarray:
    """Mean HU of each organ of at least 40 voxels."""
    regions = [labels == organ.id for organ in ORGANS]
    return np.array([400 * float(ct[region].mean()) - 160 for region in regions if region.sum() >= 40])


def contrast(means: np.ndarray) -> np.ndarray:
    """What organs have beyond the brightness they share, which a denoiser learns last."""
    return means - means.mean()


def test_a_bundle_learns_to_follow_the_mask(bundle, patients, workflow, on_path, tmp_path):
    is_gan = bundle.name in GANS
    with on_path(bundle):
        options = LEARNING | GANS.get(bundle.name, DENOISER)
        options |= {"dataset_dir": patients, "cache_dir": patients / "cache", "output_dir": tmp_path}
        made = workflow(bundle, "train", **options)
        trainer, dataset, picture = (
            made.parser.get_parsed_content(f"train#{name}") for name in ("trainer", "dataset", "picture")
        )
        items = [dataset[i] for i in range(0, len(dataset), 4)]
        labels, real = (torch.stack([item[key] for item in items], dim=-1)[None] for key in ("image", "ct"))
        generate = GeneratorPass() if is_gan else DiffusionSampler(GaussianDiffusion(), "ddpm", 20)
        inferer = VolumeInferer(generate, batch_size=32, progress=False)

        def synthetic() -> np.ndarray:
            with eval_mode(picture.network):
                return organ_means(labels, inferer(labels, picture.network))

        losses = []
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: losses.append(e.state.output["loss"].item()))
        before = synthetic()
        made.run()
        after = synthetic()

    assert len(losses) == options["iterations"]
    if not is_gan:  # whose losses are a contest
        assert np.mean(losses[-50:]) < 0.25 * np.mean(losses[:20])

    wanted = organ_means(labels, real)
    assert len(wanted) >= 7 and np.ptp(wanted) > 100
    assert np.abs(after - wanted).mean() < min(40, 0.75 * np.abs(before - wanted).mean())
    # An even grey would have no contrast at all: its error is the mean contrast itself.
    assert np.abs(contrast(after) - contrast(wanted)).mean() < 0.7 * np.abs(contrast(wanted)).mean()
