"""Tests of all bijections: shape, inverse, log-det against autograd, and log-det of the inverse."""

import copy
import math
import pkgutil
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from flowgen import bijections
from flowgen.bijections.amortized import Amortized
from flowgen.bijections.autoregressive import (
    MADE,
    Autoregressive,
    TokenAutoregressive,
    TokenHead,
    autoregressive_head,
)
from flowgen.bijections.base import Bijection, Chain, Flip, Invert, concat_condition
from flowgen.bijections.continuous import CNF
from flowgen.bijections.coupling import Coupling, MaskedCoupling, channelwise, checkerboard, stripes
from flowgen.bijections.elementwise import (
    EmpiricalCDF,
    LogisticToNormal,
    Logit,
    MarginalGaussianization,
    Standardize,
)
from flowgen.bijections.linear import (
    ActNorm,
    BatchNorm,
    FusedAffine,
    InvertibleConv1x1,
    InvertibleConv1x1LU,
    update_bn,
)
from flowgen.bijections.networks import (
    CausalTransformer,
    ConvNetwork,
    DenseNetwork,
    Dropout,
    GatedNetwork,
    NormalizedConv2d,
    RandomSource,
    RealNVPNetwork,
    ResNetwork,
    Transformer,
    ZeroConv2d,
)
from flowgen.bijections.reshape import FactorOut, Flatten, Permute, Roll, Squeeze
from flowgen.bijections.residual import Planar, Sylvester
from flowgen.bijections.univariate import LOG_SCALES, TRANSFORMS, Additive, Affine

IMAGE = (4, 4, 2)  # channels, height, width
SAMPLERS = {
    "real": torch.randn,
    "wide": lambda *shape, dtype: 90 * torch.randn(*shape, dtype=dtype),
    "unit": torch.rand,
    "dark": lambda *shape, dtype: torch.rand(*shape, dtype=dtype) / 5,
}


def couple(name: str, scale: str = "bounded") -> Bijection:
    transform = TRANSFORMS[name](scale)
    return Coupling(ConvNetwork(2, 5, 2 * transform.num_params), transform)


def masked(name: str) -> Bijection:
    transform = TRANSFORMS[name]("bounded")
    return MaskedCoupling(
        ConvNetwork(4, 5, 4 * transform.num_params), transform, checkerboard(4, 4, 2, odd=True)
    )


def autoregress(name: str) -> Bijection:
    transform = TRANSFORMS[name]("bounded")
    return Autoregressive(MADE(6, 16, 2, transform.num_params), transform)


def tokens(
    name: str = "affine", local: bool = True, reverse: bool = False, cond_channels: int = 0
) -> TokenAutoregressive:
    head = (autoregressive_head if local else TokenHead)(4, 8, TRANSFORMS[name]("bounded"))
    network = CausalTransformer(8, 4, 8, num_heads=2, num_layers=2, cond_channels=cond_channels)
    return TokenAutoregressive(network, head, reverse)


class VectorField(torch.nn.Linear):
    """v(x, t) = tanh(linear(x, t, condition))."""

    def __init__(self, dim: int, cond_channels: int = 0):
        super().__init__(dim + 1 + cond_channels, dim)

    def forward(self, x, t, condition=None):
        x = torch.cat((x, t.expand(len(x), 1)), 1)
        return super().forward(concat_condition(x, condition)).tanh()


class Conditioned(Bijection):
    """A bijection with a fixed condition, by default class 1 of 3."""

    def __init__(self, bijection: Bijection, condition: torch.Tensor | None = None):
        super().__init__()
        self.bijection = bijection
        self.register_buffer("condition", torch.eye(3)[1:2] if condition is None else condition)

    def _expand(self, x: torch.Tensor) -> torch.Tensor:
        return self.condition.expand(len(x), *self.condition.shape[1:])

    def forward(self, x, condition=None):
        return self.bijection(x, self._expand(x) if condition is None else condition)

    def inverse(self, z, condition=None):
        return self.bijection.inverse(z, self._expand(z) if condition is None else condition)

    def initialize(self, x, condition=None):
        return self.bijection.initialize(x, self._expand(x))


