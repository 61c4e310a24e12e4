"""What generator and discriminator of each GAN learn from: their loss by terms, weighted, to be summed.

`image` is a label map (B, 1, H, W), `real` and `fake` are CT slices (B, 1, H, W) in [-1, 1]. In the discriminator's
step `fake` comes detached; in the generator's step the discriminator's parameters are frozen.

A discriminator is called once a step where that makes no difference.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import ignite.distributed as idist
import torch
from torch import Tensor
from torch.nn import functional as F

from . import losses
from .networks.vgg import VGG19
from .transforms import one_hot

Terms = dict[str, Tensor]


class SPADEObjective:
    """Hinge loss, feature matching and, with VGG19's weights at hand, perceptual loss (Park et al. 2019, appendix A).

    Args:
        vgg: torchvision's file of VGG19 weights; None leaves the perceptual term out.
        feature_matching_weight: of feature matching.
        perceptual_weight: of the perceptual loss.

    Raises:
        FileNotFoundError: no file at `vgg`.
        ValueError: it holds other weights.
    """

    def __init__(
        self,
        vgg: str | os.PathLike | None = None,
        feature_matching_weight: float = 10.0,
        perceptual_weight: float = 10.0,
    ) -> None:
        self.vgg = None if vgg is None else VGG19.load(vgg)
        self.feature_matching_weight = feature_matching_weight
        self.perceptual_weight = perceptual_weight
        if vgg is None and idist.get_rank() == 0:
            logging.getLogger(__name__).warning("no VGG19 weights given: training without the perceptual term")

    def generator_terms(
        self, discriminator: Callable[[Tensor], list[list[Tensor]]], image: Tensor, real: Tensor, fake: Tensor
    ) -> Terms:
        """Adversarial, feature matching and perceptual term; scales of features come from the discriminator."""
        fakes, reals = self._see(discriminator, image, real, fake)
        terms = {
            "adversarial": losses.hinge_generator([features[-1] for features in fakes]),
            "feature_matching": self.feature_matching_weight * losses.feature_matching(fakes, reals),
        }
        if self.vgg is not None:
            terms["perceptual"] = self.perceptual_weight * losses.perceptual(self.vgg.to(fake.device), fake, real)
        return terms

    def discriminator_terms(
        self, discriminator: Callable[[Tensor], list[list[Tensor]]], image: Tensor, real: Tensor, fake: Tensor
    ) -> Terms:
        """Both sides of the hinge loss."""
        fakes, reals = self._see(discriminator, image, real, fake)
        return {
            "fake": losses.hinge([features[-1] for features in fakes], is_real=False),
            "real": losses.hinge([features[-1] for features in reals], is_real=True),
        }

    def _see(
        self, discriminator: Callable[[Tensor], list[list[Tensor]]], image: Tensor, real: Tensor, fake: Tensor
    ) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        """The discriminator's outputs for fake and for real, which it sees in one batch."""
        scales = discriminator(_beside_mask(torch.cat([image, image]), torch.cat([fake, real])))
        fakes = [[output[: len(fake)] for output in outputs] for outputs in scales]
        reals = [[output[len(fake) :] for output in outputs] for outputs in scales]
        return fakes, reals


class OASISObjective:
    """Class-balanced (N+1)-class cross-entropy and LabelMix (Schönfeld et al. 2021, arXiv 2012.04781, §3.2).

    Args:
        label_mix_weight: of LabelMix's consistency.
    """

    def __init__(self, label_mix_weight: float = 10.0) -> None:
        self.label_mix_weight = label_mix_weight

    def generator_terms(
        self, discriminator: Callable[[Tensor], Tensor], image: Tensor, real: Tensor, fake: Tensor
    ) -> Terms:
        """How far the discriminator is from finding the label map in the fake slices."""
        return {"adversarial": losses.segment_real(discriminator(fake), image)}

    def discriminator_terms(
        self, discriminator: Callable[[Tensor], Tensor], image: Tensor, real: Tensor, fake: Tensor
    ) -> Terms:
        """Cross-entropy of fake and real slices, and the consistency of what LabelMix makes of the two."""
        from_real = losses.label_mix(image)
        slices = torch.cat([fake, real, torch.where(from_real, real, fake)])
        of_fake, of_real, of_mixed = discriminator(slices).chunk(3)
        consistency = losses.label_mix_consistency(of_mixed, of_fake, of_real, from_real)
        return {
            "fake": losses.segment_fake(of_fake),
            "real": losses.segment_real(of_real, image),
            "label_mix": self.label_mix_weight * consistency,
        }


class Pix2PixObjective:
    """Conditional GAN and L1 (Isola et al. 2017, arXiv 1611.07004, §3.1 and 3.3).

    The discriminator has BatchNorm: the method normalises fake and real slices each by their own statistics, so it is
    called once for each of them.

    Args:
        l1_weight: of the L1 distance to the real slice.
    """

    def __init__(self, l1_weight: float = 100.0) -> None:
        self.l1_weight = l1_weight

    def generator_terms(
        self, discriminator: Callable[[Tensor], list[Tensor]], image: Tensor, real: Tensor, fake: Tensor
    ) -> Terms:
        """Adversarial term and L1."""
        return {
            "adversarial": losses.binary_cross_entropy(discriminator(_beside_mask(image, fake))[-1], is_real=True),
            "l1": self.l1_weight * F.l1_loss(fake.float(), real.float()),
        }

    def discriminator_terms(
        self, discriminator: Callable[[Tensor], list[Tensor]], image: Tensor, real: Tensor, fake: Tensor
    ) -> Terms:
        """Cross-entropy of fake and of real slices, halved, which slows the discriminator down."""
        return {
            "fake": losses.binary_cross_entropy(discriminator(_beside_mask(image, fake))[-1], is_real=False) / 2,
            "real": losses.binary_cross_entropy(discriminator(_beside_mask(image, real))[-1], is_real=True) / 2,
        }


def _beside_mask(image: Tensor, ct: Tensor) -> Tensor:
    """What a conditional discriminator looks at: the one-hot mask and the slice, (B, 18, H, W)."""
    return torch.cat([one_hot(image), ct], dim=1)
