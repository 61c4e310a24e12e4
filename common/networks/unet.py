"""The denoisers of the paper (arXiv 2312.06453): the conditional U-Net, and the U-Net that a second encoder guides.

Both are MONAI's `DiffusionModelUNet`, which has the arrangement of the improved-diffusion U-Net (Nichol & Dhariwal
2021): so weights of MONAI, of monai-generative and of the public improved-diffusion checkpoints fit (see `convert`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.blocks import Convolution, SpatialAttentionBlock
from monai.networks.nets.autoencoderkl import AEKLResBlock
from monai.networks.nets.diffusion_model_unet import (
    DiffusionModelUNet,
    DiffusionUnetDownsample,
    DiffusionUNetResnetBlock,
    get_timestep_embedding,
    zero_module,
)
from torch import nn

from ..labels import NUM_CLASSES
from ..transforms import edge_map, one_hot, scalar_map
from .sizes import check_halvable


class Denoiser(nn.Module):
    """What the denoisers share: how a condition comes in.

    A denoiser turns x_t, in [-1, 1] plus noise, and t into two channels: the noise ε, and v, which interpolates the
    log-variance. The condition depends on the label map alone: a sampler calls `encode` once and hands the result to
    every step. Training gives the label map itself, so that the encoder works inside `forward`, where
    DistributedDataParallel sees it.

    Attributes:
        block_out_channels: width of each level; the resolution halves from one to the next.
    """

    block_out_channels: Sequence[int]

    def encode(self, image: torch.Tensor) -> torch.Tensor | tuple:
        """Turn a label map (B, 1, H, W) of ids 0...16 into the condition that `forward` takes."""
        raise NotImplementedError

    def encode_for_one_step(self, image: torch.Tensor) -> torch.Tensor | tuple:
        """`encode`, for a condition that isn't used again."""
        return self.encode(image)

    def denoise(self, x: torch.Tensor, timesteps: torch.Tensor, condition) -> torch.Tensor:
        """Predict from x_t and what `encode` returned."""
        raise NotImplementedError

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        image: torch.Tensor | None = None,
        condition: torch.Tensor | tuple | None = None,
    ) -> torch.Tensor:
        """Predict noise and variance.

        Args:
            x: x_t (B, 1, H, W), network space.
            timesteps: t of each sample (B,), in steps of the original process (0...999).
            image: label map (B, 1, H, W), ids 0...16.
            condition: what `encode` returned for the label map, instead of `image`.

        Returns:
            (B, 2, H, W): ε, v.

        Raises:
            ValueError: not exactly one of `image` and `condition`, or a size that can't be halved at every level.
        """
        if (image is None) == (condition is None):
            raise ValueError("give either image (the label map) or condition (what encode returned for it)")
        check_halvable(x, 2 ** (len(self.block_out_channels) - 1))
        return self.denoise(x, timesteps, self.encode_for_one_step(image) if condition is None else condition)


class DenoisingUNet(Denoiser, DiffusionModelUNet):
    """MONAI's U-Net in the paper's size, as a denoiser.

    Args:
        in_channels: channels of x_t and of what is concatenated to it.
        channels: width of each level; the resolution halves from one to the next.
        num_res_blocks: residual blocks of each encoder level; decoder levels have one more.
        attention_levels: which levels attend; the middle block always does.
        num_head_channels: width of an attention head; the paper has a single head.
        norm_num_groups: groups of every GroupNorm.
        norm_eps: ε of every GroupNorm: 1e-5 in improved-diffusion, 1e-6 in monai-generative.
    """

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int] = (128, 128, 256, 256, 512, 512),
        num_res_blocks: int | Sequence[int] = 2,
        attention_levels: Sequence[bool] = (False, False, False, False, True, False),
        num_head_channels: int | Sequence[int] = 512,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(
            spatial_dims=2,
            in_channels=in_channels,
            out_channels=2,
            channels=channels,
            num_res_blocks=num_res_blocks,
            attention_levels=attention_levels,
            num_head_channels=num_head_channels,
            norm_num_groups=norm_num_groups,
            norm_eps=norm_eps,
        )
        close_residual_branches(self)


