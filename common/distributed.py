"""Networks in a distributed run."""

from __future__ import annotations

import ignite.distributed as idist
from torch import nn


def replicate(network: nn.Module) -> nn.Module:
    """Wrap a network, on its device, for a run of several processes (torchrun); a run of one gets it as it is.

    Gradients are averaged over the processes. On GPUs BatchNorm takes its statistics over all of them; PyTorch has no
    such layer for CPUs, where each process has its own.
    """
    if idist.get_world_size() == 1:
        return network
    device = next(network.parameters()).device
    if device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    # Buffers are BatchNorm's statistics and spectral norm's vectors, which follow from the weights and the data;
    # overwriting them at each forward would spoil the backward of a network that is called twice in a step.
    return nn.parallel.DistributedDataParallel(
        network, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False
    )
