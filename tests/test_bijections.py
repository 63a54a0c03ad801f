"""One table of bijections, four claims for each: shape, inverse, log-det against autograd, the inverse's log-det."""

import copy
import math
from collections.abc import Callable

import pytest
import torch

from flowgen.bijections.autoregressive import (
    MADE,
    Autoregressive,
    Flip,
    Invert,
    TokenAutoregressive,
    TokenHead,
    autoregressive_head,
)
from flowgen.bijections.base import Bijection, concat_condition
from flowgen.bijections.batchnorm import ActNorm, BatchNorm, update_bn
from flowgen.bijections.chain import Chain
from flowgen.bijections.continuous import CNF
from flowgen.bijections.coupling import Coupling, MaskedCoupling, channelwise, checkerboard, stripes
from flowgen.bijections.elementwise import (
    EmpiricalCDF,
    LogisticToNormal,
    Logit,
    MarginalGaussianization,
    Standardize,
)
from flowgen.bijections.linear import FusedAffine, InvertibleConv1x1, InvertibleConv1x1LU
from flowgen.bijections.networks import (
    CausalTransformer,
    ConvNetwork,
    DenseNetwork,
    GatedNetwork,
    RealNVPNetwork,
    ResNetwork,
    Transformer,
    ZeroConv2d,
)
from flowgen.bijections.reshape import FactorOut, Flatten, Permute, Roll, Squeeze
from flowgen.bijections.residual import Planar, Sylvester
from flowgen.bijections.univariate import LOG_SCALES, TRANSFORMS, Additive, Affine
from flowgen.utils.errors import UserError

IMAGE = (4, 4, 2)  # channels, height, width
DRAW = {
    "real": torch.randn,
    "wide": lambda *shape, dtype: 90 * torch.randn(*shape, dtype=dtype),
    "unit": torch.rand,
    "dark": lambda *shape, dtype: torch.rand(*shape, dtype=dtype) / 5,
}


def couple(name: str, scale: str = "bounded") -> Bijection:
    transform = TRANSFORMS[name](scale)
    return Coupling(ConvNetwork(2, 5, 2 * transform.count), transform)


def masked(name: str) -> Bijection:
    transform = TRANSFORMS[name]("bounded")
    return MaskedCoupling(
        ConvNetwork(4, 5, 4 * transform.count), transform, checkerboard(4, 4, 2, odd=True)
    )


def autoregress(name: str) -> Bijection:
    transform = TRANSFORMS[name]("bounded")
    return Autoregressive(MADE(6, 16, 2, transform.count), transform)


def tokens(
    name: str = "affine", local: bool = True, backwards: bool = False, seen: int = 0
) -> TokenAutoregressive:
    head = (autoregressive_head if local else TokenHead)(4, 8, TRANSFORMS[name]("bounded"))
    return TokenAutoregressive(
        CausalTransformer(8, 4, 8, heads=2, layers=2, seen=seen), head, backwards
    )


class Field(torch.nn.Linear):
    """v(x, t) = tanh(linear(x, t, condition))."""

    def __init__(self, size: int, seen: int = 0):
        super().__init__(size + 1 + seen, size)

    def forward(self, x, t, condition=None):
        return (
            super()
            .forward(concat_condition(torch.cat((x, t.expand(len(x), 1)), 1), condition))
            .tanh()
        )


class Given(Bijection):
    """A bijection under one condition, by default that of class 1 of 3."""

    def __init__(self, bijection: Bijection, condition: torch.Tensor | None = None):
        super().__init__()
        self.bijection = bijection
        self.register_buffer("condition", torch.eye(3)[1:2] if condition is None else condition)

    def _of(self, x: torch.Tensor) -> torch.Tensor:
        return self.condition.expand(len(x), *self.condition.shape[1:])

    def forward(self, x, condition=None):
        return self.bijection(x, self._of(x) if condition is None else condition)

    def inverse(self, z, condition=None):
        return self.bijection.inverse(z, self._of(z) if condition is None else condition)

    def initialize(self, x, condition=None):
        return self.bijection.initialize(x, self._of(x))


