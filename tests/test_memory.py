"""Tests of activation memory: equal gradients with less memory, and the checks of memory limits."""

from contextlib import nullcontext
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import SMALL
from test_training import rows

from flowgen.bijections import base
from flowgen.bijections.base import Chain, pop_inversion_error, set_activation_memory
from flowgen.bijections.linear import ActNorm
from flowgen.bijections.networks import ZeroConv2d
from flowgen.config.compose import compose_config
from flowgen.config.instantiate import build_model, with_image_shape
from flowgen.models.base import GenerativeModel
from flowgen.models.rbm.negative_phase import PCD, Tempering
from flowgen.models.rbm.rbm import RBM
from flowgen.models.vae import VAE
from flowgen.training.device import saved_tensor_bytes
from flowgen.utils import memory

GLOW = ["model=glow", "model.levels=2", "model.width=8", "model.steps_per_level=3"]
JET = ["model=jet", "model.num_couplings=3", "model.width=8"]
MODELS = {
    "glow": GLOW,
    "additive": [*GLOW, "model.transform=additive", "model.convolution=plain"],
    "classes": [*GLOW, "model.num_classes=3", "model.condition_networks=true"],
    "nice": ["model=nice", "model.width=8"],
}


def build(overrides: list[str]) -> tuple[GenerativeModel, tuple]:
    """Return a model that is not the identity, in training mode, and a batch."""
    config = compose_config(["data=folder", "data.root=none", "data.bits=5", *overrides]).config
    torch.manual_seed(0)
    model = build_model(with_image_shape(config, (3, 8, 8), 5))
    for module in model.modules():
        if isinstance(module, ZeroConv2d | torch.nn.Linear) and not module.weight.any():
            torch.nn.init.normal_(module.weight, std=0.05)
    batch = torch.randint(32, (16, 3, 8, 8), dtype=torch.uint8), torch.arange(16) % 3
    model.initialize(*batch)
    return model.train(), batch


def gradients(model: GenerativeModel, batch: tuple, mode: str, seed: int = 1) -> torch.Tensor:
    set_activation_memory(model, mode)
    model.zero_grad()
    torch.manual_seed(seed)
    model(*batch).backward()
    return torch.cat(
        [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    )


def saved_bytes(model: GenerativeModel, images: torch.Tensor, labels: torch.Tensor | None) -> int:
    """Return the bytes that the forward pass of a batch saves for the backward pass."""
    runtime = SimpleNamespace(autocast=nullcontext)
    return saved_tensor_bytes(model, runtime, images, labels)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_same_in_all_modes(name, monkeypatch):
    monkeypatch.setattr(base, "MAX_INVERTED_BIJECTIONS", 4)
    model, batch = build(MODELS[name])
    stored = gradients(model, batch, "store")
    assert torch.equal(gradients(model, batch, "checkpoint"), stored)
    assert pop_inversion_error(model) is None
    recovered = gradients(model, batch, "reversible")
    assert (recovered - stored).norm() < 1e-4 * stored.norm()
    error = pop_inversion_error(model)
    assert error is not None
    assert 0 < error < 1e-5
    assert pop_inversion_error(model) is None  # the call before has reset it


def test_the_inversion_error_of_zeros_is_a_number():
    chain = Chain(ActNorm(2))
    set_activation_memory(chain, "reversible")
    chain(torch.zeros(3, 2))[0].sum().backward()
    assert pop_inversion_error(chain) == 0


def test_models_without_bijections_have_no_activations_to_recompute():
    with pytest.raises(ValueError, match="not supported by this model"):
        set_activation_memory(VAE(image_shape=(1, 8, 8), width=8), "checkpoint")


@pytest.mark.parametrize(
    "overrides",
    [["model=tarflow", "model.num_layers=[1,1]", "model.width=8", "model.num_classes=3"], JET],
    ids=["tarflow", "jet"],
)
def test_recomputation_uses_the_same_dropout_mask(overrides):
    model, batch = build([*overrides, "model.dropout=0.3"])
    stored = gradients(model, batch, "store")
    assert torch.equal(gradients(model, batch, "checkpoint"), stored)
    assert not torch.equal(gradients(model, batch, "checkpoint", seed=2), stored)


def test_jet_without_dropout_is_reversible():
    model, batch = build(JET)
    stored = gradients(model, batch, "store")
    assert (gradients(model, batch, "reversible") - stored).norm() < 1e-4 * stored.norm()


def test_recomputation_updates_running_statistics_once():
    model, batch = build(["model=realnvp", "model.width=4", "model.num_blocks=1", "model.levels=1"])
    results = []
    for mode in ("store", "checkpoint"):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        gradient = gradients(model, batch, mode)
        results.append((gradient, {k: value.clone() for k, value in model.state_dict().items()}))
        model.load_state_dict(before)
    (stored, stored_state), (checkpointed, checkpointed_state) = results
    assert torch.allclose(stored, checkpointed, rtol=1e-3, atol=1e-6)
    for name, value in stored_state.items():
        assert torch.equal(value, checkpointed_state[name]), name


@pytest.mark.parametrize(
    ("overrides", "mode", "message"),
    [
        (["model=realnvp", "model.width=4"], "reversible", "MaskedCoupling: use 'checkpoint'"),
        (["model=maf", "model.width=8"], "reversible", "Autoregressive"),
        ([*GLOW, "model.transform=spline"], "reversible", "Coupling"),
        ([*JET, "model.dropout=0.1"], "reversible", "Coupling: use 'checkpoint'"),
        (["model=flow_matching", "model.width=8"], "checkpoint", "use 'store'"),
        (GLOW, "forget", "one of store, checkpoint, reversible"),
    ],
)
def test_unsupported_modes_are_rejected(overrides, mode, message):
    with pytest.raises(ValueError, match=message):
        set_activation_memory(build(overrides)[0], mode)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model=glow", "model.transform=spline", "trainer.activation_memory=reversible"],
            "trainer.activation_memory",
        ),
        (
            ["model=maf", "trainer.activation_memory=store", "trainer.batch_size=1"],
            "set trainer.batch_size to at least 2",
        ),
    ],
)
def test_errors_of_bijections_name_the_setting(overrides, message, images, tmp_path, command):
    shared = [override for override in SMALL if not override.startswith("model")]
    status, _, error = command(
        "train",
        *shared,
        *overrides,
        "model.width=8",
        f"data.root={images}",
        "trainer.steps=2",
        f"output_dir={tmp_path / 'run'}",
    )
    assert status == 1
    assert message in error
    assert "bug in flowgen" not in error