class ConditionalUNet(DenoisingUNet):
    """Conditional DDPM: the mask is concatenated to x_t. Parameters and their names are MONAI's.

    Args:
        mask: "one_hot", 17 channels; or "scalar", ids scaled to [-1, 1] in one channel, the paper's wording taken
            literally.
        sizes: as for `DenoisingUNet`.

    The paper's size has 113,689,346 parameters ("scalar": 113,670,914; only the first conv differs):

        first conv 20,864 ("scalar": 2,432), time embedding 328,704, middle block 11,020,288, output 2,562, and
        level         256²       128²         64²         32²          16²           8²
        encoder    870,272    870,272   2,952,960   3,215,104   13,383,168    9,968,640
        decoder  1,625,856  1,937,536   6,364,672   7,348,480   27,811,840   25,968,128
    """

    def __init__(self, mask: str = "one_hot", **sizes) -> None:
        encoders = {"one_hot": (one_hot, NUM_CLASSES), "scalar": (scalar_map, 1)}
        if mask not in encoders:
            raise ValueError(f"mask is '{mask}'; use one of {', '.join(encoders)}")
        encoder, mask_channels = encoders[mask]
        super().__init__(in_channels=1 + mask_channels, **sizes)
        self._encoder = encoder

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        """Turn a label map (B, 1, H, W) of ids 0...16 into the channels that stand beside x_t."""
        return self._encoder(image)

    def denoise(self, x: torch.Tensor, timesteps: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Predict from x_t and the mask's channels (B, 17 or 1, H, W)."""
        return DiffusionModelUNet.forward(self, torch.cat([x, condition.to(x.dtype)], dim=1), timesteps)


class GuideEncoder(nn.Module):
    """A U-Net's encoder for something clean: residual blocks without time, no attention.

    Args:
        in_channels: channels of the guide (17 one-hot, or 1 of edges).
        channels: width of each level.
        num_res_blocks: residual blocks of each level.
        norm_num_groups: groups of every GroupNorm.
        norm_eps: ε of every GroupNorm.
    """

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        num_res_blocks: Sequence[int],
        norm_num_groups: int,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.conv_in = Convolution(2, in_channels, channels[0], strides=1, kernel_size=3, padding=1, conv_only=True)
        self.levels = nn.ModuleList()
        for above, width, blocks in zip((channels[0], *channels), channels, num_res_blocks, strict=False):
            widths = [above] + [width] * (blocks - 1)
            self.levels.append(nn.Sequential(*[AEKLResBlock(2, w, norm_num_groups, norm_eps, width) for w in widths]))
        self.downsamplers = nn.ModuleList(DiffusionUnetDownsample(2, width, use_conv=True) for width in channels[:-1])
        close_residual_branches(self)

    def forward(self, guide: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Turn a guide (B, in_channels, H, W) into one map a level: (B, C, H, W), (B, C', H/2, W/2), ..."""
        maps = [self.levels[0](self.conv_in(guide.to(self.conv_in.conv.weight.dtype)))]
        for downsampler, level in zip(self.downsamplers, self.levels[1:], strict=True):
            maps.append(level(downsampler(maps[-1])))
        return tuple(maps)


class GuidedUNet(DenoisingUNet):
    """Mask-guided and edge-guided DDPM: a second encoder's maps join the U-Net at every level.

    A map is taken "before each downsampling layer", so at every level but the bottleneck: five of the paper's six.
    There it is concatenated to what the level's last block made, and this widened map goes both ways: into the
    Downsample, and through the skip into the decoder, whose first block of that level is as much wider. Names and
    shapes of all other tensors are MONAI's: `monai.networks.copy_model_state(network, weights)` loads what fits of a
    plain U-Net's weights.

    Args:
        guide: "mask": x_t alone goes in and the one-hot mask guides; "edge": x_t and the one-hot mask go in and the
            edges between labels guide.
        sizes: as for `DenoisingUNet`.

    The paper's size has 137,301,122 parameters with "mask", of which the guide's encoder has 15,535,104; with "edge"
    137,302,274 and 15,516,672 (only the first convs differ). Time embedding, middle block and output are as large as
    `ConditionalUNet`'s, the first conv has 1,280 ("edge": 20,864), the guide's first conv 19,712 ("edge": 1,280), and

        level                    256²        128²         64²         32²         16²          8²
        blocks                722,688     722,688   2,362,880   2,625,024  11,023,360   9,968,640
        downsample            295,040     295,040   1,179,904   1,179,904   4,719,104
        decoder             1,789,952   2,101,632   7,020,544   8,004,352  30,434,304  25,968,128
        guide, blocks         591,360     591,360   2,100,224   2,362,368   8,394,752
        guide, downsample     147,584     147,584     590,080     590,080
    """

    def __init__(self, guide: str = "mask", **sizes) -> None:
        if guide not in ("mask", "edge"):
            raise ValueError(f"guide is '{guide}'; use one of mask, edge")
        super().__init__(in_channels=1 if guide == "mask" else 1 + NUM_CLASSES, **sizes)
        self.guide = guide
        norm = self.out[0]
        widths = self.block_out_channels[:-1]
        self.guide_encoder = GuideEncoder(
            NUM_CLASSES if guide == "mask" else 1, widths, self.num_res_blocks[:-1], norm.num_groups, norm.eps
        )
        self.guided_downsamplers = nn.ModuleList()
        for level, width in enumerate(widths):
            # The blocks' own Downsample would come before the concatenation.
            self.down_blocks[level].downsampler = None
            self.guided_downsamplers.append(DiffusionUnetDownsample(2, 2 * width, use_conv=True, out_channels=width))
            # Decoder levels run upwards, and their first block takes the skip that the encoder level left last.
            resnets = self.up_blocks[-1 - level].resnets
            resnets[0] = DiffusionUNetResnetBlock(
                spatial_dims=2,
                in_channels=resnets[0].channels + width,
                temb_channels=resnets[0].emb_channels,
                out_channels=resnets[0].out_channels,
                norm_num_groups=norm.num_groups,
                norm_eps=norm.eps,
            )

    def encode(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Turn a label map (B, 1, H, W) of ids 0...16 into the guide's maps, finest first.

        Returns:
            "mask": one map a level; "edge": the same after the one-hot mask (B, 17, H, W).
        """
        if self.guide == "mask":
            return self.guide_encoder(one_hot(image))
        return (one_hot(image), *self.guide_encoder(edge_map(image)))

    def denoise(self, x: torch.Tensor, timesteps: torch.Tensor, condition: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Predict from x_t and what `encode` returned."""
        maps = condition
        if self.guide == "edge":
            mask, *maps = condition
            x = torch.cat([x, mask.to(x.dtype)], dim=1)
        embedding = self.time_embed(get_timestep_embedding(timesteps, self.block_out_channels[0]).to(x.dtype))

        h = self.conv_in(x)
        skips = [h]
        for block, guide_map, downsampler in zip(self.down_blocks[:-1], maps, self.guided_downsamplers, strict=True):
            _, states = block(h, embedding)
            states[-1] = torch.cat([states[-1], guide_map], dim=1)
            h = downsampler(states[-1])
            skips += [*states, h]
        h, states = self.down_blocks[-1](h, embedding)
        skips += states
        h = self.middle_block(h, embedding)
        for block in self.up_blocks:
            count = len(block.resnets)
            h = block(h, skips[-count:], embedding)
            del skips[-count:]
        return self.out(h)


def close_residual_branches(network: nn.Module) -> None:
    """Zero the last layer of the residual branches that MONAI leaves random, as improved-diffusion does everywhere.

    A deep network then starts as its skip connections alone. MONAI does it for the blocks with time and for the
    output; its attention and its blocks without time lack it.
    """
    for module in network.modules():
        if isinstance(module, SpatialAttentionBlock):
            zero_module(module.attn.out_proj)
        elif isinstance(module, AEKLResBlock):
            zero_module(module.conv2)