TABLE: dict[
    str,
    tuple[Callable[[], Bijection], tuple[int, ...]]
    | tuple[Callable[[], Bijection], tuple[int, ...], str],
] = {
    "squeeze": (Squeeze, IMAGE),
    "squeeze by 3": (lambda: Squeeze(3), (2, 3, 6)),
    "permute": (lambda: Permute(4), IMAGE),
    "roll": (lambda: Roll(1), IMAGE),
    "flatten": (lambda: Flatten(*IMAGE), IMAGE),
    "actnorm": (lambda: ActNorm(4), IMAGE),
    "actnorm of vectors": (lambda: ActNorm(6), (6,)),
    "plain 1x1": (lambda: InvertibleConv1x1(4), IMAGE),
    "plu 1x1": (lambda: InvertibleConv1x1LU(4), IMAGE),
    "folded": (lambda: FusedAffine(ActNorm(4), InvertibleConv1x1LU(4)), IMAGE),
    **{name: (lambda name=name: couple(name), IMAGE) for name in TRANSFORMS},
    **{
        f"affine {scale}": (lambda scale=scale: couple("affine", scale), IMAGE)
        for scale in LOG_SCALES
    },
    "resnet": (lambda: Coupling(ResNetwork(2, 5, 4, blocks=2), Affine()), IMAGE),
    "gated": (lambda: Coupling(GatedNetwork(2, 5, 4, blocks=2), Affine()), IMAGE),
    "transformer": (lambda: Coupling(Transformer(8, 2, 8, 4, heads=2, layers=2), Affine()), IMAGE),
    "transformer of some tokens": (
        lambda: MaskedCoupling(
            Transformer(8, 4, 8, 8, heads=2, layers=1), Affine(), stripes(4, 4, 2, odd=True)
        ),
        IMAGE,
    ),
    "odd channels": (lambda: Coupling(ConvNetwork(2, 5, 6), Affine()), (5, 2, 2)),
    **{f"masked {name}": (lambda name=name: masked(name), IMAGE) for name in TRANSFORMS},
    "real nvp": (
        lambda: MaskedCoupling(
            RealNVPNetwork(4, 5, 8, blocks=1), Affine("plain"), channelwise(4, 4, 2, second=True)
        ),
        IMAGE,
    ),
    "dense": (lambda: Coupling(DenseNetwork(3, 8, 3, layers=2), Additive()), (6,)),
    **{
        f"autoregressive {name}": (lambda name=name: autoregress(name), (6,)) for name in TRANSFORMS
    },
    **{f"tokens {name}": (lambda name=name: tokens(name), IMAGE) for name in TRANSFORMS},
    "tokens backwards": (lambda: tokens(backwards=True), IMAGE),
    "tokens of independent numbers": (lambda: tokens(local=False), IMAGE),
    "inverse autoregressive": (lambda: Invert(autoregress("affine")), (6,)),
    "reverse": (Flip, IMAGE),
    "batch norm": (lambda: BatchNorm(4), IMAGE),
    "batch norm of vectors": (lambda: BatchNorm(6), (6,)),
    "logistic to normal": (LogisticToNormal, IMAGE),
    "logistic to normal, far out": (LogisticToNormal, IMAGE, "wide"),
    "factor out": (lambda: FactorOut(Flatten(2, 4, 2)), IMAGE),
    "factor out, predicted": (lambda: FactorOut(Flatten(2, 4, 2), ZeroConv2d(2, 4, 3)), IMAGE),
    "logit": (lambda: Logit(0.05), IMAGE, "unit"),
    "equalize": (lambda: EmpiricalCDF(4, 32), IMAGE, "unit"),
    "gaussianize": (lambda: MarginalGaussianization(4, 4), IMAGE, "dark"),
    "standardize": (lambda: Standardize(6), (6,)),
    "standardize, not learnt": (lambda: Standardize(6, learnt=False), (6,)),
    "continuous": (lambda: CNF(Field(4), 1e-10, exact=4), (4,)),
    "planar": (lambda: Planar(6), (6,)),
    "sylvester": (lambda: Sylvester(6, 3), (6,)),
    "sylvester of all directions": (lambda: Sylvester(6, 6), (6,)),
    "coupling, given a class": (lambda: Given(Coupling(ConvNetwork(2 + 3, 5, 4), Affine())), IMAGE),
    "transformer, given a class": (
        lambda: Given(Coupling(Transformer(8, 2 + 3, 8, 4, heads=2, layers=1), Affine())),
        IMAGE,
    ),
    "coupling of vectors, given a class": (
        lambda: Given(Coupling(DenseNetwork(3 + 3, 8, 3, layers=2), Additive())),
        (6,),
    ),
    "masked coupling, given an image": (
        lambda: Given(
            MaskedCoupling(ConvNetwork(4 + 2, 5, 8), Affine(), checkerboard(4, 4, 2, odd=True)),
            torch.randn(1, 2, 4, 2),
        ),
        IMAGE,
    ),
    "autoregressive, given a class": (
        lambda: Given(Autoregressive(MADE(6, 16, 2, 2, seen_by_all=3), Affine())),
        (6,),
    ),
    "tokens, given a class": (lambda: Given(tokens(seen=3)), IMAGE),
    "tokens, given an image": (lambda: Given(tokens(seen=2), torch.randn(1, 2, 4, 2)), IMAGE),
    "inverse, given a class": (
        lambda: Given(Invert(Autoregressive(MADE(6, 16, 2, 2, seen_by_all=3), Affine()))),
        (6,),
    ),
    "factor out, given a class": (
        lambda: Given(FactorOut(Flatten(2, 4, 2), ZeroConv2d(2 + 3, 4, 3))),
        IMAGE,
    ),
    "continuous, given a class": (lambda: Given(CNF(Field(4, seen=3), 1e-10, exact=4)), (4,)),
    "chain, given a class": (
        lambda: Given(
            Chain(
                Squeeze(),
                FactorOut(Chain(Coupling(ConvNetwork(4 + 3, 5, 8), Affine()), Flatten(8, 2, 1))),
            )
        ),
        IMAGE,
    ),
    "chain": (lambda: Chain(Squeeze(), ActNorm(16), FactorOut(Flatten(8, 2, 1))), IMAGE),
}


