"""Abilities: what a model that has one must do, and how a command finds it."""

import itertools
import os
import shutil

import pytest
import torch
from test_models import load_from_checkpoint, read_config_of, started

from flowgen.config.compose import read_config, save_config
from flowgen.config.instantiate import build
from flowgen.config.loading import find_model
from flowgen.config.runs import find_checkpoint
from flowgen.models.base import ClassConditional, SupportsInpainting, SupportsMCMC
from flowgen.models.flows.flow import Flow
from flowgen.models.flows.glow import Glow
from flowgen.utils.errors import UserError

COMPLETE = {
    "rbm": lambda: build(
        "model", read_config_of("rbm") | {"visible": [1, 8, 8], "bits": 1, "hidden": 6}
    ),
    "glow": lambda: started("glow"),
}


@pytest.fixture(params=COMPLETE)
def completing(request: pytest.FixtureRequest) -> SupportsInpainting:
    return COMPLETE[request.param]().eval()


def test_completion_keeps_what_is_known_never_looks_at_the_rest_and_repeats_itself(completing):
    shape, known = completing.image_shape, torch.zeros(completing.image_shape, dtype=torch.bool)
    known[..., : shape[2] // 2] = True
    images = torch.randint(2**completing.bits, (1, *shape), dtype=torch.uint8)
    other = torch.where(known, images, 2**completing.bits - 1 - images)
    for method in completing.completions:
        found, again = (
            completing.inpaint(
                image, known, method=method, sweeps=5, generator=torch.Generator().manual_seed(0)
            )
            for image in (images, other)
        )
        assert found.draws.shape[1:] == found.mean.shape == shape
        for brightness in (found.draws, found.mean[None]):
            assert brightness.min() >= 0 and brightness.max() <= 1
            kept = torch.where(known, brightness, 0) * (2**completing.bits - 1)
            assert torch.allclose(kept, torch.where(known, images, 0).float(), atol=0.51)
        assert torch.equal(found.draws, again.draws) and torch.equal(found.mean, again.mean)
    with pytest.raises(UserError, match="method must be "):
        completing.inpaint(images, known, method="magic")


def test_the_mean_of_a_completion_is_the_exact_conditional():
    torch.manual_seed(0)
    rbm = build("model", read_config_of("rbm") | {"visible": 5, "bits": 1, "hidden": 3})
    for parameter in rbm.parameters():
        parameter.data.normal_()
    images = torch.tensor([1, 0, 0, 1, 1], dtype=torch.uint8).view(1, 1, 1, 5)
    known = torch.tensor([True, True, False, False, True]).view(1, 1, 5)
    states = torch.tensor(list(itertools.product((0.0, 1.0), repeat=5)))
    states = states[(states == images.flatten())[:, known.flatten()].all(1)]
    exact = (-rbm.free_energy(states)).softmax(0) @ states
    generator = torch.Generator().manual_seed(0)
    found = rbm.inpaint(images, known, method="gibbs", sweeps=400, generator=generator)
    assert torch.allclose(found.mean.flatten(), exact, atol=0.02)


def test_a_film_begins_with_noise_and_goes_on_for_ever():
    rbm = COMPLETE["rbm"]()
    noise, *frames = itertools.islice(
        rbm.iter_chains(7, "gibbs", torch.Generator().manual_seed(0)), 4
    )
    assert set(noise.unique().tolist()) == {0.0, 1.0}
    assert all(
        frame.shape == (7, 1, 8, 8) and frame.min() > 0 and frame.max() < 1 for frame in frames
    )


def test_abilities_are_those_of_the_class_and_of_its_arguments():
    assert Flow.supports(ClassConditional, {"num_classes": 10}) and not Flow.supports(
        ClassConditional, {"num_classes": None}
    )
    assert not Flow.supports(SupportsMCMC, {}) and Glow.supports(Flow, {})
    assert isinstance(
        load_from_checkpoint("glow", num_classes=3, steps_per_level=1), ClassConditional
    )


def test_the_newest_run_that_is_able_is_found(tiny_run, elsewhere):
    for age, (name, model) in enumerate(
        (("plain", {}), ("classes", {"num_classes": 10}), ("newest", {}))
    ):
        run = shutil.copytree(tiny_run, elsewhere / "outputs" / name)
        config = read_config(run / "config.yaml")
        save_config(config | {"model": config["model"] | model}, run / "config.yaml")
        os.utime(run / "config.yaml", (age, age))
    assert find_checkpoint(None, ClassConditional)[0].folder.name == "classes"
    assert find_checkpoint(None, Flow)[0].folder.name == "newest"
    assert find_checkpoint(None, SupportsInpainting)[0].folder.name == "newest"
    with pytest.raises(
        UserError,
        match=r"no run of a model that draws by Markov chains .* `flowgen train model=rbm`",
    ):
        find_checkpoint(None, SupportsMCMC)
    with pytest.raises(
        UserError,
        match=r"newest is no run of a model that draws by Markov chains, .* `flowgen train model=rbm`",
    ):
        find_model("newest", "cpu", SupportsMCMC)
