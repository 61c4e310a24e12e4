"""SDM, the semantic diffusion model (Wang et al. 2022, arXiv 2207.00050): SPADE norms in a guided-diffusion U-Net."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat

import torch
from monai.networks.blocks import SpatialAttentionBlock
from monai.networks.nets.diffusion_model_unet import get_timestep_embedding, zero_module
from torch import Tensor, nn
from torch.nn import functional as F

from ..labels import NUM_CLASSES
from ..transforms import edge_map, one_hot
from .modulation import SpatialModulation, modulate
from .unet import Denoiser, close_residual_branches

Modulation = tuple[Tensor, Tensor]
"""γ and β of one norm, (B, C, H, W) each."""


class SPADEGroupNorm(nn.GroupNorm):
    """GroupNorm that SPADE's γ and β scale and shift pixel by pixel.

    Args:
        num_groups: groups of the norm.
        num_channels: channels of the features.
        map_channels: channels of the condition map.
        level: the features are 2^level times smaller than the condition map.
    """

    def __init__(self, num_groups: int, num_channels: int, map_channels: int, level: int) -> None:
        super().__init__(num_groups, num_channels, affine=False)
        self.modulation = SpatialModulation(map_channels, num_channels)
        self.level = level

    def encode(self, condition_map: Tensor) -> Modulation:
        """Condition map (B, map_channels, H, W) to γ and β in the features' size."""
        return self.modulation(condition_map, [side >> self.level for side in condition_map.shape[2:]])

    def forward(self, x: Tensor, condition: Tensor | Modulation) -> Tensor:
        """Normalise features (B, C, h, w); the condition is its map, or what `encode` made of it."""
        gamma, beta = self.encode(condition) if isinstance(condition, Tensor) else condition
        return modulate(super().forward(x), gamma, beta)


class Block(nn.Module):
    """guided-diffusion's residual block (Dhariwal & Nichol 2021, arXiv 2105.05233), and the attention behind it.

    The time scales and shifts what the second norm returns. A block that halves or doubles the resolution does it in
    both branches, in front of the first convolution.

    Args:
        norm1: norm of the input's channels.
        norm2: norm of the output's channels.
        embedding_channels: width of the time embedding.
        resample: what changes the resolution.
        attention: what comes after the residual sum.
    """

    def __init__(
        self,
        norm1: nn.GroupNorm,
        norm2: nn.GroupNorm,
        embedding_channels: int,
        resample: nn.Module | None = None,
        attention: nn.Module | None = None,
    ) -> None:
        super().__init__()
        in_channels, out_channels = norm1.num_channels, norm2.num_channels
        self.norm1 = norm1
        self.resample = resample or nn.Identity()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(embedding_channels, 2 * out_channels)
        self.norm2 = norm2
        self.conv2 = zero_module(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        self.attention = attention or nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor, *conditions: Tensor | Modulation) -> Tensor:
        """Features (B, C, H, W) and time embedding (B, E) to features; `conditions`: one for each norm, if SPADE's."""
        h = self.conv1(self.resample(F.silu(self.norm1(x, *conditions[:1]))))
        scale, shift = self.time(F.silu(embedding))[..., None, None].chunk(2, dim=1)
        h = self.conv2(F.silu(modulate(self.norm2(h, *conditions[1:]), scale, shift)))
        return self.attention(self.skip(self.resample(x)) + h)


