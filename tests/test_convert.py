"""Converted weights compute what the original network computes."""

from __future__ import annotations

import hashlib
import math

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from generative.networks.nets import DiffusionModelUNet as GenerativeUNet
from monai.networks.nets import DiffusionModelUNet
from tiny_networks import TINY, randomised
from torch import nn

from common.diffusion import GaussianDiffusion
from common.inferers import VolumeNoise
from common.networks.convert import CheckpointError, convert, from_improved_diffusion, from_monai_generative
from common.networks.unet import ConditionalUNet, GuidedUNet
from common.phantom import phantom
from common.samplers import ddim


class TimedBlock(nn.Module):
    """improved-diffusion's residual block, by its published description and tensor names."""

    def __init__(self, inputs, outputs, time, groups):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time, outputs))
        norm, conv = nn.GroupNorm(groups, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.out_layers = nn.Sequential(norm, nn.SiLU(), nn.Dropout(0), conv)
        self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x, time):
        return self.skip_connection(x) + self.out_layers(self.in_layers(x) + self.emb_layers(time)[..., None, None])


class HeadByHeadAttention(nn.Module):
    """One conv gives 3C rows: for each head its queries, then its keys, then its values."""

    def __init__(self, channels, heads, groups):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x, time):
        mixed = []
        for head in self.qkv(self.norm(x).flatten(2)).chunk(self.heads, dim=1):
            query, key, value = head.chunk(3, dim=1)
            weights = torch.einsum("bcq,bck->bqk", query, key).div(math.sqrt(query.shape[1])).softmax(dim=2)
            mixed.append(torch.einsum("bqk,bck->bcq", weights, value))
        return x + self.proj_out(torch.cat(mixed, dim=1)).view_as(x)


class Down(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x, time):
        return self.op(x)


class Up(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, time):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class First(nn.Conv2d):
    def forward(self, x, time):
        return super().forward(x)


class ImprovedDiffusionUNet(nn.Module):
    """A U-Net with the public checkpoints' tensor names, written anew from the paper's description."""

    def __init__(self, inputs, outputs, channels, attention_levels, num_res_blocks, norm_num_groups, heads=1):
        super().__init__()
        self.width, groups = channels[0], norm_num_groups
        time = 4 * self.width
        self.time_embed = nn.Sequential(nn.Linear(self.width, time), nn.SiLU(), nn.Linear(time, time))
        self.input_blocks = nn.ModuleList([nn.ModuleList([First(inputs, self.width, 3, padding=1)])])
        skips, now = [self.width], self.width
        for level, width in enumerate(channels):
            for _ in range(num_res_blocks):
                stage = [TimedBlock(now, width, time, groups)]
                if attention_levels[level]:
                    stage.append(HeadByHeadAttention(width, heads, groups))
                self.input_blocks.append(nn.ModuleList(stage))
                now = width
                skips.append(now)
            if level < len(channels) - 1:
                self.input_blocks.append(nn.ModuleList([Down(now)]))
                skips.append(now)
        self.middle_block = nn.ModuleList(
            [
                TimedBlock(now, now, time, groups),
                HeadByHeadAttention(now, heads, groups),
                TimedBlock(now, now, time, groups),
            ]
        )
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(channels))):
            for index in range(num_res_blocks + 1):
                stage = [TimedBlock(now + skips.pop(), width, time, groups)]
                now = width
                if attention_levels[level]:
                    stage.append(HeadByHeadAttention(width, heads, groups))
                if level and index == num_res_blocks:
                    stage.append(Up(width))
                self.output_blocks.append(nn.ModuleList(stage))
        self.out = nn.Sequential(nn.GroupNorm(groups, now), nn.SiLU(), nn.Conv2d(now, outputs, 3, padding=1))

    def forward(self, x, t):
        half = self.width // 2
        angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / half)
        time = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1))
        skips = []
        for stage in self.input_blocks:
            for layer in stage:
                x = layer(x, time)
            skips.append(x)
        for layer in self.middle_block:
            x = layer(x, time)
        for stage in self.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            for layer in stage:
                x = layer(x, time)
        return self.out(x)


