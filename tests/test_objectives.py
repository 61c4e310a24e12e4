"""Each GAN's terms with discriminators whose answers are known."""

from __future__ import annotations

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.networks.vgg import BLOCKS, VGG19
from common.objectives import OASISObjective, Pix2PixObjective, SPADEObjective


class Scales(nn.Module):
    """Two scales; features and logits are linear in the slice and the mask, which `seen` keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0))
        self.seen = []

    def scale(self, mask: torch.Tensor, ct: torch.Tensor, factor: float) -> list[torch.Tensor]:
        feature = factor * self.gain * ct
        return [feature, feature + mask[:, [5]], feature.mean((2, 3)) - mask[:, 0].mean((1, 2))[:, None]]

    def forward(self, x: torch.Tensor) -> list[list[torch.Tensor]]:
        self.seen.append(x.detach())
        mask, ct = x[:, :17], x[:, 17:]
        return [self.scale(mask, ct, 1.0), self.scale(mask, ct, 3.0)]


class Patches(Scales):
    """One scale, as MONAI's PatchDiscriminator returns it."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return super().forward(x)[0]


class Segmenter(nn.Module):
    """18 logits a pixel: the slice times a random number each."""

    def __init__(self) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.randn(18, generator=torch.Generator().manual_seed(3)))
        self.seen = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.detach())
        return (x + x.square()) * self.factors[:, None, None]


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Label maps, real and fake slices of 2 x 8 x 8 pixels; real is brighter, so that swapping them shows."""
    random = torch.Generator().manual_seed(0)
    image = torch.randint(0, 17, (2, 1, 8, 8), generator=random, dtype=torch.uint8)
    real, fake = torch.rand(2, 1, 8, 8, generator=random), torch.rand(2, 1, 8, 8, generator=random) - 1
    return image, real, fake


@pytest.fixture
def vgg_file(tmp_path) -> str:
    """VGG19's layout with two channels a layer."""
    random = torch.Generator().manual_seed(0)
    weights, above = {}, 3
    for number in (number for block in BLOCKS for number in block):
        weights[f"features.{number}.weight"] = torch.randn(2, above, 3, 3, generator=random) / 3
        weights[f"features.{number}.bias"] = torch.rand(2, generator=random)
        above = 2
    torch.save(weights, tmp_path / "vgg19.pth")
    return str(tmp_path / "vgg19.pth")


def masks(image: torch.Tensor) -> torch.Tensor:
    return torch.stack([(image[:, 0] == c).float() for c in range(17)], dim=1)


def logits_by_hand(image: torch.Tensor, ct: torch.Tensor, factor: float) -> torch.Tensor:
    return torch.stack([2 * factor * c.mean() - (m == 0).float().mean() for m, c in zip(image, ct, strict=True)])


