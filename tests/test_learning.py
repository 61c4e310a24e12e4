"""Training works: the loss falls, and organs come out as bright as the masks ask for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ignite.engine import Events

from common.diffusion import GaussianDiffusion
from common.inferers import DiffusionSampler, VolumeInferer
from common.labels import ORGANS
from common.phantom import write_dataset

ITERATIONS = 240
LEARNING = {
    "device": "$torch.device('cpu')",
    "image_size": 32,
    "network_def#channels": [16, 32, 32],
    "network_def#num_res_blocks": 1,
    "network_def#attention_levels": [False, False, False],
    "network_def#num_head_channels": 32,
    "network_def#norm_num_groups": 8,
    "batch_size": 8,
    "iterations": ITERATIONS,
    "learning_rate": 2e-3,
    "ema_momentum": 0.03,
    "num_workers": 0,
    "picture_interval": 10 * ITERATIONS,
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
    with on_path(bundle):
        options = LEARNING | {"dataset_dir": patients, "cache_dir": patients / "cache", "output_dir": tmp_path}
        made = workflow(bundle, "train", **options)
        trainer, dataset = (made.parser.get_parsed_content(f"train#{name}") for name in ("trainer", "dataset"))
        network = made.parser.get_parsed_content("ema").ema_model
        items = [dataset[i] for i in range(0, len(dataset), 4)]
        labels, real = (torch.stack([item[key] for item in items], dim=-1)[None] for key in ("image", "ct"))
        inferer = VolumeInferer(DiffusionSampler(GaussianDiffusion(), "ddpm", 20), batch_size=32, progress=False)

        losses = []
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: losses.append(e.state.output["loss"].item()))
        before = organ_means(labels, inferer(labels, network))
        made.run()
        after = organ_means(labels, inferer(labels, network))

    assert len(losses) == ITERATIONS
    assert np.mean(losses[-50:]) < 0.25 * np.mean(losses[:20])

    wanted = organ_means(labels, real)
    assert len(wanted) >= 7 and np.ptp(wanted) > 100
    assert np.abs(after - wanted).mean() < 40 < np.abs(before - wanted).mean() - 15
    # An even grey would have no contrast at all: its error is the mean contrast itself.
    assert np.abs(contrast(after) - contrast(wanted)).mean() < 0.7 * np.abs(contrast(wanted)).mean()