def ours(**options):
    return ConditionalUNet(num_head_channels=16, **{**TINY, **options})


def batch():
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2, 1, 16, 16, generator=generator)
    return x, torch.tensor([5, 640]), torch.randint(0, 17, (2, 1, 16, 16), generator=generator)


def assert_equal_outputs(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert a.std() > 0.1  # not trivially equal


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_improved_diffusion_computes_the_same(heads):
    x, t, image = batch()
    public = randomised(ImprovedDiffusionUNet(18, 2, **TINY, heads=heads))
    network = ConditionalUNet(**TINY, num_head_channels=16 // heads)
    network.load_state_dict(convert(public.state_dict(), network))
    condition = network.encode(image)
    assert_equal_outputs(network(x, t, condition=condition), public(torch.cat([x, condition], dim=1), t))


@pytest.mark.parametrize("mask", ["one_hot", "scalar"])
def test_rgb_checkpoint_sees_grey_and_returns_the_mean_over_rgb(mask):
    x, t, image = batch()
    public = randomised(ImprovedDiffusionUNet(3, 6, **TINY))
    network = ours(mask=mask)
    network.load_state_dict(convert(public.state_dict(), network))
    rgb = public(x.repeat(1, 3, 1, 1), t)
    noise, variance = rgb[:, :3].mean(1), rgb[:, 3:].mean(1)
    assert_equal_outputs(network(x, t, image), torch.stack([noise, variance], dim=1))


def test_arrangement_of_the_lsun_checkpoints_fits_the_paper_size():
    """What the LSUN flags describe, on the meta device: 15 inputs fewer and 4 outputs more than ours."""
    with torch.device("meta"):
        public = ImprovedDiffusionUNet(
            3, 6, (128, 128, 256, 256, 512, 512), (False, False, False, False, True, False), 2, 32
        )
        network = ConditionalUNet()
        network.load_state_dict(convert(public.state_dict(), network))
    assert sum(p.numel() for p in public.parameters()) == 113_689_346 - 15 * 9 * 128 + 4 * (9 * 128 + 1)


def generative(inputs, outputs, channels, num_head_channels=16, **sizes):
    """monai-generative's network, with random weights."""
    return randomised(
        GenerativeUNet(2, inputs, outputs, num_channels=channels, num_head_channels=num_head_channels, **sizes)
    )


@pytest.mark.parametrize("head_channels", [8, 16])
def test_monai_generative_computes_the_same(head_channels):
    """In float64, where another ε of the norms would be seen."""
    x, t, image = batch()
    theirs = generative(18, 2, **TINY, num_head_channels=head_channels).double()
    network = ConditionalUNet(**TINY, num_head_channels=head_channels)
    network.load_state_dict(convert(theirs.state_dict(), network))
    network, x = network.double(), x.double()
    found, expected = network(x, t, image), theirs(torch.cat([x, network.encode(image)], dim=1), t)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    assert expected.std() > 0.1


@pytest.mark.parametrize("channels", [1, 3])
def test_a_network_without_learned_variance_gets_that_of_the_posterior(channels):
    x, t, image = batch()
    theirs = generative(channels, channels, **TINY)
    network = ours()
    network.load_state_dict(convert(theirs.state_dict(), network))
    noise = theirs(x.repeat(1, channels, 1, 1), t).mean(dim=1)
    assert_equal_outputs(network(x, t, image), torch.stack([noise, torch.full_like(noise, -1)], dim=1))


def test_monai_generative_samples_in_the_bundle_of_the_conditional_ddpm(bundles, run_bundle, tiny_inference, tmp_path):
    """By --checkpoint alone; here its own network is sampled, from the same noise."""
    labels = phantom((32, 32, 4)).label
    pls = [[0, -2, 0, 0], [-2, 0, 0, 0], [0, 0, 5, 0], [0, 0, 0, 1]]  # the network's grid
    (tmp_path / "masks").mkdir()
    nib.save(nib.Nifti1Image(labels, np.array(pls, float)), tmp_path / "masks" / "case.nii.gz")

    bundle = bundles["abdominal_ct_conditional_ddpm"]
    options = tiny_inference(bundle)
    sizes = {name.removeprefix("network_def#"): value for name, value in options.items() if name.startswith("network_")}
    theirs = generative(18, 2, **sizes)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    options |= {"sampler": "ddim", "sampling_steps": 4, "checkpoint": tmp_path / "theirs.pt", "seed": 3}
    run_bundle(bundle, "inference", dataset_dir=tmp_path / "masks", output_dir=tmp_path / "out", **options)
    found = np.asanyarray(nib.load(tmp_path / "out" / "case_ct.nii.gz").dataobj)

    slices = torch.from_numpy(labels).movedim(-1, 0)[:, None]
    case = hashlib.sha256(slices.contiguous().numpy().tobytes()).hexdigest()
    condition = F.one_hot(slices[:, 0].long(), 17).movedim(-1, 1).float()
    noise = VolumeNoise(3, case, (1, 32, 32), len(slices)).of(range(len(slices)), torch.device("cpu"))
    x = ddim(lambda x, t: theirs(torch.cat([x, condition], dim=1), t), noise.start, GaussianDiffusion(), 4, noise)
    expected = (x[:, 0].add(1).div(2).clamp(0, 1) * 400 - 160).movedim(0, -1).numpy()
    np.testing.assert_allclose(found, expected, atol=0.51)
    assert expected.std() > 20


def test_grey_unconditional_monai_checkpoint_ignores_the_mask():
    x, t, image = batch()
    plain = randomised(DiffusionModelUNet(2, 1, 2, num_head_channels=16, norm_eps=1e-5, **TINY))
    network = ours()
    network.load_state_dict(convert(plain.state_dict(), network))
    assert_equal_outputs(network(x, t, image), plain(x, t))


def test_own_weights_pass_unchanged_and_the_argument_too():
    own = randomised(ours()).state_dict()
    converted = convert(own, ours())
    assert list(converted) == list(own) and all(torch.equal(converted[name], own[name]) for name in own)

    public = public_state()
    copy = {name: tensor.clone() for name, tensor in public.items()}
    from_improved_diffusion(public, ours())
    assert list(public) == list(copy) and all(torch.equal(public[name], copy[name]) for name in copy)


def public_state(inputs=3, outputs=6, **changes):
    return ImprovedDiffusionUNet(inputs, outputs, **{**TINY, **changes}).state_dict()


def with_scale_shift():
    return {k: torch.cat([v, v]) if "emb_layers" in k else v for k, v in public_state().items()}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: public_state(num_res_blocks=1), "the checkpoint lacks"),
        (lambda: public_state(num_res_blocks=3), "with the checkpoint's channels, num_res_blocks"),
        (lambda: public_state(channels=(8, 32, 32)), r"is \(32,\) in the checkpoint and \(16,\) in the network"),
        (with_scale_shift, "scale-shift norms don't fit"),
        (lambda: public_state(inputs=4), "takes 4 channels"),
        (lambda: public_state(outputs=4), "predicts 4 channels"),
        (lambda: {"model": {}, "optimizer": {}}, "first name is 'model'"),
        (dict, "neither improved-diffusion's"),
    ],
)
def test_what_does_not_fit_is_one_line(state, message):
    with pytest.raises(CheckpointError, match=message) as error:
        convert(state(), ours())
    assert "\n" not in str(error.value)


def test_guided_networks_are_turned_away():
    with pytest.raises(CheckpointError, match="convert for a ConditionalUNet"):
        convert(public_state(), GuidedUNet(**TINY, num_head_channels=16))


def test_layouts_are_not_mistaken_for_each_other():
    with pytest.raises(CheckpointError, match="lacks"):
        from_monai_generative(public_state(), ours())
    with pytest.raises(CheckpointError, match="lacks"):
        from_improved_diffusion({"conv_in.weight": torch.zeros(1)}, ours())
