"""Training of RBMs: persistent chains, penalties, and the distribution that training reaches."""

import pytest
import torch
from enumeration import draw_states, exact_distribution, small_rbm
from torch import Tensor

from flowgen.models.rbm.negative_phase import CD, PCD, MeanField, NegativePhase, Tempering
from flowgen.models.rbm.rbm import RBM


def random_images(generator: torch.Generator | None = None) -> Tensor:
    return (torch.rand(64, 1, 4, 4, generator=generator) < 0.3).to(torch.uint8)


def train_rbm(negative_phase: NegativePhase, steps: int = 20, **arguments: object) -> RBM:
    torch.manual_seed(1)
    rbm = RBM([1, 4, 4], 6, negative_phase=negative_phase, **arguments)
    images = random_images()
    rbm.initialize(images)
    optimizer = torch.optim.SGD(rbm.parameters(), 0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        rbm(images).backward()
        optimizer.step()
    return rbm


@pytest.mark.parametrize(
    "phase",
    [
        PCD(gibbs_steps=2, num_chains=7),
        Tempering(gibbs_steps=1, num_chains=7, num_temperatures=4, adapt=True),
    ],
)
def test_chains_persist_and_do_not_depend_on_the_batch_size(phase):
    rbm = train_rbm(phase, 3)
    if isinstance(phase, PCD):
        module, name = phase, "hidden_units"
    else:
        module, name = phase.replicas, "hidden"
    before = getattr(module, name).clone()
    negative, inputs = phase(rbm, torch.zeros(3, 16), torch.zeros(3, 6))
    assert negative.shape == (7, 16)
    assert inputs.shape == (7, 6)
    assert getattr(module, name).shape == before.shape
    assert not torch.equal(before, getattr(module, name))
    rbm.weight.data.normal_(0, 3)
    negatives = []
    for chains in (before, 1 - before):
        setattr(module, name, chains)
        torch.manual_seed(5)
        negatives.append(phase(rbm, torch.zeros(3, 16), torch.zeros(3, 6))[0])
    assert not torch.equal(*negatives), "the next draw must depend on the chains"


@pytest.mark.parametrize(
    "phase", [CD(gibbs_steps=1), PCD(gibbs_steps=1, num_chains=20), MeanField(gibbs_steps=3)]
)
def test_weight_penalties_change_only_the_gradient_of_the_weights(phase):
    """With the same random state the gradients of the biases are bit-identical."""
    gradients = {}
    for l1, l2 in ((0.0, 0.0), (0.1, 0.0), (0.0, 0.2)):
        rbm = train_rbm(phase, 0, l1=l1, l2=l2)
        torch.manual_seed(2)
        rbm((torch.rand(8, 1, 4, 4) < 0.3).to(torch.uint8)).backward()
        gradients[l1, l2] = [parameter.grad for parameter in rbm.parameters()]
    plain_weight, *plain_biases = gradients[0.0, 0.0]
    for (l1, l2), (weight, *biases) in gradients.items():
        assert all(map(torch.equal, plain_biases, biases))
        penalty = l1 * rbm.weight.sign() + l2 * rbm.weight
        assert torch.allclose(weight - plain_weight, penalty, atol=1e-6)


def test_sparsity_pulls_the_hidden_units_to_their_target():
    images = random_images(torch.Generator().manual_seed(0))
    plain = train_rbm(CD(gibbs_steps=1), 300)
    sparse = train_rbm(CD(gibbs_steps=1), 300, sparsity_cost=1.0, sparsity_target=0.05)
    assert sparse.encode(images).mean() < 0.15 < plain.encode(images).mean()


@pytest.mark.parametrize(
    "phase",
    [
        CD(gibbs_steps=10),
        PCD(gibbs_steps=5, num_chains=200),
        Tempering(gibbs_steps=2, num_chains=100, num_temperatures=5, adapt=True),
    ],
)
def test_training_reaches_the_distribution_of_the_data(phase):
    """Four pixels, drawn from an RBM with three hidden units: KL is below 0.05 nats at the end."""
    target = exact_distribution(small_rbm(scale=1.5))
    rbm = RBM([1, 2, 2], 4, negative_phase=phase)
    data = draw_states(target, 4000)
    rbm.initialize(data.view(-1, 1, 2, 2).to(torch.uint8))
    optimizer = torch.optim.SGD(rbm.parameters(), 0.1, momentum=0.5)
    for step in range(1500):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 1500)
        optimizer.zero_grad()
        rbm(data[torch.randint(4000, (200,))].view(-1, 1, 2, 2).to(torch.uint8)).backward()
        optimizer.step()
    kl = (target * (target.log() - exact_distribution(rbm.double()).log())).sum()
    assert kl < 0.05
