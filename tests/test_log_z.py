"""Estimates of log Z, held to exact enumeration, and what is said of them."""

import torch
from enumeration import CHAINS, draw, law, machine

from flowgen.models.base import EvalConfig
from flowgen.models.rbm import log_z as likelihood
from flowgen.models.rbm.log_z import (
    ais,
    bridge,
    estimate_log_z,
    exact_log_z,
    log_likelihood,
    reverse_ais,
    run_pilot,
)
from flowgen.models.rbm.rbm import RBM
from flowgen.models.rbm.sampling import white_noise


def test_forward_and_reverse_ais_straddle_the_exact_value():
    """Short runs err on either side, long ones agree within their errors; so does bridge sampling."""
    rbm = machine(10, 8, scale=2.0)
    exact = exact_log_z(rbm)
    samples = draw(law(rbm), 400)
    short_forward = torch.tensor([ais(rbm, betas=5, chains=5).log_z for _ in range(60)])
    short_reverse = torch.tensor(
        [reverse_ais(rbm, draw(law(rbm), 5), betas=5).log_z for _ in range(60)]
    )
    assert short_forward.mean() < exact - 0.3 and short_reverse.mean() > exact + 0.3
    by_bridge, _ = bridge(rbm, temperatures=8, chains=100, burn_in=300, sweeps=400)
    for estimate in (
        ais(rbm, betas=1000, chains=400),
        reverse_ais(rbm, samples, betas=1000),
        by_bridge,
    ):
        assert 0 < estimate.error < 0.1 and abs(estimate.log_z - exact) < 4 * estimate.error
        assert estimate.effective_sample_size > 10


def test_importance_weights_are_unbiased_however_short_the_annealing():
    rbm = machine(scale=0.7)
    exact = exact_log_z(rbm)
    for estimate in (ais(rbm, betas=3, chains=CHAINS), reverse_ais(rbm, draw(law(rbm)), betas=3)):
        assert estimate.error < 0.02 and abs(estimate.log_z - exact) < 4 * estimate.error


def test_betas_may_stand_anywhere_on_the_way():
    rbm = machine(scale=0.7)
    exact, betas = exact_log_z(rbm), [0.0, 0.1, 0.75, 1.0]
    for estimate in (
        ais(rbm, betas=betas, chains=CHAINS),
        reverse_ais(rbm, draw(law(rbm)), betas=betas),
    ):
        assert estimate.error < 0.02 and abs(estimate.log_z - exact) < 4 * estimate.error


def test_a_scout_puts_betas_where_annealing_errs():
    """Independent pixels that freeze early: dF/dbeta has deviation 6 sech(6 beta) a pixel, so equal steps err 1.5 times as far at least."""
    rbm = machine(30, 4, scale=0.0)
    rbm.visible_bias.data[:] = 12.0
    found = run_pilot(rbm, 400)
    where = found.betas[:-1] + found.betas.diff() / 2
    for lengths in (found.barrier, found.friction):
        assert torch.allclose(lengths / lengths.max(), 1 / torch.cosh(6 * where), atol=0.2)
    equal, spaced = (ais(rbm, betas=betas, chains=4000).error for betas in (100, found.way(100)))
    assert equal > 1.4 * spaced


def test_errors_of_the_estimates_are_their_spread():
    rbm = machine(8, 6, scale=1.5)
    for estimates in (
        [ais(rbm, betas=100, chains=100) for _ in range(40)],
        [bridge(rbm, temperatures=4, chains=20, burn_in=100, sweeps=50)[0] for _ in range(40)],
    ):
        spread = torch.tensor([estimate.log_z for estimate in estimates]).std().item()
        stated = torch.tensor([estimate.error for estimate in estimates]).mean().item()
        assert 0.6 < spread / stated < 1.6


def judged(rbm: RBM, betas: int, chains: int) -> dict[str, object]:
    how = EvalConfig(thorough=True, betas=betas, chains=chains)
    log_z = estimate_log_z(rbm, how, torch.Generator().manual_seed(0))
    return log_likelihood(rbm.free_energy(white_noise(rbm, 50)).detach(), log_z).row()


def test_the_sandwich_says_whether_it_may_be_quoted(monkeypatch):
    monkeypatch.setattr(likelihood, "LADDER", {"burn_in": 200, "sweeps": 200})
    figures = judged(machine(30, 24, scale=0.3), betas=300, chains=100)
    assert figures["reliable"] and figures["verdict"].startswith("reliable")
    assert (
        figures["log_likelihood_forward"] + 1
        > figures["log_likelihood"]
        > figures["log_likelihood_reverse"] - 1
    )
    figures = judged(machine(30, 24, scale=6.0), betas=2, chains=100)
    assert not figures["reliable"] and figures["verdict"].startswith("do not quote")


def test_a_machine_that_diverged_is_not_quotable(monkeypatch):
    monkeypatch.setattr(likelihood, "LADDER", {"burn_in": 10, "sweeps": 10})
    for hidden in (24, 3):
        rbm = machine(30, hidden)
        rbm.weight.data[:] = float("nan")
        figures = judged(rbm, betas=5, chains=10)
        assert not figures["reliable"] and "diverged" in figures["verdict"]