def relu(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(min=0)


def values(terms: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: term.item() for name, term in terms.items()}


def test_spade_generator(batch):
    image, real, fake = batch
    logits = [logits_by_hand(image, fake, factor) for factor in (1, 3)]
    difference = (fake - real).abs().mean().item()
    assert values(SPADEObjective().generator_terms(Scales(), image, real, fake)) == pytest.approx(
        {
            "adversarial": -(logits[0].mean() + logits[1].mean()).item() / 2,
            # two layers a scale, of gain 2 and 6; what the mask adds is the same in both
            "feature_matching": 10 * (2 * 2 * difference + 2 * 6 * difference) / 2,
        },
        rel=1e-5,
    )


def test_spade_discriminator(batch):
    image, real, fake = batch
    of_fake, of_real = ([logits_by_hand(image, ct, factor) for factor in (1, 3)] for ct in (fake, real))
    assert values(SPADEObjective().discriminator_terms(Scales(), image, real, fake)) == pytest.approx(
        {
            "fake": sum(relu(1 + x).mean().item() for x in of_fake) / 2,
            "real": sum(relu(1 - x).mean().item() for x in of_real) / 2,
        },
        rel=1e-5,
    )


@pytest.mark.parametrize("step", ["generator_terms", "discriminator_terms"])
def test_spade_shows_fake_and_real_in_one_batch(batch, step):
    image, real, fake = batch
    discriminator = Scales()
    getattr(SPADEObjective(), step)(discriminator, image, real, fake)
    (seen,) = discriminator.seen
    assert torch.equal(seen, torch.cat([torch.cat([masks(image), ct], 1) for ct in (fake, real)]))


def test_spade_perceptual_term(batch, vgg_file):
    image, real, fake = (F.interpolate(x, scale_factor=2) for x in batch)  # four poolings want 16 pixels
    terms = SPADEObjective(vgg=vgg_file).generator_terms(Scales(), image, real, fake)
    vgg = VGG19.load(vgg_file)
    maps = zip(vgg(fake.repeat(1, 3, 1, 1)), vgg(real.repeat(1, 3, 1, 1)), strict=True)
    distances = [(f - r).abs().mean().item() for f, r in maps]
    assert all(distance > 0 for distance in distances)
    expected = 10 * sum(w * d for w, d in zip((1 / 32, 1 / 16, 1 / 8, 1 / 4, 1), distances, strict=True))
    assert terms["perceptual"].item() == pytest.approx(expected, rel=1e-5)
    without = SPADEObjective().generator_terms(Scales(), image, real, fake)
    assert terms.keys() == without.keys() | {"perceptual"}
    assert all(torch.equal(terms[name], without[name]) for name in without)


def test_spade_says_once_that_the_perceptual_term_is_off(batch, vgg_file, caplog):
    with caplog.at_level(logging.INFO):
        SPADEObjective(vgg=vgg_file)
        assert not caplog.messages
        objective = SPADEObjective()
        for _ in range(3):
            objective.generator_terms(Scales(), *batch)
    assert caplog.messages == ["no VGG19 weights given: training without the perceptual term"]


def test_spade_wants_the_file_before_any_work():
    with pytest.raises(FileNotFoundError, match=r"no VGG19 weights at .*nowhere.pth"):
        SPADEObjective(vgg="nowhere.pth")


def balanced(x: torch.Tensor, image: torch.Tensor) -> float:
    """Class-balanced cross-entropy: the mean over the classes of the batch of each class's own mean."""
    surprise = -x.log_softmax(1).gather(1, image.long() + 1)
    return torch.stack([surprise[image == c].mean() for c in image.unique()]).mean().item()


def test_oasis_generator(batch):
    image, real, fake = batch
    discriminator = Segmenter()
    expected = balanced(discriminator(fake), image)
    discriminator.seen.clear()
    terms = OASISObjective().generator_terms(discriminator, image, real, fake)
    assert values(terms) == pytest.approx({"adversarial": expected}, rel=1e-5)
    (seen,) = discriminator.seen
    assert torch.equal(seen, fake)


def test_oasis_discriminator(batch):
    image, real, fake = batch
    discriminator = Segmenter()
    torch.manual_seed(0)
    terms = OASISObjective().discriminator_terms(discriminator, image, real, fake)
    (seen,) = discriminator.seen
    assert torch.equal(seen[:4], torch.cat([fake, real]))
    mixed = seen[4:]
    from_real = mixed == real
    assert torch.equal(mixed[~from_real], fake[~from_real]) and 0 < from_real.float().mean() < 1
    for sample, ids in zip(from_real, image, strict=True):
        assert all(sample[ids == c].unique().numel() == 1 for c in ids.unique())
    of_fake, of_real, of_mixed = discriminator(fake), discriminator(real), discriminator(mixed)
    consistency = (of_mixed - torch.where(from_real, of_real, of_fake)).square().mean().item()
    assert values(terms) == pytest.approx(
        {
            "fake": -of_fake.log_softmax(1)[:, 0].mean().item(),
            "real": balanced(of_real, image),
            "label_mix": 10 * consistency,
        },
        rel=1e-5,
        abs=1e-12,
    )


def test_oasis_consistency_counts_what_a_discriminator_sees_around_a_pixel(batch):
    """A pointwise discriminator is always consistent; one that blurs isn't."""
    image, real, fake = batch

    class Blurring(Segmenter):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(F.avg_pool2d(x, 3, 1, 1))

    def mixing(discriminator: nn.Module, **options) -> float:
        torch.manual_seed(0)
        return OASISObjective(**options).discriminator_terms(discriminator, image, real, fake)["label_mix"].item()

    assert mixing(Segmenter()) == pytest.approx(0, abs=1e-12)
    assert mixing(Blurring()) > 0.1
    assert mixing(Blurring(), label_mix_weight=5.0) == pytest.approx(mixing(Blurring()) / 2)


def softplus(x: torch.Tensor) -> float:
    return (1 + x.exp()).log().mean().item()


def test_pix2pix(batch):
    image, real, fake = batch
    of_fake, of_real = (logits_by_hand(image, ct, 1) for ct in (fake, real))
    generator = Pix2PixObjective().generator_terms(Patches(), image, real, fake)
    assert values(generator) == pytest.approx(
        {"adversarial": softplus(-of_fake), "l1": 100 * (fake - real).abs().mean().item()}, rel=1e-5
    )
    discriminator = Pix2PixObjective().discriminator_terms(Patches(), image, real, fake)
    assert values(discriminator) == pytest.approx(
        {"fake": 0.5 * softplus(of_fake), "real": 0.5 * softplus(-of_real)}, rel=1e-5
    )


def test_pix2pix_shows_fake_and_real_apart(batch):
    """A discriminator with BatchNorm must not normalise one by the other's statistics."""
    image, real, fake = batch
    discriminator = Patches()
    Pix2PixObjective().discriminator_terms(discriminator, image, real, fake)
    assert [len(seen) for seen in discriminator.seen] == [2, 2]
    for seen, ct in zip(discriminator.seen, (fake, real), strict=True):
        assert torch.equal(seen, torch.cat([masks(image), ct], 1))


GANS = [(SPADEObjective, Scales), (OASISObjective, Segmenter), (Pix2PixObjective, Patches)]


@pytest.mark.parametrize(("objective", "discriminator"), GANS)
def test_generator_learns_through_a_frozen_discriminator(batch, objective, discriminator):
    image, real, fake = batch
    fake.requires_grad_()
    frozen = discriminator().requires_grad_(False)
    for term in objective().generator_terms(frozen, image, real, fake).values():
        (slope,) = torch.autograd.grad(term, fake, retain_graph=True)
        assert slope.abs().max() > 0
    assert real.grad is None and all(parameter.grad is None for parameter in frozen.parameters())


@pytest.mark.parametrize(("objective", "discriminator"), GANS)
def test_discriminator_learns_from_every_term(batch, objective, discriminator):
    image, real, fake = batch
    network = discriminator()
    torch.manual_seed(0)
    terms = objective().discriminator_terms(network, image, real, fake)
    terms.pop("label_mix", None)  # zero for a pointwise discriminator; its gradient is in test_losses
    for term in terms.values():
        (slope,) = torch.autograd.grad(term, list(network.parameters()), retain_graph=True)
        assert slope.abs().max() > 0


@pytest.mark.parametrize(("objective", "discriminator"), GANS)
def test_discriminator_learns_to_tell_fake_from_real_and_generator_the_opposite(batch, objective, discriminator):
    """A step down the discriminator's loss parts the two; one down the generator's brings fake nearer to real."""
    image, real, fake = batch
    network = discriminator()

    def says_real(ct: torch.Tensor) -> float:
        """How real the discriminator finds slices: its logit, or the log-odds of the right class against fake."""
        if isinstance(network, Segmenter):
            x = network(ct)
            return (x.gather(1, image.long() + 1) - x[:, :1]).mean().item()
        outputs = network(torch.cat([masks(image), ct], 1))
        return (outputs if isinstance(network, Patches) else outputs[0])[-1].mean().item()

    optimiser = torch.optim.SGD(network.parameters(), lr=1e-3)
    before = says_real(real) - says_real(fake)
    sum(objective().discriminator_terms(network, image, real, fake).values()).backward()
    optimiser.step()
    assert says_real(real) - says_real(fake) > before + 1e-6

    before = says_real(fake)
    leaf = fake.clone().requires_grad_()
    objective().generator_terms(network, image, real, leaf)["adversarial"].backward()
    assert says_real(fake - 1e-2 * leaf.grad) > before


def test_bfloat16_slices_give_float32_terms(batch):
    """Under autocast a generator's slices are bfloat16, and the real ones float32."""
    image, real, fake = batch
    for objective, discriminator in GANS:
        with torch.autocast("cpu", torch.bfloat16):
            terms = objective().generator_terms(discriminator(), image, real, fake.bfloat16())
            terms |= objective().discriminator_terms(discriminator(), image, real, fake.bfloat16())
        assert all(term.dtype == torch.float32 and math.isfinite(term.item()) for term in terms.values())