def test_memory_grows_with_depth_unless_activations_are_recovered():
    sizes = {}
    for depth in (2, 16):
        model, (images, labels) = build([*GLOW, f"model.steps_per_level={depth}"])
        for mode in ("store", "checkpoint", "reversible"):
            set_activation_memory(model, mode)
            two, four = (saved_bytes(model, images[:n], labels[:n]) for n in (2, 4))
            sizes[depth, mode] = four - two
    assert sizes[16, "store"] > 6 * sizes[2, "store"]
    assert sizes[16, "reversible"] == sizes[2, "reversible"] < sizes[2, "store"] / 2


@pytest.mark.parametrize(
    "phase",
    [
        PCD(gibbs_steps=1, num_chains=5),
        Tempering(gibbs_steps=1, num_chains=5, num_temperatures=3, adapt=True),
    ],
)
def test_measuring_memory_changes_no_chains_or_statistics(phase):
    rbm = RBM([1, 4, 4], 6, negative_phase=phase)
    images = torch.randint(2, (8, 1, 4, 4), dtype=torch.uint8)
    rbm.initialize(images)
    before = {name: value.clone() for name, value in rbm.state_dict().items()}
    saved_bytes(rbm, images, None)
    for name, value in rbm.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_training_logs_the_inversion_error(images, tmp_path, command):
    status, _, error = command(
        "train",
        *SMALL,
        f"data.root={images}",
        "trainer.steps=2",
        "trainer.activation_memory=reversible",
        "trainer.precision=float32",
        f"output_dir={tmp_path / 'run'}",
    )
    assert status == 0, error
    assert "inversion_error" in error
    train_rows = [row for row in rows(tmp_path / "run") if row["split"] == "train"]
    assert all(0 < row["inversion_error"] < 1e-5 for row in train_rows)


def test_error_for_a_large_batch_names_the_largest_that_fits(
    images, tmp_path, command, monkeypatch
):
    monkeypatch.setattr("flowgen.training.device.free_memory", lambda: 300_000)
    train = ["train", *SMALL, f"data.root={images}", "trainer.steps=2"]
    status, _, error = command(*train, "trainer.batch_size=64", f"output_dir={tmp_path / 'large'}")
    assert status == 1
    assert "at most" in error
    assert "trainer.grad_accum_steps=2" in error
    largest = int(error.partition("at most ")[2].split()[0])
    status, _, error = command(
        *train, f"trainer.batch_size={largest}", f"output_dir={tmp_path / 'largest'}"
    )
    assert status == 0, error


def test_free_memory_respects_the_limits_of_the_process(monkeypatch, tmp_path):
    free = memory.free_memory()
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    (tmp_path / "memory.max").write_text("8000000")
    (tmp_path / "memory.current").write_text("6000000")
    (tmp_path / "memory.stat").write_text("anon 1\nfile 5000000\n")
    assert memory.free_memory() == 7_000_000  # the page cache can be reclaimed
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_memory() > free / 2
    limits = {psutil.RLIMIT_DATA: psutil.Process().memory_info().data + 50_000_000}
    monkeypatch.setattr(
        psutil.Process,
        "rlimit",
        lambda self, limit: (limits.get(limit, psutil.RLIM_INFINITY), psutil.RLIM_INFINITY),
    )
    assert 40_000_000 < memory.free_memory() <= 50_000_000
