"""Capabilities: what a model with a capability must do, and how commands find such a model."""

import itertools
import os
import shutil

import pytest
import torch
from test_models import build_model, initialized, model_config

from flowgen.config.compose import read_config, save_config
from flowgen.config.instantiate import instantiate
from flowgen.config.runs import find_checkpoint, find_model
from flowgen.models.base import (
    Capability,
    ClassConditional,
    SupportsCompression,
    SupportsInpainting,
    SupportsMCMC,
    SupportsTokenSampling,
)
from flowgen.models.flows.flow import Flow
from flowgen.models.flows.glow import Glow
from flowgen.utils.errors import UserError

INPAINTING_MODELS = {
    "rbm": lambda: instantiate(
        "model", model_config("rbm") | {"visible": [1, 8, 8], "bits": 1, "hidden": 6}
    ),
    "glow": lambda: initialized("glow"),
    "pixelcnn": lambda: initialized("pixelcnn"),
}


@pytest.fixture(params=INPAINTING_MODELS)
def inpainting_model(request: pytest.FixtureRequest) -> SupportsInpainting:
    return INPAINTING_MODELS[request.param]().eval()


def test_inpainting_keeps_known_pixels_ignores_the_others_and_is_reproducible(inpainting_model):
    model = inpainting_model
    shape = model.image_shape
    max_value = 2**model.bits - 1
    known = torch.zeros(shape, dtype=torch.bool)
    known[..., : shape[2] // 2] = True
    images = torch.randint(max_value + 1, (1, *shape), dtype=torch.uint8)
    changed = torch.where(known, images, max_value - images)
    for sampler in model.samplers:
        result, again = (
            model.inpaint(
                image, known, sampler=sampler, steps=5, generator=torch.Generator().manual_seed(0)
            )
            for image in (images, changed)
        )
        assert result.draws.shape[1:] == result.mean.shape == shape
        for brightness in (result.draws, result.mean[None]):
            assert brightness.min() >= 0 and brightness.max() <= 1
            pixels = torch.where(known, brightness, 0) * max_value
            assert torch.allclose(pixels, torch.where(known, images, 0).float(), atol=0.51)
        assert torch.equal(result.draws, again.draws) and torch.equal(result.mean, again.mean)
    with pytest.raises(UserError, match="sampler must be "):
        model.inpaint(images, known, sampler="magic")


def test_the_mean_of_an_inpainting_is_the_exact_conditional():
    torch.manual_seed(0)
    rbm = instantiate("model", model_config("rbm") | {"visible": 5, "bits": 1, "hidden": 3})
    for parameter in rbm.parameters():
        parameter.data.normal_()
    images = torch.tensor([1, 0, 0, 1, 1], dtype=torch.uint8).view(1, 1, 1, 5)
    known = torch.tensor([True, True, False, False, True]).view(1, 1, 5)
    states = torch.tensor(list(itertools.product((0.0, 1.0), repeat=5)))
    states = states[(states == images.flatten())[:, known.flatten()].all(1)]
    expected = (-rbm.free_energy(states)).softmax(0) @ states
    generator = torch.Generator().manual_seed(0)
    result = rbm.inpaint(images, known, sampler="gibbs", steps=400, generator=generator)
    assert torch.allclose(result.mean.flatten(), expected, atol=0.02)
    # 64 chains: the error of a probability is at most 0.0625.
    std = (expected * (1 - expected)).sqrt()
    assert torch.allclose(result.std.flatten(), std, atol=0.1)
    assert result.std[known].eq(0).all()


def test_chains_start_at_white_noise_and_never_end():
    rbm = INPAINTING_MODELS["rbm"]()
    chains = rbm.iter_chains(7, "gibbs", torch.Generator().manual_seed(0))
    noise, *states = itertools.islice(chains, 4)
    assert set(noise.unique().tolist()) == {0.0, 1.0}
    assert all(
        state.shape == (7, 1, 8, 8) and state.min() > 0 and state.max() < 1 for state in states
    )


def test_capabilities_depend_on_the_class_and_its_arguments():
    assert Flow.supports(ClassConditional, {"num_classes": 10})
    assert not Flow.supports(ClassConditional, {"num_classes": None})
    assert not Flow.supports(SupportsMCMC, {})
    assert Glow.supports(Flow, {})
    model = build_model("glow", num_classes=3, steps_per_level=1)
    assert isinstance(model, ClassConditional)


@pytest.mark.parametrize(
    "capability",
    [
        SupportsCompression,
        SupportsInpainting,
        ClassConditional,
        SupportsMCMC,
        SupportsTokenSampling,
    ],
)
def test_capabilities_have_a_description_and_a_training_hint(capability):
    assert Capability in capability.__bases__
    assert capability.description and "=" in capability.train_hint


def test_the_newest_run_with_a_capability_is_found(tiny_run, elsewhere):
    runs = {"plain": {}, "classes": {"num_classes": 10}, "newest": {}}
    for age, (name, changes) in enumerate(runs.items()):
        run = shutil.copytree(tiny_run, elsewhere / "outputs" / name)
        config = read_config(run / "config.yaml")
        save_config(config | {"model": config["model"] | changes}, run / "config.yaml")
        os.utime(run / "config.yaml", (age, age))
    assert find_checkpoint(None, ClassConditional)[0].folder.name == "classes"
    assert find_checkpoint(None, Flow)[0].folder.name == "newest"
    assert find_checkpoint(None, SupportsInpainting)[0].folder.name == "newest"
    message = r"run of a model that samples with Markov chains.* `flowgen train model=rbm`"
    with pytest.raises(UserError, match=rf"no {message}"):
        find_checkpoint(None, SupportsMCMC)
    with pytest.raises(UserError, match=rf"newest is not a {message}"):
        find_model("newest", "cpu", SupportsMCMC)
