"""What the backward pass needs is kept, computed again or recovered: with the same gradients, and with less memory."""

import resource
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from test_house import compose_config
from test_training import rows

from flowgen.bijections import reversible as memory_module
from flowgen.bijections.chain import inversion_error, set_activation_memory
from flowgen.bijections.networks import ZeroConv2d
from flowgen.config.instantiate import build_model, with_image_shape
from flowgen.models.base import GenerativeModel
from flowgen.models.rbm.negative_phase import PCD, Tempering
from flowgen.models.rbm.rbm import RBM
from flowgen.training.device import Runtime, _kept
from flowgen.utils import memory as costs
from flowgen.utils.errors import UserError

GLOW = ["model=glow", "model.levels=2", "model.width=8", "model.steps_per_level=3"]
MODELS = {
    "glow": GLOW,
    "additive": [*GLOW, "model.transform=additive", "model.convolution=plain"],
    "num_classes": [*GLOW, "model.num_classes=3", "model.condition_networks=true"],
    "nice": ["model=nice", "model.width=8"],
}
JET = ["model=jet", "model.num_couplings=3", "model.width=8"]


def load_from_checkpoint(words: list[str]) -> tuple[GenerativeModel, tuple]:
    config = compose_config("data=folder", "data.root=none", "data.bits=5", *words)
    torch.manual_seed(0)
    model = build_model(with_image_shape(config, (3, 8, 8), 5))
    for module in model.modules():
        if (
            isinstance(module, ZeroConv2d | torch.nn.Linear) and not module.weight.any()
        ):  # at the start a coupling is the identity
            torch.nn.init.normal_(module.weight, std=0.05)
    batch = torch.randint(32, (16, 3, 8, 8), dtype=torch.uint8), torch.arange(16) % 3
    model.initialize(*batch)
    return model.train(), batch


