"""What SDM's cache of γ and β saves: 20 steps with it and without, `python -m benchmarks.modulation_cache`.

Weights and label maps are random. Computing the cache counts; times are the shorter of two runs. The difference is the
largest in ε and v of one call, beside the largest value in them. Prints a Markdown table of one row.

    python -m benchmarks.modulation_cache --width 256 --size 256 --batch_size 16 --device cuda --amp
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn

from common.diffusion import GaussianDiffusion
from common.inferers import DiffusionSampler, SliceNoise
from common.labels import NUM_CLASSES
from common.networks.sdm import SDMUNet

MULTIPLIERS = (1, 1, 2, 2, 4, 4)
RUNS = 2


def seconds(network: nn.Module, image: Tensor, steps: int) -> float:
    """What sampling these label maps takes."""
    start = torch.randn(image.shape, device=image.device)
    generate = DiffusionSampler(GaussianDiffusion(), steps=steps)
    begin = time.perf_counter()
    generate(network, image, SliceNoise(start, start.clone), lambda: None).cpu()
    return time.perf_counter() - begin


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=64, help="of the finest level; the paper's is 256")
    parser.add_argument("--size", type=int, default=64, help="rows and columns of a slice, a multiple of 32")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", action="store_true", help="bfloat16")
    options = parser.parse_args()

    torch.manual_seed(0)
    network = SDMUNet([options.width * multiplier for multiplier in MULTIPLIERS])
    for parameter in network.parameters():
        if not parameter.any():  # where the network starts closed, nothing could differ
            nn.init.normal_(parameter, std=0.02)
    network = network.to(options.device, memory_format=torch.channels_last).eval()
    x = torch.randn(options.batch_size, 1, options.size, options.size, device=options.device)
    image = torch.randint_like(x, NUM_CLASSES).to(torch.uint8)

    times, outputs = {}, {}
    with torch.autocast(x.device.type, torch.bfloat16, enabled=options.amp):
        for cached in (False, True):
            network.cache_modulation = cached
            condition = network.encode(image)
            outputs[cached] = network(x, torch.full((len(x),), 500, device=x.device), condition=condition).float()
            times[cached] = min(seconds(network, image, options.steps) for _ in range(RUNS))
    megabytes = sum(tensor.nbytes for pair in condition for tensor in pair) / len(x) / 1e6
    difference = (outputs[True] - outputs[False]).abs().max().item()

    print("| width | slices | steps | without | with the cache | speed-up | cache a slice | difference |")
    print("|---|---|---|---|---|---|---|---|")
    print(
        f"| {options.width} | {len(x)} of {options.size}x{options.size} | {options.steps} "
        f"| {times[False]:.2f} s | {times[True]:.2f} s | {times[False] / times[True]:.2f} "
        f"| {megabytes:.0f} MB | {difference:.1g} of {outputs[False].abs().max():.2g} |"
    )


if __name__ == "__main__":
    main()