def make(name: str) -> tuple[Bijection, torch.Tensor]:
    """The bijection in float64, started from a batch and then pushed off that start, and another batch."""
    constructor, shape, *kind = TABLE[name]
    draw = DRAW[kind[0] if kind else "real"]
    bijection = constructor().double()
    bijection.initialize(draw(64, *shape, dtype=torch.float64))
    with torch.no_grad():
        for parameter in bijection.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return bijection.eval(), draw(3, *shape, dtype=torch.float64)


@pytest.fixture(params=TABLE)
def case(request: pytest.FixtureRequest) -> tuple[Bijection, torch.Tensor]:
    return make(request.param)


def test_shapes(case):
    bijection, x = case
    z, log_det = bijection(x)
    assert z.shape[0] == len(x) and z[0].numel() == x[0].numel()
    assert log_det.shape == (len(x),)


def test_inverse_returns_the_input(case):
    bijection, x = case
    z, _ = bijection(x)
    assert (bijection.inverse(z)[0] - x).abs().max() < 1e-9


def test_log_det_is_that_of_the_jacobian(case):
    bijection, x = case
    for row, log_det in zip(x, bijection(x)[1], strict=True):
        jacobian = torch.autograd.functional.jacobian(
            lambda row: bijection(row[None])[0].flatten(), row
        )
        expected = torch.linalg.slogdet(jacobian.reshape(row.numel(), row.numel())).logabsdet
        assert abs(log_det - expected) < 1e-9


def test_log_det_of_the_inverse_is_the_negative(case):
    bijection, x = case
    z, log_det = bijection(x)
    assert (bijection.inverse(z)[1] + log_det).abs().max() < 1e-9


def test_initialize_hands_on_the_output(case):
    bijection, x = case
    output = bijection.initialize(x)
    assert torch.allclose(output, bijection(x)[0], atol=1e-12)


@pytest.mark.parametrize("name", [name for name in TABLE if "given" in name])
def test_the_condition_decides(name):
    bijection, x = make(name)
    other = bijection.condition.roll(1, 1).expand(len(x), *bijection.condition.shape[1:])
    assert (bijection(x, other)[0] - bijection(x)[0]).abs().flatten(1).amax(1).min() > 1e-3


def test_actnorm_starts_with_zero_mean_and_unit_variance():
    output = ActNorm(3).double().initialize(5 + 7 * torch.randn(50, 3, 4, 4, dtype=torch.float64))
    deviation, mean = torch.std_mean(output, dim=(0, 2, 3))
    assert torch.allclose(mean, torch.zeros_like(mean), atol=1e-12) and torch.allclose(
        deviation, torch.ones_like(deviation)
    )


def test_a_constant_channel_does_not_blow_up_the_start():
    assert torch.isfinite(ActNorm(2).initialize(torch.zeros(8, 2, 4, 4))).all()