TABLE: dict[
    str,
    tuple[Callable[[], Bijection], tuple[int, ...]]
    | tuple[Callable[[], Bijection], tuple[int, ...], str],
] = {
    "squeeze": (Squeeze, IMAGE),
    "squeeze by factor 3": (lambda: Squeeze(3), (2, 3, 6)),
    "permute": (lambda: Permute(4), IMAGE),
    "roll": (lambda: Roll(1), IMAGE),
    "flatten": (lambda: Flatten(*IMAGE), IMAGE),
    "actnorm": (lambda: ActNorm(4), IMAGE),
    "actnorm of vectors": (lambda: ActNorm(6), (6,)),
    "plain 1x1": (lambda: InvertibleConv1x1(4), IMAGE),
    "plu 1x1": (lambda: InvertibleConv1x1LU(4), IMAGE),
    "fused affine": (lambda: FusedAffine(ActNorm(4), InvertibleConv1x1LU(4)), IMAGE),
    **{name: (lambda name=name: couple(name), IMAGE) for name in TRANSFORMS},
    **{
        f"affine {scale}": (lambda scale=scale: couple("affine", scale), IMAGE)
        for scale in LOG_SCALES
    },
    "resnet": (lambda: Coupling(ResNetwork(2, 5, 4, num_blocks=2), Affine()), IMAGE),
    "gated": (lambda: Coupling(GatedNetwork(2, 5, 4, num_blocks=2), Affine()), IMAGE),
    "transformer": (
        lambda: Coupling(Transformer(8, 2, 8, 4, num_heads=2, num_layers=2), Affine()),
        IMAGE,
    ),
    "masked transformer": (
        lambda: MaskedCoupling(
            Transformer(8, 4, 8, 8, num_heads=2, num_layers=1), Affine(), stripes(4, 4, 2, odd=True)
        ),
        IMAGE,
    ),
    "odd channels": (lambda: Coupling(ConvNetwork(2, 5, 6), Affine()), (5, 2, 2)),
    **{f"masked {name}": (lambda name=name: masked(name), IMAGE) for name in TRANSFORMS},
    "real nvp": (
        lambda: MaskedCoupling(
            RealNVPNetwork(4, 5, 8, num_blocks=1),
            Affine("plain"),
            channelwise(4, 4, 2, second=True),
        ),
        IMAGE,
    ),
    "dense": (lambda: Coupling(DenseNetwork(3, 8, 3, num_layers=2), Additive()), (6,)),
    **{
        f"autoregressive {name}": (lambda name=name: autoregress(name), (6,)) for name in TRANSFORMS
    },
    **{f"tokens {name}": (lambda name=name: tokens(name), IMAGE) for name in TRANSFORMS},
    "tokens in reverse order": (lambda: tokens(reverse=True), IMAGE),
    "tokens of independent values": (lambda: tokens(local=False), IMAGE),
    "inverse autoregressive": (lambda: Invert(autoregress("affine")), (6,)),
    "flip": (Flip, IMAGE),
    "batch norm": (lambda: BatchNorm(4), IMAGE),
    "batch norm of vectors": (lambda: BatchNorm(6), (6,)),
    "logistic to normal": (LogisticToNormal, IMAGE),
    "logistic to normal, tails": (LogisticToNormal, IMAGE, "wide"),
    "factor out": (lambda: FactorOut(Flatten(2, 4, 2)), IMAGE),
    "factor out, predicted": (lambda: FactorOut(Flatten(2, 4, 2), ZeroConv2d(2, 4, 3)), IMAGE),
    "logit": (lambda: Logit(0.05), IMAGE, "unit"),
    "empirical CDF": (lambda: EmpiricalCDF(4, 32), IMAGE, "unit"),
    "marginal gaussianization": (lambda: MarginalGaussianization(4, 4), IMAGE, "dark"),
    "standardize": (lambda: Standardize(6), (6,)),
    "standardize, not learned": (lambda: Standardize(6, learned=False), (6,)),
    "continuous": (lambda: CNF(VectorField(4), 1e-10, exact_trace_dims=4), (4,)),
    "planar": (lambda: Planar(6), (6,)),
    "sylvester": (lambda: Sylvester(6, 3), (6,)),
    "sylvester of full width": (lambda: Sylvester(6, 6), (6,)),
    "planar, amortized": (lambda: Conditioned(Amortized(Planar(6), 3)), (6,)),
    "sylvester, amortized": (lambda: Conditioned(Amortized(Sylvester(6, 3), 3)), (6,)),
    "coupling conditioned on a class": (
        lambda: Conditioned(Coupling(ConvNetwork(2 + 3, 5, 4), Affine())),
        IMAGE,
    ),
    "transformer conditioned on a class": (
        lambda: Conditioned(
            Coupling(Transformer(8, 2 + 3, 8, 4, num_heads=2, num_layers=1), Affine())
        ),
        IMAGE,
    ),
    "coupling of vectors conditioned on a class": (
        lambda: Conditioned(Coupling(DenseNetwork(3 + 3, 8, 3, num_layers=2), Additive())),
        (6,),
    ),
    "masked coupling conditioned on an image": (
        lambda: Conditioned(
            MaskedCoupling(ConvNetwork(4 + 2, 5, 8), Affine(), checkerboard(4, 4, 2, odd=True)),
            torch.randn(1, 2, 4, 2),
        ),
        IMAGE,
    ),
    "autoregressive conditioned on a class": (
        lambda: Conditioned(Autoregressive(MADE(6, 16, 2, 2, cond_channels=3), Affine())),
        (6,),
    ),
    "tokens conditioned on a class": (lambda: Conditioned(tokens(cond_channels=3)), IMAGE),
    "tokens conditioned on an image": (
        lambda: Conditioned(tokens(cond_channels=2), torch.randn(1, 2, 4, 2)),
        IMAGE,
    ),
    "inverse conditioned on a class": (
        lambda: Conditioned(Invert(Autoregressive(MADE(6, 16, 2, 2, cond_channels=3), Affine()))),
        (6,),
    ),
    "factor out conditioned on a class": (
        lambda: Conditioned(FactorOut(Flatten(2, 4, 2), ZeroConv2d(2 + 3, 4, 3))),
        IMAGE,
    ),
    "continuous conditioned on a class": (
        lambda: Conditioned(CNF(VectorField(4, cond_channels=3), 1e-10, exact_trace_dims=4)),
        (4,),
    ),
    "chain conditioned on a class": (
        lambda: Conditioned(
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
    """Return an initialized bijection in float64 with perturbed parameters, and a batch."""
    constructor, shape, *kind = TABLE[name]
    sample = SAMPLERS[kind[0] if kind else "real"]
    bijection = constructor().double()
    bijection.initialize(sample(64, *shape, dtype=torch.float64))
    with torch.no_grad():
        for parameter in bijection.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return bijection.eval(), sample(3, *shape, dtype=torch.float64)


@pytest.fixture(params=TABLE)
def case(request: pytest.FixtureRequest) -> tuple[Bijection, torch.Tensor]:
    return make(request.param)


def test_shapes(case):
    bijection, x = case
    z, log_det = bijection(x)
    assert z.shape[0] == len(x)
    assert z[0].numel() == x[0].numel()
    assert log_det.shape == (len(x),)


def test_inverse_returns_the_input(case):
    bijection, x = case
    z, _ = bijection(x)
    assert (bijection.inverse(z)[0] - x).abs().max() < 1e-9


def test_log_det_equals_that_of_the_jacobian(case):
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


def test_initialize_returns_the_output(case):
    bijection, x = case
    output = bijection.initialize(x)
    assert torch.allclose(output, bijection(x)[0], atol=1e-12)


@pytest.mark.parametrize("name", [name for name in TABLE if "conditioned" in name])
def test_output_depends_on_the_condition(name):
    bijection, x = make(name)
    condition = bijection.condition.roll(1, 1).expand(len(x), *bijection.condition.shape[1:])
    change = bijection(x, condition)[0] - bijection(x)[0]
    assert change.abs().flatten(1).amax(1).min() > 1e-3


def modules() -> list[str]:
    return [
        f"flowgen.bijections.{module.name}" for module in pkgutil.iter_modules(bijections.__path__)
    ]


def test_package_exports_lazily():
    assert set(bijections.__all__) <= set(dir(bijections))
    with pytest.raises(AttributeError, match="no attribute 'Glow'"):
        _ = bijections.Glow
    code = "import sys, flowgen.bijections; print('flowgen.bijections.base' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "False\n", result.stderr


def test_package_depends_on_no_other_part_of_flowgen():
    code = (
        "import importlib, sys\n"
        f"for name in {modules()}: importlib.import_module(name)\n"
        "print([name for name in sys.modules if name.startswith('flowgen.')"
        " and not name.startswith('flowgen.bijections')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stdout + result.stderr


def test_actnorm_starts_with_zero_mean_and_unit_variance():
    output = ActNorm(3).double().initialize(5 + 7 * torch.randn(50, 3, 4, 4, dtype=torch.float64))
    deviation, mean = torch.std_mean(output, dim=(0, 2, 3), correction=0)
    assert torch.allclose(mean, torch.zeros_like(mean), atol=1e-12)
    assert torch.allclose(deviation, torch.ones_like(deviation))


def test_initialization_is_finite_for_a_constant_channel():
    assert torch.isfinite(ActNorm(2).initialize(torch.zeros(8, 2, 4, 4))).all()
    assert torch.isfinite(ActNorm(2).initialize(torch.randn(1, 2))).all(), "one value per channel"


@pytest.mark.parametrize("convolution", [InvertibleConv1x1, InvertibleConv1x1LU])
def test_1x1_convolutions_start_as_a_rotation_that_decorrelates(convolution):
    bijection = convolution(4).double()
    mixing = torch.randn(4, 4, dtype=torch.float64)
    x = torch.einsum("ij,bjhw->bihw", mixing, torch.randn(50, 4, 4, 4, dtype=torch.float64))
    for _ in range(2):  # the random start, then the one from data
        matrix, _, log_det = bijection.affine()
        identity = torch.eye(4, dtype=torch.float64)
        assert torch.allclose(matrix @ matrix.T, identity, atol=1e-6)
        assert abs(log_det) < 1e-6
        output = bijection.initialize(x)
    covariance = torch.cov(output.transpose(0, 1).flatten(1))
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-6 * covariance.max()


def test_empirical_cdf_is_about_uniform_at_the_entropy_of_the_pixels():
    probability = torch.tensor([0.7, 0.1, 0.1, 0.1], dtype=torch.float64)
    images = torch.multinomial(probability, 100_000, replacement=True).view(1000, 1, 10, 10)
    x = (images + torch.rand(images.shape, dtype=torch.float64)) / 4
    bijection = EmpiricalCDF(1, 4).double()
    z = bijection.initialize(x)
    assert z.min() >= 0
    assert z.max() <= 1
    # Under the uniform distribution, z itself has a log-probability of zero.
    bits = 2 - bijection(x)[1].mean() / (100 * math.log(2))
    entropy = -(probability * probability.log2()).sum()
    # The histogram is mixed with a tenth of the uniform distribution.
    assert entropy - 0.01 <= bits < entropy + 0.03


def test_marginal_gaussianization_is_active_only_if_it_saves_bits():
    sparse = torch.rand(64, 1, 8, 8) * (1 + 31 * (torch.rand(64, 1, 8, 8) < 0.1)) / 32
    uniform = torch.rand(64, 1, 8, 8)
    bijection = MarginalGaussianization(1, 32)
    bijection.initialize(uniform)
    z, log_det = bijection(uniform)
    assert torch.equal(z, uniform)
    assert not log_det.any()
    bijection.initialize(sparse)
    z, log_det = bijection(sparse)
    assert log_det.mean() > 64 * math.log(2)
    assert (bijection.inverse(z)[0] - sparse).abs().max() < 1e-4


def test_couplings_start_as_the_identity():
    coupling = Coupling(ConvNetwork(2, 8, 4), Affine())
    x = torch.randn(8, 4, 4, 4)
    assert torch.equal(coupling.initialize(x), x)


@pytest.mark.parametrize("scale", ["bounded", "tanh"])
def test_bounded_log_scales_stay_between_their_bounds(scale):
    raw = torch.tensor([-1e9, -1.0, 0.0, 1.0, 1e9])
    log_scale = LOG_SCALES[scale](raw)
    assert log_scale.abs().max() <= 2
    assert (log_scale.diff() > 0).all()
    assert log_scale[2] == 0


def test_sigmoid_log_scale_and_its_gradient_are_finite():
    raw = torch.tensor([-1e3, 0.0, 1e3], requires_grad=True)
    log_scale = LOG_SCALES["sigmoid"](raw)
    log_scale.sum().backward()
    assert torch.isfinite(log_scale).all()
    assert torch.isfinite(raw.grad).all()


def test_squeeze_maps_each_block_of_four_pixels_to_one():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert Squeeze()(x)[0][0, :, 0, 1].tolist() == [2, 3, 6, 7]


def test_logit_rejects_an_alpha_outside_its_range():
    for alpha in (0.0, 0.5):
        with pytest.raises(ValueError, match="alpha must be between 0"):
            Logit(alpha)


@pytest.mark.parametrize("name", ["planar", "sylvester"])
@pytest.mark.parametrize("value", [-100.0, 100.0])
def test_residual_layers_are_invertible_for_extreme_parameters(name, value):
    bijection, x = make(name)
    with torch.no_grad():
        if name == "planar":
            # Without its constraint, the layer would not be monotone for -100.
            bijection.push.copy_(value * bijection.direction)
        else:
            bijection.outer.fill_(value)
    z, log_det = bijection(x)
    assert (bijection.inverse(z)[0] - x).abs().max() < 1e-9
    assert torch.isfinite(log_det).all()


def test_only_networks_run_in_bfloat16():
    flow = Chain(
        FusedAffine(ActNorm(4), InvertibleConv1x1LU(4)), Coupling(ConvNetwork(2, 8, 4), Affine())
    )
    residual = Chain(Planar(6), Sylvester(6, 3))
    for parameter in residual.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    dtypes = []
    flow.bijections[1].network.register_forward_hook(
        lambda module, inputs, output: dtypes.append(output.dtype)
    )
    x = torch.randn(4, 4, 4, 4)
    vectors = x[:, 0, 0, :3].repeat(1, 2)
    split = FactorOut(Flatten(2, 4, 4), ZeroConv2d(2, 4, 3))
    torch.nn.init.normal_(split.network.weight)
    with torch.autocast("cpu", torch.bfloat16):
        z, log_det = flow(x)
        split_z = split(x)[0]
        assert split.network(x[:, :2]).dtype == torch.bfloat16
        affine_z = flow.bijections[0](x)[0]
        residual_z = residual(vectors)[0]
    assert dtypes == [torch.bfloat16]
    assert z.dtype == log_det.dtype == torch.float32
    assert torch.equal(split_z, split(x)[0])
    assert torch.equal(affine_z, flow.bijections[0](x)[0])
    assert torch.equal(residual_z, residual(vectors)[0])


@pytest.mark.parametrize("name", TRANSFORMS)
def test_inverse_of_a_transform_is_differentiable(name):
    transform = TRANSFORMS[name]("bounded")
    y = torch.randn(2, 1, 2, dtype=torch.float64, requires_grad=True)
    params = (0.3 * torch.randn(2, transform.num_params, 2, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(transform.inverse, (y, params))


def test_made_depends_on_all_previous_values_even_if_it_is_narrow():
    dim = 40
    network = MADE(dim, 10, 2, 2)
    torch.nn.init.normal_(network.last.weight)
    torch.nn.init.constant_(network.first.bias, 5.0)
    x = torch.rand(1, dim, requires_grad=True)
    for t in range(dim):
        output = network(x).unflatten(1, (2, dim))[0, :, t].square().sum()
        (gradient,) = torch.autograd.grad(output, x)
        assert not gradient[0, t:].any()
    depends = gradient[0, : dim - 1] != 0  # of the last value, through 10 units for 39 values
    assert depends[0]
    assert depends[-1]
    assert depends.float().mean() > 0.9


def test_made_shows_the_condition_to_every_value():
    network = MADE(4, 10, 2, 2, cond_channels=3)
    torch.nn.init.normal_(network.last.weight)
    torch.nn.init.constant_(network.first.bias, 5.0)
    x = torch.rand(1, 7, requires_grad=True)
    for t in range(4):
        output = network(x).unflatten(1, (2, 4))[0, :, t].square().sum()
        (gradient,) = torch.autograd.grad(output, x)
        assert gradient[0, 4:].all()
        assert not gradient[0, t:4].any()


def test_logistic_to_normal_is_finite_in_the_tails_in_float32():
    x = torch.tensor([[-1e4, -91.0, -80.0, 0.0, 79.9, 91.0, 1e4]])
    z, log_det = LogisticToNormal()(x)
    assert torch.isfinite(z).all()
    assert torch.isfinite(log_det).all()
    assert (z.diff() > 0).all()


def test_batch_norm_rejects_a_batch_with_one_value_per_channel():
    for module in (RealNVPNetwork(2, 4, 4, num_blocks=1), BatchNorm(2)):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            module.train()(torch.rand(1, 2, 1, 1))


def test_batch_norm_uses_its_overridable_batch_moments():
    class Constant(BatchNorm):
        def batch_moments(self, x):
            return torch.full((2,), 3.0), torch.full((2,), 4.0 - self.eps), 8

    bijection = Constant(2).train()
    z, _ = bijection(torch.full((1, 2), 7.0))
    assert torch.allclose(z, torch.full((1, 2), 2.0))
    assert torch.allclose(bijection.mean, torch.full((2,), 0.3))
    assert torch.allclose(bijection.variance, torch.full((2,), 0.9 + 0.1 * 4 * 8 / 7), atol=1e-4)


def test_dropout_draws_its_mask_from_its_random_source():
    class Alternating(RandomSource):
        def forward(self, draw, shape, generator=None, **kwargs):
            return torch.tensor([0.2, 0.8]).expand(*shape)

    dropout = Dropout(0.5).train()
    dropout.random_source = Alternating()
    assert dropout(torch.ones(3, 2)).tolist() == [[0.0, 2.0]] * 3
    assert dropout.eval()(torch.ones(3, 2)).tolist() == [[1.0, 1.0]] * 3


def test_gradients_of_a_dilated_convolution_are_finite_in_bfloat16():
    """Run as in training: channels-last, with images large enough for the faulty kernel."""
    network = GatedNetwork(6, 24, 12, num_blocks=3).to(memory_format=torch.channels_last)
    x = torch.randn(12, 6, 32, 32).to(memory_format=torch.channels_last)
    network.initialize(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.nn.init.normal_(network.layers[-1].weight)
        network(x).float().square().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in network.parameters())


def test_update_bn_sets_statistics_to_the_means_over_batches():
    """A layer sees the training output of the one before it; torch's layers match torch's own."""
    batches = [(3 * torch.randn(5, 4, 2, 2) + index,) for index in range(7)]
    chain = Chain(BatchNorm(4), BatchNorm(4)).eval()
    update_bn(chain, batches)
    values = torch.stack([x.transpose(0, 1).flatten(1) for (x,) in batches])
    first, second = chain.bijections
    assert torch.allclose(first.mean, values.mean((0, 2)), atol=1e-6)
    assert torch.allclose(first.variance, values.var(2).mean(0))
    assert torch.allclose(second.mean, torch.zeros(4), atol=1e-6)
    assert torch.allclose(second.variance, torch.full((4,), 20 / 19), atol=1e-4)
    assert not first.training
    assert first.momentum == 0.1

    network = RealNVPNetwork(4, 8, 8, num_blocks=1)
    expected = copy.deepcopy(network)
    update_bn(network, batches)
    torch.optim.swa_utils.update_bn(batches, expected)
    for buffer, expected_buffer in zip(network.buffers(), expected.buffers(), strict=True):
        assert torch.equal(buffer, expected_buffer)
    update_bn(ActNorm(4), None)  # draws no batch, because there are no statistics


@pytest.mark.parametrize("batch_size", (3, 16))
def test_1x1_convolution_of_one_thread_equals_that_of_torch(batch_size):
    layer = NormalizedConv2d(5, 7, 1)
    inputs = torch.randn(batch_size, 5, 6, 4, requires_grad=True), *layer.parameters()
    outputs = layer(inputs[0]), torch.nn.functional.conv2d(*inputs)
    assert torch.allclose(*outputs, atol=1e-6)
    gradients = (torch.autograd.grad(y.pow(3).sum(), inputs) for y in outputs)
    for gradient, expected in zip(*gradients, strict=True):
        assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-5)


def test_the_slope_of_a_logistic_base_is_right_at_zero():
    x = torch.zeros(1, 1, dtype=torch.double, requires_grad=True)
    z, log_det = LogisticToNormal()(x)
    (slope,) = torch.autograd.grad(z.sum(), x)
    assert slope.item() == pytest.approx(math.sqrt(math.pi / 8))
    assert log_det.item() == pytest.approx(math.log(slope.item()))