def gradients(model: GenerativeModel, batch: tuple, memory: str) -> torch.Tensor:
    set_activation_memory(model, memory)
    model.zero_grad()
    torch.manual_seed(1)
    model(*batch).backward()
    return torch.cat(
        [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    )


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_same_however_they_come_about(name, monkeypatch):
    monkeypatch.setattr(memory_module, "LONGEST", 4)
    model, batch = load_from_checkpoint(MODELS[name])
    kept = gradients(model, batch, "keep")
    assert (
        torch.equal(gradients(model, batch, "checkpoint"), kept) and inversion_error(model) is None
    )
    reversible = gradients(model, batch, "invert")
    assert (reversible - kept).norm() < 1e-4 * kept.norm()
    error = inversion_error(model)
    assert error is not None and 0 < error < 1e-5 and inversion_error(model) is None


@pytest.mark.parametrize(
    "words",
    [["model=tarflow", "model.num_layers=[1,1]", "model.width=8", "model.num_classes=3"], JET],
    ids=["tarflow", "jet"],
)
def test_what_is_lost_by_dropout_is_lost_again(words):
    model, batch = load_from_checkpoint([*words, "model.dropout=0.3"])
    kept = gradients(model, batch, "keep")
    assert torch.equal(gradients(model, batch, "checkpoint"), kept)
    torch.manual_seed(2)
    model.zero_grad()
    model(*batch).backward()
    assert not torch.equal(
        torch.cat(
            [
                parameter.grad.flatten()
                for parameter in model.parameters()
                if parameter.grad is not None
            ]
        ),
        kept,
    )


def test_without_dropout_jet_is_recovered():
    model, batch = load_from_checkpoint(JET)
    kept = gradients(model, batch, "keep")
    assert (gradients(model, batch, "invert") - kept).norm() < 1e-4 * kept.norm()


def test_batch_statistics_remember_a_batch_once():
    model, batch = load_from_checkpoint(
        ["model=realnvp", "model.width=4", "model.num_blocks=1", "model.levels=1"]
    )
    states = []
    for memory in ("keep", "checkpoint"):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        found = gradients(model, batch, memory)
        states.append((found, {name: value.clone() for name, value in model.state_dict().items()}))
        model.load_state_dict(before)
    assert torch.allclose(states[0][0], states[1][0], rtol=1e-3, atol=1e-6)
    for name, value in states[0][1].items():
        assert torch.equal(value, states[1][1][name]), name


@pytest.mark.parametrize(
    ("words", "memory", "said"),
    [
        (
            ["model=realnvp", "model.width=4"],
            "invert",
            "MaskedCoupling: set trainer.activation_memory=checkpoint",
        ),
        (["model=maf", "model.width=8"], "invert", "Autoregressive"),
        ([*GLOW, "model.transform=spline"], "invert", "Coupling"),
        (
            [*JET, "model.dropout=0.1"],
            "invert",
            "Coupling: set trainer.activation_memory=checkpoint",
        ),
        (
            ["model=flow_matching", "model.width=8"],
            "checkpoint",
            "leave trainer.activation_memory=checkpoint out",
        ),
        (GLOW, "forget", "one of keep, checkpoint, invert"),
    ],
)
def test_a_model_that_cannot_says_so(words, memory, said):
    with pytest.raises(UserError, match=said):
        set_activation_memory(load_from_checkpoint(words)[0], memory)


def test_what_is_kept_grows_with_depth_unless_it_is_recovered():
    machine = Runtime(device="cpu", threads=1, precision="float32", compile=False, memory="keep")
    kept = {}
    for depth in (2, 16):
        model, batch = load_from_checkpoint([*GLOW, f"model.steps_per_level={depth}"])
        for memory in ("keep", "checkpoint", "invert"):
            set_activation_memory(model, memory)
            sizes = [_kept(model, machine, *(part[:count] for part in batch)) for count in (2, 4)]
            kept[depth, memory] = sizes[1] - sizes[0]
    assert kept[16, "keep"] > 6 * kept[2, "keep"]
    assert kept[16, "invert"] == kept[2, "invert"] < kept[2, "keep"] / 2


@pytest.mark.parametrize(
    "phase",
    [
        PCD(gibbs_steps=1, num_chains=5),
        Tempering(gibbs_steps=1, num_chains=5, num_temperatures=3, adapt=True),
    ],
)
def test_a_look_at_the_memory_leaves_chains_and_statistics_as_they_were(phase):
    rbm = RBM([1, 4, 4], 6, negative_phase=phase)
    images = torch.randint(2, (8, 1, 4, 4), dtype=torch.uint8)
    rbm.initialize(images)
    before = {name: value.clone() for name, value in rbm.state_dict().items()}
    _kept(
        rbm,
        Runtime(device="cpu", threads=1, precision="float32", compile=False, memory="keep"),
        images,
        None,
    )
    assert [
        name for name, value in rbm.state_dict().items() if not torch.equal(value, before[name])
    ] == []


def test_a_run_watches_what_it_recovers(images, tmp_path, command, monkeypatch):
    words = [
        *SMALL,
        f"data.root={images}",
        "trainer.steps=2",
        "trainer.activation_memory=reversible",
        "trainer.precision=float32",
    ]
    status, _, error = command("train", *words, f"output_dir={tmp_path / 'run'}")
    assert status == 0 and "inversion_error" in error, error
    assert all(
        0 < row["inversion_error"] < 1e-5
        for row in rows(tmp_path / "run")
        if row["split"] == "train"
    )


def test_a_batch_that_does_not_fit_names_the_largest_that_does(
    images, tmp_path, command, monkeypatch
):
    monkeypatch.setattr("flowgen.training.device.free_memory", lambda: 300_000)
    words = [*SMALL, f"data.root={images}", "trainer.steps=2"]
    status, _, error = command(
        "train", *words, "trainer.batch_size=64", f"output_dir={tmp_path / 'run'}"
    )
    assert status == 1 and "at most" in error and "trainer.grad_accum_steps=2" in error, error
    fits = int(error.partition("at most ")[2].split()[0])
    assert (
        command("train", *words, f"trainer.batch_size={fits}", f"output_dir={tmp_path / 'other'}")[
            0
        ]
        == 0
    )
    assert costs.free_memory() > 300_000


def test_what_is_free_is_what_the_limits_of_the_process_leave(monkeypatch, tmp_path):
    free = costs.free_memory()
    monkeypatch.setattr(costs, "GROUPS", tmp_path)
    for name, words in {
        "max": "8000000",
        "current": "6000000",
        "stat": "anon 1\nfile 5000000\n",
    }.items():
        (tmp_path / f"memory.{name}").write_text(words)
    assert costs.free_memory() == 7_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert costs.free_memory() > free / 2
    used = int(
        next(
            line.split()[1]
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmData:")
        )
    )
    limits = {resource.RLIMIT_DATA: 1024 * used + 50_000_000}
    monkeypatch.setattr(
        resource,
        "getrlimit",
        lambda limit: (limits.get(limit, resource.RLIM_INFINITY), resource.RLIM_INFINITY),
    )
    assert 40_000_000 < costs.free_memory() <= 50_000_000
