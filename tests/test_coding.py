"""Coding rules: exact inverses, restored stacks, and lengths that equal the densities."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bijections import TABLE, Conditioned
from test_models import FLOWS, build_model

import flowgen
from flowgen import coding
from flowgen.bijections.base import Bijection
from flowgen.coding import coder as coder_module
from flowgen.coding.coder import Coder, NearBoundaryError
from flowgen.coding.flow_codec import FlowCodec, check_compressible
from flowgen.coding.layers import code, has_rule, lu
from flowgen.coding.normal import pop_normal, push_normal, to_uniform
from flowgen.coding.pixelcnn_codec import PixelCNNCodec
from flowgen.coding.rbm_codec import RBMCodec
from flowgen.coding.stack import BitStack, CodingError, reserve_words
from flowgen.data.mnist import MNISTSample
from flowgen.models.base import SupportsCompression
from flowgen.models.flows.flow import Flow
from flowgen.models.rbm.log_z import exact_log_z
from flowgen.utils.errors import UserError

pytest.importorskip("constriction", reason="needs the extra codec")

RESERVE_WORDS = 1 << 16
LARGE = 2**32
UNCODED = ("continuous", "planar", "sylvester", "logit", "empirical", "marginal")


def make_coder(grid_bits: int = 12, reserve: int = RESERVE_WORDS) -> Coder:
    return Coder(BitStack(reserve), grid_bits)


def random_below(sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.minimum((rng.random(len(sizes)) * sizes).astype(np.int64), sizes - 1)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([2, 2**10, 2**11, 2**20, LARGE]))
def test_pushed_numbers_are_popped(seed, limit):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, limit, 300, endpoint=True)
    values = random_below(sizes, rng)
    stack = BitStack(RESERVE_WORDS)
    bits = stack.num_bits
    stack.push(values, sizes)
    growth = stack.num_bits - bits
    assert growth == pytest.approx(np.log2(sizes).sum(), abs=3)
    assert np.array_equal(stack.pop(sizes), values)
    assert stack.is_initial()


def test_popped_numbers_are_uniform():
    values = BitStack(RESERVE_WORDS).pop(np.full(20_000, 3000))
    counts = np.bincount(values * 10 // 3000, minlength=10)
    assert abs(counts - 2000).max() < 5 * math.sqrt(2000)


def test_words_of_a_file_continue_the_random_words():
    stack = BitStack(RESERVE_WORDS)
    popped = stack.pop(np.full(100, 1000))
    stack.push(np.arange(50), np.full(50, 50))
    borrowed, words = stack.to_words()
    assert borrowed + len(words) < 60
    other = BitStack(RESERVE_WORDS, borrowed, words)
    assert np.array_equal(other.pop(np.full(50, 50)), np.arange(50))
    other.push(popped, np.full(100, 1000))
    assert other.is_initial()


def test_a_stack_without_a_pop_returns_from_its_words():
    stack = BitStack(RESERVE_WORDS)
    stack.push(np.arange(50), np.full(50, 50))
    other = BitStack(RESERVE_WORDS, *stack.to_words())
    assert np.array_equal(other.pop(np.full(50, 50)), np.arange(50))
    assert other.is_initial()


def test_scrambled_words_are_random_and_return():
    stack = BitStack(RESERVE_WORDS)
    stack.push_bits(np.zeros(400, np.int64), 30)
    before = stack.save()
    stack.scramble(300)
    assert stack.pop_bits(30, 300).std() == pytest.approx(2**30 / math.sqrt(12), rel=0.1)
    stack.restore(before)
    stack.scramble(300)
    stack.scramble(300)
    assert np.array_equal(stack.save(), before)


def test_pushed_binary_numbers_are_popped_and_cost_their_probability():
    rng = np.random.default_rng(0)
    probability = (rng.integers(1, 2**24, 5000) / 2**24).astype(np.float32)
    values = (rng.random(5000) < probability).astype(np.int64)
    stack = BitStack(RESERVE_WORDS)
    bits = stack.num_bits
    stack.push_binary(values, probability)
    exact = -np.log2(np.where(values, probability, 1 - probability)).sum()
    assert stack.num_bits - bits == pytest.approx(exact, rel=1e-3)
    assert np.array_equal(stack.pop_binary(probability), values)
    assert stack.is_initial()


def test_an_empty_stack_is_an_error():
    with pytest.raises(CodingError, match="empty"):
        BitStack(8).pop(np.full(100, 1000))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 2**9, 2**10, 2**20, LARGE]))
def test_exchange_is_a_bijection_that_costs_its_slope(seed, limit):
    rng = np.random.default_rng(seed)
    ratio = torch.from_numpy(rng.integers((limit + 1) // 2, limit, 700, endpoint=True))
    shift = torch.from_numpy(rng.integers(12 if limit == LARGE else 0, 21, 700))
    x = torch.from_numpy(rng.integers(-(2**19), 2**19, 700))
    coder = make_coder()
    bits = coder.stack.num_bits
    y = coder.exchange(x, 5, -7, ratio, shift, False)
    growth = coder.stack.num_bits - bits
    assert growth == pytest.approx((shift - ratio.double().log2()).sum().item(), abs=3)
    exact = (x.double() - 5) * ratio / 2.0**shift - 7
    assert (y - exact).abs().max() <= 1 + ratio.max() / 2.0 ** shift.min()
    assert torch.equal(coder.exchange(y, 5, -7, ratio, shift, True), x)
    assert coder.stack.is_initial()


def test_ratios_are_accurate_and_small():
    scale = torch.cat((torch.logspace(-3, 3, 1000).double(), torch.tensor([0.5, 1.0, 2.0])))
    ratio, shift = make_coder().to_ratio(scale)
    assert ratio[scale <= 2**9].max() <= 2**10
    assert ((ratio / 2.0**shift / scale).log2().abs() < 2e-3).all()


def test_values_near_a_boundary_of_rounding_are_refused():
    coder = make_coder()
    value = torch.tensor([(1 - coder.offset + 1e-9) * 2.0**-12], dtype=torch.float64)
    assert coder.quantize(value, 12) == 1
    coder.margin = coder_module.MARGIN
    with pytest.raises(NearBoundaryError):
        coder.quantize(value, 12)
    coder.choose_offset(1)
    coder.quantize(value, 12)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(value):
    with pytest.raises(CodingError, match="finite"):
        make_coder().quantize(torch.tensor([0.0, value]), 12)


def test_lu_restores_the_matrix():
    matrix = torch.randn(12, 12).double()
    order, lower, diagonal, upper = lu(matrix)
    assert torch.allclose(lower @ torch.diag(diagonal) @ upper, matrix[order])
    assert lower.abs().max() <= 1 / (1 - 1e-6)


# Normal numbers


def test_popped_normal_numbers_have_the_right_tails():
    numbers = make_coder(reserve=300_000).to_float(
        pop_normal(make_coder(reserve=300_000), torch.Size((200_000,)))
    )
    assert numbers.mean().abs() < 0.01
    assert (numbers.std() - 1).abs() < 0.01
    for threshold in (1.0, 2.0, 3.0, 4.0):
        expected = 2 * torch.special.ndtr(torch.tensor(-threshold)).item() * len(numbers)
        count = int((numbers.abs() > threshold).sum())
        assert abs(count - expected) < 5 * math.sqrt(expected)
    assert numbers.abs().max() < 7


def test_normal_numbers_cost_their_density_even_in_the_tails():
    coder = make_coder(16)
    x = coder.to_grid(torch.cat((torch.linspace(-6.5, 6.5, 2000), torch.randn(2000))))
    z = coder.to_float(x)
    bits = coder.stack.num_bits
    push_normal(coder, x)
    growth = coder.stack.num_bits - bits
    exact = (z.square() / 2 + math.log(2 * math.pi) / 2).sum() / math.log(2) + 16 * len(z)
    assert growth == pytest.approx(exact.item(), rel=3e-3)
    assert torch.equal(pop_normal(coder, x.shape), x)
    assert coder.stack.is_initial()


def test_latents_beyond_the_tables_are_refused():
    with pytest.raises(CodingError):
        push_normal(make_coder(), torch.tensor([70 << 12]))
    with pytest.raises(CodingError):
        to_uniform(make_coder(), torch.tensor([70 << 12]), torch.tensor([LARGE]), False)


def test_noise_is_restored():
    coder = make_coder()
    x = pop_normal(coder, torch.Size((1000,)))
    before = coder.stack.save()
    sizes = torch.full_like(x, 1 << 22)
    uniform = to_uniform(coder, x, sizes, False)
    assert uniform.min() >= 0 and (uniform < sizes).all()
    assert torch.equal(to_uniform(coder, uniform, sizes, True), x)
    assert np.array_equal(coder.stack.save(), before)


# Bijections


@code.register
def _(bijection: Conditioned, x, condition, coder, backward):
    return code(bijection.bijection, x, bijection._expand(x), coder, backward)


def coded_bijections() -> list[str]:
    names = []
    for name, (make, *_) in TABLE.items():
        torch.manual_seed(0)
        parts = [part for part in make().modules() if isinstance(part, Bijection)]
        if all(has_rule(part) for part in parts):
            names.append(name)
    return names


def test_all_other_bijections_are_approximate_or_come_first():
    assert all(name.startswith(UNCODED) for name in set(TABLE) - set(coded_bijections()))


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", coded_bijections())
def test_code_restores_numbers_and_stack(name, batch_size):
    make, shape, *_ = TABLE[name]
    bijection = make().double().eval()
    for parameter in bijection.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    coder = make_coder(16)
    x = coder.to_grid(torch.randn(batch_size, *shape))
    bits = coder.stack.num_bits
    with torch.no_grad():
        z = code(bijection, x, None, coder, False)
        growth = coder.stack.num_bits - bits
        exact, log_det = bijection(coder.to_float(x))
        assert torch.allclose(coder.to_float(z), exact, atol=0.1, rtol=0.02)
        assert growth == pytest.approx(
            -log_det.sum().item() / math.log(2), abs=3 + 0.01 * x.numel()
        )
        assert torch.equal(code(bijection, z, None, coder, True), x)
    assert coder.stack.is_initial()


# Models


def smooth_images(count: int = 24, bits: int = 5) -> torch.Tensor:
    """Return noisy ramps of 3x8x8 pixels, which a flow can compress."""
    generator = torch.Generator().manual_seed(0)
    ramp = 3 * torch.arange(8)[:, None] + torch.arange(8)
    noise = torch.randint(0, 4, (count, 3, 8, 8), generator=generator)
    return ((ramp + noise) << (bits - 5)).clamp(0, 2**bits - 1).to(torch.uint8)


def briefly_trained(model: Flow, images: torch.Tensor, steps: int = 5) -> Flow:
    model.initialize(images)
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(images).backward()
        optimizer.step()
    return model.eval()


def round_trip(model: Flow, images: torch.Tensor) -> coding.CompressionResult:
    """Compress and decompress images in memory, with new codecs."""
    result = coding.compress(FlowCodec(model), images, "run", verify=False)
    header, payload = coding.read_header(result.data)
    assert torch.equal(coding.decompress(FlowCodec(model), header, payload), images)
    return result


NOT_CODED = {"flow_matching", "planar", "sylvester", "rbm"}
CODED = [name for name in FLOWS if name not in NOT_CODED]


@pytest.mark.parametrize("name", CODED)
def test_every_flow_codes_its_images_at_its_own_likelihood(name):
    model = FLOWS[name]()
    images = smooth_images()
    result = round_trip(briefly_trained(model, images), images)
    assert result.raw_images == 0
    assert result.net_bits_per_dim == pytest.approx(result.model_bits_per_dim, rel=3e-3)


@pytest.mark.parametrize("name", [name for name in FLOWS if name != "rbm"])
def test_a_flow_knows_without_weights_whether_it_can_compress(name):
    model = FLOWS[name]()
    try:
        check_compressible(model)
        is_compressible = True
    except UserError:
        is_compressible = False
    assert type(model).supports(SupportsCompression, {}) == is_compressible


@pytest.mark.parametrize("name", sorted(NOT_CODED - {"rbm"}))
def test_flows_without_an_exact_inverse_are_refused(name):
    with pytest.raises(UserError, match=r"cannot compress images, because its inverse is only app"):
        check_compressible(FLOWS[name]())


def test_other_models_are_refused():
    model = build_model("glow", gaussianize=False, dequantization="gaussian:0.05")
    with pytest.raises(UserError, match=r"a flow of noisy images .* cannot compress"):
        check_compressible(model)


@pytest.mark.parametrize("bits", [1, 8])
@pytest.mark.parametrize("dequantization", ["uniform", "variational"])
def test_other_bit_depths(bits, dequantization):
    model = build_model("glow", steps_per_level=1, bits=bits, dequantization=dequantization)
    images = smooth_images(bits=8) >> (8 - bits)
    result = round_trip(briefly_trained(model, images), images)
    assert result.net_bits_per_dim == pytest.approx(result.model_bits_per_dim, rel=5e-3)


@pytest.mark.parametrize("condition_networks", [False, True])
def test_classes(condition_networks):
    model = build_model(
        "glow", steps_per_level=1, num_classes=3, condition_networks=condition_networks
    )
    images = smooth_images()
    result = round_trip(briefly_trained(model, images), images)
    # The class costs up to log2(3) bits, because the classes are equal in these images.
    bits = 3 * 64 * (result.net_bits_per_dim - result.model_bits_per_dim)
    assert bits < math.log2(3) + 1


# RBMs


@pytest.fixture
def rbm() -> flowgen.models.RBM:
    torch.manual_seed(0)
    rbm = flowgen.models.RBM(visible=(1, 3, 4), hidden=6)
    torch.nn.init.normal_(rbm.weight)
    torch.nn.init.normal_(rbm.visible_bias)
    rbm.base.copy_(rbm.visible_bias)
    rbm.log_z = exact_log_z(rbm)
    return rbm.eval()


def test_the_code_of_an_rbm_approaches_its_exact_likelihood_from_above(rbm):
    states = (torch.arange(2**12)[:, None] >> torch.arange(12) & 1).double()
    probability = (-rbm.double().free_energy(states) - rbm.log_z).exp()
    drawn = torch.multinomial(probability, 400, replacement=True)
    images = rbm.to_images(states[drawn])
    lengths = []
    for steps in (2, 300):
        result = coding.compress(RBMCodec(rbm, steps), images, "run", verify=False)
        header, payload = coding.read_header(result.data)
        decoded = coding.decompress(RBMCodec(rbm, header.annealing_steps), header, payload)
        assert torch.equal(decoded, images) and result.raw_images == 0
        lengths.append(result.net_bits)
    exact = -probability[drawn].log2().sum().item()
    assert result.model_bits == pytest.approx(exact, rel=1e-5)
    assert exact < lengths[1] < 1.02 * exact < lengths[0]


def test_other_numbers_of_annealing_steps_do_not_decode(rbm):
    images = torch.ones(3, 1, 3, 4, dtype=torch.uint8)
    header, payload = coding.read_header(coding.compress(RBMCodec(rbm, 5), images, "run").data)
    with pytest.raises(UserError, match="do not match their checksum"):
        coding.decompress(RBMCodec(rbm, 6), header, payload)


def test_rbms_that_diverged_are_refused(rbm):
    rbm.weight.data *= 1e4
    with pytest.raises(UserError, match="too large for compression, because its training diverged"):
        coding.make_codec(rbm)


@pytest.fixture(scope="module")
def zoo_codec() -> FlowCodec:
    return FlowCodec(flowgen.load("zoo/glow_mnist", device="cpu"))


@pytest.fixture(scope="module")
def digits() -> torch.Tensor:
    return MNISTSample().test.images


def test_the_zoo_codes_digits(zoo_codec, digits):
    images = digits[::25]
    result = coding.compress(zoo_codec, images, "zoo/glow_mnist")
    header, payload = coding.read_header(result.data)
    assert torch.equal(coding.decompress(zoo_codec, header, payload), images)
    assert result.net_bits_per_dim == pytest.approx(result.model_bits_per_dim, rel=3e-3)
    assert result.raw_images == 0


def test_the_zoo_codes_other_images_too(zoo_codec):
    images = torch.stack(
        (
            torch.zeros(1, 28, 28),
            torch.full((1, 28, 28), 255.0),
            torch.rand(1, 28, 28) * 255,
            torch.arange(28.0).expand(1, 28, 28) * 9,
        )
    ).to(torch.uint8)
    result = coding.compress(zoo_codec, images, "zoo/glow_mnist")
    header, payload = coding.read_header(result.data)
    assert torch.equal(coding.decompress(zoo_codec, header, payload), images)


def test_few_words_are_borrowed(zoo_codec, digits):
    coder = make_coder(zoo_codec.grid_bits, reserve_words(zoo_codec.noise_bits))
    zoo_codec.encode(digits[:1], coder)
    borrowed, _ = coder.stack.to_words()
    assert 32 * borrowed < 784 * (zoo_codec.grid_bits + 14)


@pytest.mark.parametrize(("num_components", "num_classes"), [(None, 2), (3, None)])
def test_the_code_of_a_pixelcnn_has_the_length_of_its_exact_likelihood(num_components, num_classes):
    images = smooth_images()
    model = build_model(
        "pixelcnn", num_layers=1, num_components=num_components, num_classes=num_classes
    )
    briefly_trained(model, images)
    result = coding.compress(PixelCNNCodec(model), images, "run", verify=False)
    header, payload = coding.read_header(result.data)
    assert torch.equal(coding.decompress(PixelCNNCodec(model), header, payload), images)
    expected = model.bits_per_dim(model.score(images)).mean().item()
    assert result.raw_images == 0
    assert result.model_bits_per_dim == pytest.approx(expected, rel=1e-3)
    class_bits = 0 if num_classes is None else 1 / model.dimensions
    assert 0.999 * expected < result.net_bits_per_dim < 1.001 * expected + class_bits