class SDMUNet(Denoiser):
    """SDM's denoiser: the encoder sees x_t alone, the label map modulates every norm of middle and decoder.

    γ and β depend on the label map only. With `cache_modulation` a sampler's one call of `encode` computes them for all
    steps: 599 of 1718 GMAC that every step then saves, for 1.02 GB a slice of 256x256 in bfloat16 and 2.04 GB in
    float32 (0.25 and 0.51 GB at width 64; classifier-free guidance doubles it). Without it γ and β are computed in
    every step, norm by norm, as training does in either case.

    Args:
        channels: width of each level; the resolution halves from one to the next.
        num_res_blocks: residual blocks of each encoder level; decoder levels have one more.
        attention_levels: which levels attend; the middle always does.
        num_head_channels: width of an attention head.
        norm_num_groups: groups of every GroupNorm.
        edges: add the edges between labels to the condition, where SDM has those between instances.
        cache_modulation: let `encode` return γ and β instead of the condition map.

    Raises:
        ValueError: `channels` and `attention_levels` differ in length.

    The default size has 652,876,290 parameters (with `edges` 652,933,890), 100,162,048 of them for γ and β; with half
    the default's widths 188,813,826, with a quarter 60,370,434.
    """

    def __init__(
        self,
        channels: Sequence[int] = (256, 256, 512, 512, 1024, 1024),
        num_res_blocks: int = 2,
        attention_levels: Sequence[bool] = (False, False, False, True, True, True),
        num_head_channels: int = 64,
        norm_num_groups: int = 32,
        edges: bool = False,
        cache_modulation: bool = True,
    ) -> None:
        super().__init__()
        if len(channels) != len(attention_levels):
            raise ValueError(
                f"{len(channels)} channels and {len(attention_levels)} attention_levels: give one of each a level"
            )
        self.block_out_channels = tuple(channels)
        self.edges = edges
        self.cache_modulation = cache_modulation
        embedding_channels = 4 * channels[0]

        def plain_block(width: int, out: int, **options) -> Block:
            norm1, norm2 = nn.GroupNorm(norm_num_groups, width), nn.GroupNorm(norm_num_groups, out)
            return Block(norm1, norm2, embedding_channels, **options)

        def spade_block(width: int, out: int, level: int, out_level: int, **options) -> Block:
            norm1 = SPADEGroupNorm(norm_num_groups, width, NUM_CLASSES + edges, level)
            norm2 = SPADEGroupNorm(norm_num_groups, out, NUM_CLASSES + edges, out_level)
            return Block(norm1, norm2, embedding_channels, **options)

        def attention(width: int, wanted: bool = True) -> SpatialAttentionBlock | None:
            options = {"norm_eps": 1e-5, "use_flash_attention": True}
            return SpatialAttentionBlock(2, width, num_head_channels, norm_num_groups, **options) if wanted else None

        self.time_embed = nn.Sequential(
            nn.Linear(channels[0], embedding_channels), nn.SiLU(), nn.Linear(embedding_channels, embedding_channels)
        )
        self.conv_in = nn.Conv2d(1, channels[0], 3, padding=1)
        bottom = len(channels) - 1
        width = channels[0]
        skips = [width]
        self.encoder = nn.ModuleList()
        for level, out in enumerate(channels):
            for _ in range(num_res_blocks):
                self.encoder.append(plain_block(width, out, attention=attention(out, attention_levels[level])))
                width = out
                skips.append(width)
            if level < bottom:
                self.encoder.append(plain_block(width, width, resample=nn.AvgPool2d(2)))
                skips.append(width)
        self.middle = nn.ModuleList(
            spade_block(width, width, bottom, bottom, attention=behind) for behind in (attention(width), None)
        )
        self.decoder = nn.ModuleList()
        for level, out in reversed(list(enumerate(channels))):
            for _ in range(num_res_blocks + 1):
                behind = attention(out, attention_levels[level])
                self.decoder.append(spade_block(width + skips.pop(), out, level, level, attention=behind))
                width = out
            if level > 0:
                self.decoder.append(spade_block(width, width, level, level - 1, resample=nn.Upsample(scale_factor=2)))
        self.out = nn.Sequential(
            nn.GroupNorm(norm_num_groups, width), nn.SiLU(), zero_module(nn.Conv2d(width, 2, 3, padding=1))
        )
        close_residual_branches(self)

    def condition_map(self, image: Tensor) -> Tensor:
        """Turn a label map (B, 1, H, W) of ids 0...16 into its one-hot channels, and edges: (B, 17 or 18, H, W)."""
        channels = [one_hot(image), edge_map(image)] if self.edges else [one_hot(image)]
        return torch.cat(channels, dim=1).to(self.conv_in.weight.dtype)

    def encode(self, image: Tensor) -> Tensor | tuple[Modulation, ...]:
        """Turn a label map (B, 1, H, W) of ids 0...16 into γ and β of every norm, or into the condition map."""
        condition = self.condition_map(image)
        if not self.cache_modulation:
            return condition
        return tuple(norm.encode(condition) for norm in self.modules() if isinstance(norm, SPADEGroupNorm))

    def encode_for_one_step(self, image: Tensor) -> Tensor:
        """Turn a label map into the condition map: γ and β are then gone as soon as their norm is computed."""
        return self.condition_map(image)

    def denoise(self, x: Tensor, timesteps: Tensor, condition: Tensor | tuple[Modulation, ...]) -> Tensor:
        """Predict from x_t and what `encode` returned."""
        conditions = repeat(condition) if isinstance(condition, Tensor) else iter(condition)
        embedding = self.time_embed(get_timestep_embedding(timesteps, self.block_out_channels[0]).to(x.dtype))

        h = self.conv_in(x)
        skips = [h]
        for block in self.encoder:
            h = block(h, embedding)
            skips.append(h)
        for block in self.middle:
            h = block(h, embedding, next(conditions), next(conditions))
        for block in self.decoder:
            if not isinstance(block.resample, nn.Upsample):
                h = torch.cat([h, skips.pop()], dim=1)
            h = block(h, embedding, next(conditions), next(conditions))
        return self.out(h)