@pytest.mark.parametrize("convolution", [InvertibleConv1x1, InvertibleConv1x1LU])
def test_1x1_starts_as_a_rotation_that_decorrelates(convolution):
    bijection = convolution(4).double()
    mixed = torch.einsum(
        "ij,bjhw->bihw",
        torch.randn(4, 4, dtype=torch.float64),
        torch.randn(50, 4, 4, 4, dtype=torch.float64),
    )
    for _ in range(2):  # at random, then from data
        matrix, _, log_det = bijection.affine()
        assert (
            torch.allclose(matrix @ matrix.T, torch.eye(4, dtype=torch.float64), atol=1e-6)
            and abs(log_det) < 1e-6
        )
        output = bijection.initialize(mixed)
    covariance = torch.cov(output.transpose(0, 1).flatten(1))
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-6 * covariance.max()


def test_equalize_makes_levels_about_uniform_at_the_entropy_of_the_pixels():
    share = torch.tensor([0.7, 0.1, 0.1, 0.1], dtype=torch.float64)
    images = torch.multinomial(share, 100_000, replacement=True).view(1000, 1, 10, 10)
    x = (images + torch.rand(images.shape, dtype=torch.float64)) / 4
    bijection = EmpiricalCDF(1, 4).double()
    y = bijection.initialize(x)
    assert y.min() >= 0 and y.max() <= 1
    bits = 2 - bijection(x)[1].mean() / (
        100 * math.log(2)
    )  # under the uniform law y costs nothing more
    entropy = -(share * share.log2()).sum()
    assert (
        entropy <= bits + 0.01 and bits < entropy + 0.03
    )  # a tenth of the uniform law is mixed in


def test_gaussianize_starts_where_it_pays_and_is_the_identity_elsewhere():
    mostly_black = torch.rand(64, 1, 8, 8) * (1 + 31 * (torch.rand(64, 1, 8, 8) < 0.1)) / 32
    even = torch.rand(64, 1, 8, 8)
    bijection = MarginalGaussianization(1, 32)
    bijection.initialize(even)
    assert torch.equal(bijection(even)[0], even) and not bijection(even)[1].any()
    bijection.initialize(mostly_black)
    z, log_det = bijection(mostly_black)
    assert (
        log_det.mean() > 64 * math.log(2)
        and (bijection.inverse(z)[0] - mostly_black).abs().max() < 1e-4
    )


def test_couplings_start_as_the_identity():
    coupling, x = Coupling(ConvNetwork(2, 8, 4), Affine()), torch.randn(8, 4, 4, 4)
    assert torch.equal(coupling.initialize(x), x)


@pytest.mark.parametrize("scale", ["bounded", "tanh"])
def test_bounded_log_scales_cannot_run_away(scale):
    raw = torch.tensor([-1e9, -1.0, 0.0, 1.0, 1e9])
    log_scale = LOG_SCALES[scale](raw)
    assert log_scale.abs().max() <= 2 and (log_scale.diff() > 0).all() and log_scale[2] == 0


def test_sigmoid_log_scale_stays_finite_with_its_gradient():
    raw = torch.tensor([-1e3, 0.0, 1e3], requires_grad=True)
    log_scale = LOG_SCALES["sigmoid"](raw)
    log_scale.sum().backward()
    assert torch.isfinite(log_scale).all() and torch.isfinite(raw.grad).all()


def test_squeeze_keeps_each_block_of_four_together():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert Squeeze()(x)[0][0, :, 0, 1].tolist() == [2, 3, 6, 7]


@pytest.mark.parametrize("name", ["planar", "sylvester"])
@pytest.mark.parametrize("push", [-100.0, 100.0])
def test_residual_layers_invert_however_far_their_parameters_are_pushed(name, push):
    bijection, x = make(name)
    with torch.no_grad():
        if name == "planar":
            bijection.push.copy_(
                push * bijection.direction
            )  # for -100 the layer would turn back along its direction, were it let
        else:
            bijection.outer.fill_(push)
    z, log_det = bijection(x)
    assert (bijection.inverse(z)[0] - x).abs().max() < 1e-9 and torch.isfinite(log_det).all()


def test_only_networks_run_in_bfloat16():
    flow = Chain(
        FusedAffine(ActNorm(4), InvertibleConv1x1LU(4)), Coupling(ConvNetwork(2, 8, 4), Affine())
    )
    layers = Chain(Planar(6), Sylvester(6, 3))
    for parameter in layers.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    dtypes = []
    flow.bijections[1].network.register_forward_hook(
        lambda module, inputs, output: dtypes.append(output.dtype)
    )
    x = torch.randn(4, 4, 4, 4)
    split = FactorOut(Flatten(2, 4, 4), ZeroConv2d(2, 4, 3))
    torch.nn.init.normal_(split.network.weight)
    with torch.autocast("cpu", torch.bfloat16):
        z, log_det = flow(x)
        assert (
            torch.equal(split(x)[0], split.float()(x)[0].float())
            and split.network(x[:, :2]).dtype == torch.bfloat16
        )
        folded = flow.bijections[0](x)[0]
        bent = layers(x[:, 0, 0, :3].repeat(1, 2))[0]
    assert dtypes == [torch.bfloat16] and z.dtype == log_det.dtype == torch.float32
    assert torch.equal(folded, flow.bijections[0](x)[0]) and torch.equal(
        bent, layers(x[:, 0, 0, :3].repeat(1, 2))[0]
    )


