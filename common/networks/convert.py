"""Public weights for the conditional DDPM: improved-diffusion's, monai-generative's and MONAI's own.

A checkpoint may have other channels than the network. Then the first and the last conv are adapted so that a grey
image keeps its meaning:

- first conv: the weights of the image's channels are summed (grey is the same value in R, G and B), and those of the
  condition start at zero: the network begins by ignoring the mask;
- last conv: ε and v are each averaged over the image's channels. A network without learned variance has no v; it
  becomes −1 everywhere, which is the variance of the posterior, β̃.

So a converted RGB network returns, for x_t, the mean over RGB of what the original returns for x_t in all three
channels. That is a warm start for training, not a model of CT.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from monai.networks.blocks import SpatialAttentionBlock
from monai.networks.nets import DiffusionModelUNet
from torch import nn

State = Mapping[str, torch.Tensor]

IMPROVED_DIFFUSION_RESNET = {
    "norm1": "in_layers.0",
    "conv1.conv": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2.conv": "out_layers.3",
    "skip_connection.conv": "skip_connection",
}
"""A residual block's layers: MONAI's name -> improved-diffusion's."""


class CheckpointError(ValueError):
    """Weights that don't belong to the network."""


def convert(state_dict: State, network: DiffusionModelUNet) -> dict[str, torch.Tensor]:
    """Turn a state dict of any layout that is known here into one that `network.load_state_dict` takes.

    Args:
        state_dict: the weights themselves, not a file of weights, optimiser and more.
        network: a `ConditionalUNet` (or MONAI's `DiffusionModelUNet`) with the checkpoint's widths, blocks and heads.

    Raises:
        CheckpointError: unknown layout, or another arrangement, width or number of channels than the network's.
    """
    if "input_blocks.0.0.weight" in state_dict:
        return from_improved_diffusion(state_dict, network)
    if any(".proj_attn." in name for name in state_dict):
        return from_monai_generative(state_dict, network)
    if "conv_in.conv.weight" in state_dict:
        return _fit(dict(state_dict), network)
    raise CheckpointError(
        "these weights are neither improved-diffusion's, monai-generative's nor MONAI's DiffusionModelUNet; "
        f"their first name is '{next(iter(state_dict), '')}': give the U-Net's own state dict"
    )


def from_improved_diffusion(state_dict: State, network: DiffusionModelUNet) -> dict[str, torch.Tensor]:
    """Rename improved-diffusion's weights: the paper's network is that of its LSUN bedroom 256×256 checkpoints.

    (`lsun_uncond_100M_1200K_bs128.pt` and `lsun_uncond_100M_2400K_bs64.pt`, which have the paper's process too; the
    ImageNet and CIFAR-10 ones have scale-shift norms, which don't fit.) improved-diffusion numbers its blocks through
    and keeps query, key and value in one 1×1 conv, head by head; weights don't tell how many heads there are, so
    `num_head_channels` must be right.

    Args:
        state_dict: names `time_embed`, `input_blocks`, `middle_block`, `output_blocks`, `out`.
        network: as for `convert`.

    Raises:
        CheckpointError: see `convert`.
    """
    source = dict(state_dict)
    state = {}
    for ours, theirs in _improved_diffusion_names(network):
        for kind in ("weight", "bias"):
            if f"{theirs}.{kind}" in source:
                tensor = source.pop(f"{theirs}.{kind}")
                # What is a Conv1d of kernel 1 there is a linear layer here.
                state[f"{ours}.{kind}"] = tensor.squeeze(2) if tensor.ndim == 3 else tensor
    for name, module in network.named_modules():
        if isinstance(module, SpatialAttentionBlock) and f"{name}.qkv.weight" in state:
            _split_heads(state, name, module.attn.num_heads)
    return _fit(state | source, network)


def from_monai_generative(state_dict: State, network: DiffusionModelUNet) -> dict[str, torch.Tensor]:
    """Rename monai-generative's weights, and give the network's norms the ε of there, 1e-6, which no weights tell.

    Its attention has a projection, `proj_attn`, that its forward never calls (0.2.3): those numbers are untrained.
    The identity takes their place here; copying them, as MONAI's `load_old_state_dict` does, gives another function.

    Args:
        state_dict: weights of `generative.networks.nets.DiffusionModelUNet`.
        network: as for `convert`.

    Raises:
        CheckpointError: see `convert`.
    """
    state = {}
    for name, value in state_dict.items():
        if name.endswith(".proj_attn.weight"):
            value = torch.eye(len(value), dtype=value.dtype, device=value.device)
        elif name.endswith(".proj_attn.bias"):
            value = torch.zeros_like(value)
        name = re.sub(r"\.to_([qkv])\.", r".attn.to_\1.", name)
        name = name.replace(".proj_attn.", ".attn.out_proj.").replace(".upsampler.conv.", ".upsampler.postconv.")
        state[name] = value
    state = _fit(state, network)
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.eps = 1e-6
    return state


