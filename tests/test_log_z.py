"""Estimates of log Z against exact enumeration, and the verdict on them."""

import math

import pytest
import torch
from enumeration import CHAINS, draw_states, exact_distribution, small_rbm

from flowgen.models.base import EvalConfig
from flowgen.models.rbm import log_z
from flowgen.models.rbm.log_z import (
    ais,
    bridge,
    estimate_log_z,
    exact_log_z,
    log_likelihood_metrics,
    reverse_ais,
    run_pilot,
)
from flowgen.models.rbm.rbm import RBM
from flowgen.models.rbm.sampling import space_betas, white_noise


def test_forward_and_reverse_ais_bracket_the_exact_value():
    """Short runs err on opposite sides. Long runs and bridge sampling agree within their errors."""
    rbm = small_rbm(10, 8, scale=2.0)
    exact = exact_log_z(rbm)
    probabilities = exact_distribution(rbm)
    samples = draw_states(probabilities, 400)
    short_forward = torch.tensor([ais(rbm, betas=5, chains=5).log_z for _ in range(60)])
    short_reverse = torch.tensor(
        [reverse_ais(rbm, draw_states(probabilities, 5), betas=5).log_z for _ in range(60)]
    )
    assert short_forward.mean() < exact - 0.3
    assert short_reverse.mean() > exact + 0.3
    by_bridge, _ = bridge(rbm, num_temperatures=8, chains=100, burn_in=300, steps=400)
    for estimate in (
        ais(rbm, betas=1000, chains=400),
        reverse_ais(rbm, samples, betas=1000),
        by_bridge,
    ):
        assert 0 < estimate.error < 0.1
        assert abs(estimate.log_z - exact) < 4 * estimate.error
        assert estimate.effective_sample_size > 10


def test_importance_weights_are_unbiased_even_with_few_ais_steps():
    rbm = small_rbm(scale=0.7)
    exact = exact_log_z(rbm)
    samples = draw_states(exact_distribution(rbm))
    for estimate in (ais(rbm, betas=3, chains=CHAINS), reverse_ais(rbm, samples, betas=3)):
        assert estimate.error < 0.02
        assert abs(estimate.log_z - exact) < 4 * estimate.error


def test_betas_may_have_any_spacing():
    rbm = small_rbm(scale=0.7)
    exact = exact_log_z(rbm)
    betas = [0.0, 0.1, 0.75, 1.0]
    samples = draw_states(exact_distribution(rbm))
    for estimate in (ais(rbm, betas=betas, chains=CHAINS), reverse_ais(rbm, samples, betas=betas)):
        assert estimate.error < 0.02
        assert abs(estimate.log_z - exact) < 4 * estimate.error


def test_the_pilot_run_puts_more_betas_where_ais_errs():
    """Independent pixels that freeze early: dF/dbeta has a peak.

    Its standard deviation is 6 sech(6 beta) per pixel. Equal steps then have an error that is
    larger by a factor of about 1.5.
    """
    rbm = small_rbm(30, 4, scale=0.0)
    rbm.visible_bias.data[:] = 12.0
    pilot = run_pilot(rbm, 400)
    centers = pilot.betas[:-1] + pilot.betas.diff() / 2
    for lengths in (pilot.barrier, pilot.log_weight_std):
        assert torch.allclose(lengths / lengths.max(), 1 / torch.cosh(6 * centers), atol=0.2)
    equal_steps = ais(rbm, betas=100, chains=4000).error
    betas = space_betas(pilot.betas, pilot.log_weight_std, 100).tolist()
    adapted_steps = ais(rbm, betas=betas, chains=4000).error
    assert equal_steps > 1.4 * adapted_steps


