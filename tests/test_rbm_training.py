"""Trained restricted Boltzmann machines: their chains, priors, and the law that they reach."""

import pytest
import torch
from enumeration import draw, law, machine

from flowgen.models.rbm.negative_phase import CD, PCD, MeanField, NegativePhase, Tempering
from flowgen.models.rbm.rbm import RBM


def trained(negative_phase: NegativePhase, steps: int = 20, **arguments: object) -> RBM:
    torch.manual_seed(1)
    rbm = RBM([1, 4, 4], 6, negative_phase=negative_phase, **arguments)
    images = (torch.rand(64, 1, 4, 4) < 0.3).to(torch.uint8)
    rbm.initialize(images)
    optimizer = torch.optim.SGD(rbm.parameters(), 0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        rbm(images).backward()
        optimizer.step()
    return rbm


@pytest.mark.parametrize(
    "phase",
    [PCD(gibbs_steps=2, chains=7), Tempering(gibbs_steps=1, chains=7, temperatures=4, adapt=True)],
)
def test_chains_survive_a_ragged_batch_and_go_on(phase):
    rbm = trained(phase, 3)
    holder, name = (phase, "hidden_units") if isinstance(phase, PCD) else (phase.ladder, "hidden")
    before = getattr(holder, name).clone()
    negative, inputs = phase(rbm, torch.zeros(3, 16), torch.zeros(3, 6))
    assert (
        negative.shape == (7, 16)
        and inputs.shape == (7, 6)
        and getattr(holder, name).shape == before.shape
    )
    assert not torch.equal(before, getattr(holder, name))
    rbm.weight.data.normal_(0, 3)
    draws = []
    for kept in (before, 1 - before):
        setattr(holder, name, kept)
        torch.manual_seed(5)
        draws.append(phase(rbm, torch.zeros(3, 16), torch.zeros(3, 6))[0])
    assert not torch.equal(*draws), "the next draw depends on the chains"


@pytest.mark.parametrize(
    "phase", [CD(gibbs_steps=1), PCD(gibbs_steps=1, chains=20), MeanField(gibbs_steps=3)]
)
def test_priors_and_only_they_act_on_the_weights(phase):
    """From the same random state the gradients of the biases are the same bits with and without them."""
    gradients = {}
    for l1, l2 in ((0.0, 0.0), (0.1, 0.0), (0.0, 0.2)):
        rbm = trained(phase, 0, l1=l1, l2=l2)
        torch.manual_seed(2)
        rbm((torch.rand(8, 1, 4, 4) < 0.3).to(torch.uint8)).backward()
        gradients[l1, l2] = [parameter.grad for parameter in rbm.parameters()]
    weight, *biases = gradients[0.0, 0.0]
    for (l1, l2), (found, *found_biases) in gradients.items():
        assert all(map(torch.equal, biases, found_biases))
        assert torch.allclose(found - weight, l1 * rbm.weight.sign() + l2 * rbm.weight, atol=1e-6)


def test_sparsity_pulls_the_hidden_units_towards_their_target():
    images = (torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.3).to(
        torch.uint8
    )
    loose = trained(CD(gibbs_steps=1), 300)
    held = trained(CD(gibbs_steps=1), 300, sparsity=1.0, activity=0.05)
    means = [rbm.encode(images).mean().item() for rbm in (loose, held)]
    assert means[1] < 0.15 < means[0]


@pytest.mark.parametrize(
    "phase",
    [
        CD(gibbs_steps=10),
        PCD(gibbs_steps=5, chains=200),
        Tempering(gibbs_steps=2, chains=100, temperatures=5, adapt=True),
    ],
)
def test_training_reaches_the_law_of_the_data(phase):
    """Four pixels with a law that three hidden units can hold: the likelihood comes within 0.05 nats of the entropy."""
    teacher = law(machine(scale=1.5))
    rbm = RBM([1, 2, 2], 4, negative_phase=phase)
    data = draw(teacher, 4000)
    rbm.initialize(data.view(-1, 1, 2, 2).to(torch.uint8))
    optimizer = torch.optim.SGD(rbm.parameters(), 0.1, momentum=0.5)
    for step in range(1500):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 1500)
        optimizer.zero_grad()
        rbm(data[torch.randint(4000, (200,))].view(-1, 1, 2, 2).to(torch.uint8)).backward()
        optimizer.step()
    divergence = (teacher * (teacher.log() - law(rbm.double()).log())).sum()
    assert divergence < 0.05