def _improved_diffusion_names(network: DiffusionModelUNet) -> Iterator[tuple[str, str]]:
    """Walk through the network in improved-diffusion's order: names of layers, ours and theirs."""
    yield from (("time_embed.0", "time_embed.0"), ("time_embed.2", "time_embed.2"))
    yield "conv_in.conv", "input_blocks.0.0"
    number = 1
    for level, down in enumerate(network.down_blocks):
        for index in range(len(down.resnets)):
            yield from _block_names(
                f"down_blocks.{level}", index, f"input_blocks.{number}", hasattr(down, "attentions")
            )
            number += 1
        if down.downsampler is not None:
            yield f"down_blocks.{level}.downsampler.op.conv", f"input_blocks.{number}.0.op"
            number += 1

    yield from _resnet_names("middle_block.resnet_1", "middle_block.0")
    yield from _attention_names("middle_block.attention", "middle_block.1")
    yield from _resnet_names("middle_block.resnet_2", "middle_block.2")

    number = 0
    for level, up in enumerate(network.up_blocks):
        attends = hasattr(up, "attentions")
        for index in range(len(up.resnets)):
            yield from _block_names(f"up_blocks.{level}", index, f"output_blocks.{number}", attends)
            number += 1
        if up.upsampler is not None:
            yield f"up_blocks.{level}.upsampler.postconv.conv", f"output_blocks.{number - 1}.{1 + attends}.conv"
    yield from (("out.0", "out.0"), ("out.2.conv", "out.2"))


def _block_names(ours: str, index: int, theirs: str, attends: bool) -> Iterator[tuple[str, str]]:
    yield from _resnet_names(f"{ours}.resnets.{index}", f"{theirs}.0")
    if attends:
        yield from _attention_names(f"{ours}.attentions.{index}", f"{theirs}.1")


def _resnet_names(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    for our_layer, their_layer in IMPROVED_DIFFUSION_RESNET.items():
        yield f"{ours}.{our_layer}", f"{theirs}.{their_layer}"


def _attention_names(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    for our_layer, their_layer in (("norm", "norm"), ("qkv", "qkv"), ("attn.out_proj", "proj_out")):
        yield f"{ours}.{our_layer}", f"{theirs}.{their_layer}"


def _split_heads(state: dict[str, torch.Tensor], name: str, heads: int) -> None:
    """Make three linear layers of an attention's single one, whose rows are ordered by head, then q, k, v."""
    for kind in ("weight", "bias"):
        qkv = state.pop(f"{name}.qkv.{kind}")
        for letter, rows in zip("qkv", qkv.unflatten(0, (heads, 3, -1)).unbind(1), strict=True):
            state[f"{name}.attn.to_{letter}.{kind}"] = rows.flatten(0, 1)


def _fit(state: dict[str, torch.Tensor], network: DiffusionModelUNet) -> dict[str, torch.Tensor]:
    """Adapt the first and the last conv, and see that every tensor of the network has its counterpart."""
    wanted = network.state_dict()
    missing = [name for name in wanted if name not in state]
    unknown = [name for name in state if name not in wanted]
    if missing or unknown:
        raise CheckpointError(
            f"the checkpoint lacks {_count(missing)} and has {_count(unknown)} that the network doesn't know: "
            "convert for a ConditionalUNet with the checkpoint's channels, num_res_blocks and attention_levels"
        )
    state["conv_in.conv.weight"] = _adapt_input(state["conv_in.conv.weight"], network.in_channels)
    for kind in ("weight", "bias"):
        state[f"out.2.conv.{kind}"] = _adapt_output(state[f"out.2.conv.{kind}"], network.out_channels)
    for name, tensor in wanted.items():
        if state[name].shape != tensor.shape:
            raise CheckpointError(
                f"{name} is {tuple(state[name].shape)} in the checkpoint and {tuple(tensor.shape)} in the network: "
                "give the network the checkpoint's channels (scale-shift norms don't fit)"
            )
    return {name: state[name] for name in wanted}


def _count(names: list[str]) -> str:
    return f"{len(names)} tensors" + (f" ({names[0]}, ...)" if names else "")


def _adapt_input(weight: torch.Tensor, channels: int) -> torch.Tensor:
    if weight.shape[1] == channels:
        return weight
    if weight.shape[1] not in (1, 3):
        raise CheckpointError(f"the checkpoint takes {weight.shape[1]} channels: only 1, 3 or {channels} can be used")
    image = weight.sum(dim=1, keepdim=True)
    condition = image.new_zeros(len(image), channels - 1, *image.shape[2:])
    return torch.cat([image, condition], dim=1)


def _adapt_output(rows: torch.Tensor, channels: int) -> torch.Tensor:
    if len(rows) == channels:
        return rows
    if channels != 2 or len(rows) not in (1, 3, 6):
        raise CheckpointError(
            f"the checkpoint predicts {len(rows)} channels: only {channels}, 6 (ε and v of RGB), 3 or 1 (ε) can be used"
        )
    if len(rows) == 6:
        return rows.unflatten(0, (2, 3)).mean(dim=1)
    noise = rows.mean(dim=0, keepdim=True)
    return torch.cat([noise, torch.full_like(noise, -1.0 if rows.ndim == 1 else 0.0)])
