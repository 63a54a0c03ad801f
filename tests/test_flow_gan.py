"""Flow-GAN: the gradients of both players, and points with gradients for the flow."""

import copy

import pytest
import torch
from conftest import fit
from test_models import build_model, random_images
from torch.nn import functional as F

from flowgen.bijections.base import set_activation_memory
from flowgen.models.flows.flow_gan import FlowGAN


def flow_gan(**changes: object) -> FlowGAN:
    """Return an initialized model whose parameters are perturbed, as if it had been trained."""
    small = {"steps_per_level": 1, "discriminator_width": 4, "adversarial_weight": 0.5}
    model = build_model("flow_gan", **small | changes)
    model.initialize(random_images(5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def gradients(loss: torch.Tensor, parameters: list) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))


def test_without_an_adversarial_loss_the_model_trains_like_a_glow():
    torch.manual_seed(0)
    model = build_model("flow_gan", steps_per_level=1, adversarial_weight=0)
    torch.manual_seed(0)
    glow = build_model("glow", steps_per_level=1)
    batch = random_images(5)
    for each in (model, glow):
        torch.manual_seed(1)
        each.initialize(batch)
        fit(each, lambda _: (batch,), steps=3, lr=1e-3)
    assert all(torch.equal(model.state_dict()[name], w) for name, w in glow.state_dict().items())
    torch.manual_seed(2)
    loss = model(batch)
    torch.manual_seed(2)
    assert torch.equal(loss, glow(batch))


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_classes": 2}, {"num_classes": 2, "condition_networks": False}],
    ids=["unconditional", "classes", "classes of the base"],
)
def test_the_gradients_are_those_of_two_players_with_their_own_losses(changes):
    """Each player's loss is differentiated on its own, as two optimizers would do."""
    model = flow_gan(**changes).double()
    images = random_images(5, 4)
    labels = torch.tensor([0, 1, 1, 0])
    torch.manual_seed(3)
    model(images, labels).backward()

    torch.manual_seed(3)
    bits_per_dim = super(FlowGAN, model).forward(images, labels)
    real = model._dequantize(images)[0].detach()
    fake = model.draw_points(4, labels)
    discriminator = copy.deepcopy(model.discriminator)
    generator_loss = F.softplus(discriminator(real) - discriminator(fake)).mean()
    flow = [p for name, p in model.named_parameters() if not name.startswith("discriminator")]
    expected = gradients(bits_per_dim + 0.5 * generator_loss, flow)

    real.requires_grad_()
    fake = fake.detach().requires_grad_()
    penalty = sum(
        torch.autograd.grad(discriminator(x)[i], x, create_graph=True)[0][i].square().sum()
        for x in (real, fake)
        for i in range(4)
    )
    discriminator_loss = F.softplus(discriminator(fake) - discriminator(real)).mean()
    weight = model.gradient_penalty / 2 / 4
    expected += gradients(
        0.5 * (discriminator_loss + weight * penalty), [*discriminator.parameters()]
    )
    actual = [p.grad for p in (*flow, *model.discriminator.parameters())]
    assert all(
        torch.allclose(a, b, rtol=1e-6, atol=1e-12) for a, b in zip(actual, expected, strict=True)
    )
    assert all(gradient.abs().max() > 0 for gradient in actual[-5:])


@pytest.mark.parametrize("condition_networks", [True, False])
def test_points_are_drawn_from_the_given_classes(condition_networks):
    model = flow_gan(num_classes=2, condition_networks=condition_networks).double()
    labels = torch.tensor([1, 1, 0, 1])
    torch.manual_seed(6)
    points = model.draw_points(4, labels)
    one_hot = F.one_hot(labels, 2).double()
    z, _ = model.bijection(points, one_hot if condition_networks else None)
    torch.manual_seed(6)
    noise = torch.randn(4, model.dimensions, dtype=torch.double)
    assert torch.allclose(z, model.means[labels] + noise, atol=1e-4)


@pytest.mark.parametrize("transform", ["additive", "affine", "spline", "mixture"])
@pytest.mark.parametrize("changes", [{}, {"convolution": "plain", "base": "learned"}], ids=str)
def test_points_have_the_gradients_of_the_inverse(transform, changes):
    """The gradient of a parameter agrees with a finite difference."""
    model = flow_gan(transform=transform, **changes).double()

    def total() -> torch.Tensor:
        torch.manual_seed(4)
        return model.draw_points(3).sin().sum()

    total().backward()
    direction = [torch.randn_like(p) for p in model.bijection.parameters()]
    slope = sum(
        (p.grad * d).sum().item()
        for p, d in zip(model.bijection.parameters(), direction, strict=True)
        if p.grad is not None
    )
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            for p, d in zip(model.bijection.parameters(), direction, strict=True):
                p += sign * 1e-7 * d
            values.append(total().item())
    assert (values[0] - values[1]) / 2e-7 == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("mode", ["checkpoint", "reversible"])
def test_saving_memory_does_not_change_the_gradients(mode):
    model = flow_gan().double()
    images = random_images(5, 4)
    results = []
    for activation_memory in ("store", mode):
        set_activation_memory(model, activation_memory)
        torch.manual_seed(5)
        results.append(gradients(model(images), [*model.parameters()]))
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adversarial_weight": -1}, "adversarial_weight must be"),
        ({"gradient_penalty": "much"}, "gradient_penalty must be"),
        ({"discriminator_width": 0}, "discriminator_width must be a whole number"),
    ],
)
def test_invalid_arguments_are_rejected(changes, message):
    with pytest.raises(ValueError, match=message):
        build_model("flow_gan", **changes)