@pytest.mark.parametrize("name", TRANSFORMS)
def test_gradients_flow_through_the_inverse_of_a_transform(name):
    transform = TRANSFORMS[name]("bounded")
    y = torch.randn(2, 1, 2, dtype=torch.float64, requires_grad=True)
    parameters = (0.3 * torch.randn(2, transform.count, 2, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(transform.inverse, (y, parameters))


def test_made_sees_every_number_before_and_none_after_however_narrow_it_is():
    size = 40
    network = MADE(size, 10, 2, 2)
    torch.nn.init.normal_(network.last.weight)
    torch.nn.init.constant_(network.first.bias, 5.0)
    x = torch.rand(1, size, requires_grad=True)
    for t in range(size):
        (slope,) = torch.autograd.grad(
            network(x).unflatten(1, (2, size))[0, :, t].square().sum(), x
        )
        assert not slope[0, t:].any()
    seen = slope[0, : size - 1] != 0  # by the last number, through a tenth as many units
    assert seen[0] and seen[-1] and seen.float().mean() > 0.9


def test_made_shows_the_condition_to_every_number():
    network = MADE(4, 10, 2, 2, seen_by_all=3)
    torch.nn.init.normal_(network.last.weight)
    torch.nn.init.constant_(network.first.bias, 5.0)
    x = torch.rand(1, 7, requires_grad=True)
    for t in range(4):
        (slope,) = torch.autograd.grad(network(x).unflatten(1, (2, 4))[0, :, t].square().sum(), x)
        assert slope[0, 4:].all() and not slope[0, t:4].any()


def test_normal_tail_of_the_logistic_is_finite_in_float32():
    x = torch.tensor([[-1e4, -91.0, -80.0, 0.0, 79.9, 91.0, 1e4]])
    z, log_det = LogisticToNormal()(x)
    assert torch.isfinite(z).all() and torch.isfinite(log_det).all() and (z.diff() > 0).all()


def test_batch_normalisation_of_one_number_a_channel_says_what_to_do():
    for module in (RealNVPNetwork(2, 4, 4, blocks=1), BatchNorm(2)):
        with pytest.raises(UserError, match="batch_size"):
            module.train()(torch.rand(1, 2, 1, 1))


def test_gradients_of_a_dilated_convolution_are_finite_in_bfloat16():
    """As the trainer runs it: channels-last, on images large enough for the kernel that fails."""
    network = GatedNetwork(6, 24, 12, blocks=3).to(memory_format=torch.channels_last)
    x = torch.randn(12, 6, 32, 32).to(memory_format=torch.channels_last)
    network.initialize(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.nn.init.normal_(network.layers[-1].weight)
        network(x).float().square().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in network.parameters())


def test_estimated_statistics_are_the_means_over_the_batches_at_weights_that_stand_still():
    """Each of several layers sees what the one before it gives in training; torch's own layers get what torch gives them."""
    batches = [(3 * torch.randn(5, 4, 2, 2) + number,) for number in range(7)]
    chain = Chain(BatchNorm(4), BatchNorm(4)).eval()
    update_bn(chain, batches)
    numbers = torch.stack([x.transpose(0, 1).flatten(1) for (x,) in batches])
    first, second = chain.bijections
    assert torch.allclose(first.mean, numbers.mean((0, 2)), atol=1e-6) and torch.allclose(
        first.variance, numbers.var(2).mean(0)
    )
    assert torch.allclose(second.mean, torch.zeros(4), atol=1e-6) and torch.allclose(
        second.variance, torch.full((4,), 20 / 19), atol=1e-4
    )
    assert not first.training and first.momentum == 0.1

    network = RealNVPNetwork(4, 8, 8, blocks=1)
    twin = copy.deepcopy(network)
    update_bn(network, batches)
    torch.optim.swa_utils.update_bn(batches, twin)
    assert all(
        torch.equal(one, other)
        for one, other in zip(network.buffers(), twin.buffers(), strict=True)
    )
    update_bn(ActNorm(4), None)  # where there is nothing to estimate no batch is drawn