def test_errors_of_the_estimates_match_their_spread():
    rbm = small_rbm(8, 6, scale=1.5)
    for estimates in (
        [ais(rbm, betas=100, chains=100) for _ in range(40)],
        [bridge(rbm, num_temperatures=4, chains=20, burn_in=100, steps=50)[0] for _ in range(40)],
    ):
        spread = torch.tensor([estimate.log_z for estimate in estimates]).std().item()
        mean_error = torch.tensor([estimate.error for estimate in estimates]).mean().item()
        assert 0.6 < spread / mean_error < 1.6


def cross_check(rbm: RBM, ais_steps: int, ais_chains: int) -> dict[str, object]:
    config = EvalConfig(cross_check=True, ais_steps=ais_steps, ais_chains=ais_chains)
    result = estimate_log_z(rbm, config, torch.Generator().manual_seed(0))
    free_energy = rbm.free_energy(white_noise(rbm, 50)).detach()
    return log_likelihood_metrics(free_energy, result).row()


def test_the_verdict_depends_on_the_agreement_of_the_estimates(monkeypatch):
    monkeypatch.setattr(log_z, "BRIDGE_STEPS", 200)
    metrics = cross_check(small_rbm(30, 24, scale=0.3), ais_steps=300, ais_chains=100)
    assert metrics["reliable"]
    assert metrics["verdict"].startswith("reliable: ")
    assert metrics["log_likelihood_forward"] + 1 > metrics["log_likelihood"]
    assert metrics["log_likelihood"] > metrics["log_likelihood_reverse"] - 1
    metrics = cross_check(small_rbm(30, 24, scale=6.0), ais_steps=2, ais_chains=100)
    assert not metrics["reliable"]
    assert metrics["verdict"].startswith("not reliable: ")


@pytest.mark.parametrize(("bridge", "reliable"), [(0.5, True), (1.5, False)])
def test_a_noisy_bridge_must_agree_too(bridge, reliable):
    estimates = (
        log_z.Estimate(value, error, 50.0) for value, error in ((0, 0.1), (0.2, 0.1), (bridge, 3))
    )
    assert log_z._cross_check(*estimates).reliable == reliable


def test_the_log_likelihood_of_one_image_has_no_finite_error():
    rbm = small_rbm()
    images = torch.zeros(1, *rbm.image_shape, dtype=torch.uint8)
    row = rbm.evaluate([images], [images]).row()
    assert row["log_likelihood_error"] == row["free_energy_gap_error"] == math.inf


def test_a_diverged_model_is_not_reliable(monkeypatch):
    monkeypatch.setattr(log_z, "BRIDGE_BURN_IN_STEPS", 10)
    monkeypatch.setattr(log_z, "BRIDGE_STEPS", 10)
    for hidden in (24, 3):
        rbm = small_rbm(30, hidden)
        rbm.weight.data[:] = float("nan")
        metrics = cross_check(rbm, ais_steps=5, ais_chains=10)
        assert not metrics["reliable"]
        assert "diverged" in metrics["verdict"]


def test_bridge_sampling_is_not_biased_by_a_mode_that_gains_weight_late():
    """A ferromagnet whose independent-pixel model favors the mode that is light at beta = 1.

    Most annealed chains freeze in that mode. Replicas that start at the unweighted chains
    underestimate log Z by more than a nat, ten times the stated error.
    """
    rbm = small_rbm(60, 12, scale=0.0)
    with torch.no_grad():
        rbm.weight.fill_(0.6)
        rbm.visible_bias.fill_(-0.6 * 12 / 2 + 4 / 60)  # 4 nats for the mode with all pixels on
        rbm.hidden_bias.fill_(-0.6 * 60 / 2)
        rbm.base.fill_(-8 / 60)  # 8 nats against it
    estimates = [
        bridge(
            rbm, chains=100, burn_in=100, steps=200, generator=torch.Generator().manual_seed(seed)
        )[0]
        for seed in range(2)
    ]
    mean = sum(estimate.log_z for estimate in estimates) / 2
    error = sum(estimate.error**2 for estimate in estimates) ** 0.5 / 2
    assert error < 0.1
    assert abs(mean - exact_log_z(rbm)) < 4 * error
