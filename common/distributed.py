"""A run of several processes (torchrun): replicas of a network, shares of the work, and what all have done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import ignite.distributed as idist
import torch.distributed
from torch import nn

Item = TypeVar("Item")


def replicate(network: nn.Module) -> nn.Module:
    """Wrap a network, on its device, for a run of several processes (torchrun); a run of one gets it as it is.

    All begin with the weights and buffers of the first; gradients are averaged over the processes. On GPUs BatchNorm
    takes its statistics over all of them; PyTorch has no such layer for CPUs, where each process has its own.
    """
    if idist.get_world_size() == 1:
        return network
    device = next(network.parameters()).device
    if device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    for buffer in network.buffers():
        torch.distributed.broadcast(buffer, src=0)
    # From there on buffers, BatchNorm's statistics and spectral norm's vectors, follow from the weights and the data.
    # Overwriting them at each forward would spoil the backward of a network that is called twice in a step.
    return nn.parallel.DistributedDataParallel(
        network, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False
    )


def gather(items: Sequence[Item]) -> list[Item]:
    """The items of all processes, which must all ask, in the order of their ranks; any plain values."""
    if idist.get_world_size() == 1:
        return list(items)
    shares: list[list[Item]] = [[]] * idist.get_world_size()
    torch.distributed.all_gather_object(shares, list(items))
    return [item for share in shares for item in share]


def share(items: Sequence[Item]) -> list[Item]:
    """This process's share of items, every so many-th: each belongs to one process.

    Raises:
        ValueError: fewer items than processes.
    """
    count = idist.get_world_size()
    if len(items) < count:
        raise ValueError(f"{count} processes for {len(items)} cases: start at most as many (--nproc_per_node)")
    return list(items[idist.get_rank() :: count])
