"""The terms that the GANs learn from, each a number for a batch, computed in float32 also under autocast.

Logits and features are a discriminator's; of several scales they come as a list, and a term is the mean over scales.
OASIS is Schönfeld et al. 2021 (arXiv 2012.04781).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .labels import NUM_CLASSES
from .transforms import one_hot

PERCEPTUAL_WEIGHTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)
"""Of relu1_1 ... relu5_1, as in pix2pixHD (Wang et al. 2018, arXiv 1711.11585)."""


def hinge(logits: Sequence[Tensor], is_real: bool) -> Tensor:
    """What a discriminator pays for one kind of slices: max(0, 1 − x) if real, max(0, 1 + x) if not.

    The hinge loss of Lim & Ye 2017 (arXiv 1705.02894) is the sum of both.
    """
    sign = -1 if is_real else 1
    return torch.stack([F.relu(1 + sign * scale.float()).mean() for scale in logits]).mean()


def hinge_generator(logits: Sequence[Tensor]) -> Tensor:
    """What a generator pays for its slices: −x, without the hinge."""
    return torch.stack([-scale.float().mean() for scale in logits]).mean()


def feature_matching(fake: Sequence[Sequence[Tensor]], real: Sequence[Sequence[Tensor]]) -> Tensor:
    """L1 between the features of fake and real, summed over layers (Wang et al. 2018, eq. 4).

    Args:
        fake, real: for each scale the outputs of all layers; the last, the logits, doesn't count. Nothing is learned
            from `real`.
    """
    scales = [
        sum(F.l1_loss(f.float(), r.detach().float()) for f, r in zip(fakes[:-1], reals[:-1], strict=True))
        for fakes, reals in zip(fake, real, strict=True)
    ]
    return torch.stack(scales).mean()


def perceptual(features: Callable[[Tensor], Sequence[Tensor]], fake: Tensor, real: Tensor) -> Tensor:
    """Weighted L1 between VGG19's maps of fake and real slices (Johnson et al. 2016, arXiv 1603.08155).

    Args:
        features: makes five maps of a picture (B, 3, H, W), see `networks.vgg`.
        fake, real: (B, 1, H, W) in [-1, 1], which VGG gets without ImageNet's normalisation.
    """
    with torch.no_grad():
        targets = features(real.expand(-1, 3, -1, -1))
    maps = zip(PERCEPTUAL_WEIGHTS, features(fake.expand(-1, 3, -1, -1)), targets, strict=True)
    return torch.stack([weight * F.l1_loss(f.float(), r.float()) for weight, f, r in maps]).sum()


def class_weights(image: Tensor) -> Tensor:
    """Weights (17,) that give each class of a batch of label maps (B, 1, H, W) the same share (OASIS §3.2).

    B · H · W / (number of present classes · pixels of the class): over all pixels they sum up to B · H · W. Absent
    classes have 0.
    """
    counts = one_hot(image).sum(dim=(0, 2, 3))
    present = counts > 0
    return torch.where(present, image.numel() / (present.sum() * counts), 0)


def segment_real(logits: Tensor, image: Tensor) -> Tensor:
    """Class-balanced cross-entropy of a segmenting discriminator that ought to see the label map (OASIS §3.2).

    Args:
        logits: (B, 18, H, W): fake, then the 17 classes.
        image: label map (B, 1, H, W).
    """
    # cross_entropy divides by the sum of the pixels' weights, which is the number of pixels
    return F.cross_entropy(logits.float(), image[:, 0].long() + 1, weight=F.pad(class_weights(image), (1, 0)))


def segment_fake(logits: Tensor) -> Tensor:
    """Cross-entropy of a segmenting discriminator (B, 18, H, W) that ought to see fake pixels alone (OASIS §3.2)."""
    return -logits.float().log_softmax(dim=1)[:, 0].mean()


def label_mix(image: Tensor) -> Tensor:
    """Draw for each sample which classes of a label map (B, 1, H, W) are taken from the real slice (OASIS §3.2).

    Returns:
        bool (B, 1, H, W), constant in each class; classes are drawn independently with probability 1/2, background too.
    """
    is_real = torch.randint(2, (len(image), NUM_CLASSES), device=image.device).bool()
    return is_real.gather(1, image.flatten(1).long()).view_as(image)


def label_mix_consistency(mixed: Tensor, fake: Tensor, real: Tensor, from_real: Tensor) -> Tensor:
    """Squared difference between the logits of a mixed slice and the mixed logits of its two sources (OASIS §3.2).

    Args:
        mixed, fake, real: logits (B, 18, H, W); all three learn.
        from_real: what `label_mix` drew.
    """
    return F.mse_loss(mixed.float(), torch.where(from_real, real.float(), fake.float()))


def binary_cross_entropy(logits: Tensor, is_real: bool) -> Tensor:
    """Binary cross-entropy of logits of any shape that ought to say real, or fake (Goodfellow et al. 2014)."""
    return F.binary_cross_entropy_with_logits(logits.float(), torch.full_like(logits, is_real, dtype=torch.float32))
