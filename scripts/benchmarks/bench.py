"""Compare the training speed with other packages: normflows, scikit-learn and learnergy.

All programs use the same number of threads. normflows is used as in its documentation
(`GlowBlock`, `MultiscaleFlow`) with a forward pass, a backward pass and Adam; scikit-learn is used
through `partial_fit`, and learnergy through `fit`. Every program runs in its own process. The
programs take turns, and the best round of each counts, since other work on the machine slows down
single rounds. The last column compares the speed with float32 matrix products on the same machine.
For all programs it assumes the FLOPs of flowgen's convolutions and matrix products, which torch
counts.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flowgen.models.flows.glow import Glow
from flowgen.models.rbm.negative_phase import PCD
from flowgen.models.rbm.rbm import RBM
from flowgen.models.rbm.sampling import ParallelTempering, gibbs, white_noise
from flowgen.training.device import autocast_dtype

GLOW_SIZE = 64  # height and width of the images
GLOW_LEVELS = 4
GLOW_STEPS = 8  # steps of flow per level
GLOW_WIDTH = 128
GLOW_BATCH_SIZE = 8
RBM_SIZE = 28
RBM_HIDDEN = 500
RBM_BATCH_SIZE = 100
LEARNERGY_BATCHES = 20  # per call
TEMPERATURES = 10
MATRIX_SIZE = 2048  # of the matrix products that measure the machine
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

Step = Callable[[Tensor], object]


def flowgen_glow(compiled: bool) -> Step:
    """Return a training step of flowgen's Glow."""
    model = Glow(
        image_shape=(3, GLOW_SIZE, GLOW_SIZE),
        bits=5,
        levels=GLOW_LEVELS,
        steps_per_level=GLOW_STEPS,
        width=GLOW_WIDTH,
    )
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.initialize(torch.randint(0, 32, (64, 3, GLOW_SIZE, GLOW_SIZE), dtype=torch.uint8))
    if compiled:
        model.compile()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    dtype = autocast_dtype("auto", torch.device("cpu"))

    def step(images: Tensor) -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(images)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 50.0)
        optimizer.step()

    return step


def normflows_glow() -> Step:
    """Return a training step of normflows' Glow."""
    import normflows

    bases = []
    merges = []
    flows = []
    for level in range(GLOW_LEVELS):
        channels = 3 * 2 ** (GLOW_LEVELS + 1 - level)
        blocks = [
            normflows.flows.GlowBlock(channels, GLOW_WIDTH, split_mode="channel", scale=True)
            for _ in range(GLOW_STEPS)
        ]
        flows.append([*blocks, normflows.flows.Squeeze()])
        size = GLOW_SIZE // 2 ** (GLOW_LEVELS - level)
        if level > 0:
            merges.append(normflows.flows.Merge())
            channels //= 2
        bases.append(normflows.distributions.GlowBase((channels, size, size)))
    model = normflows.MultiscaleFlow(bases, flows, merges)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def step(images: Tensor) -> None:
        loss = model.forward_kld((images + torch.rand(images.shape)) / 32)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def flowgen_rbm() -> Step:
    """Return a training step of flowgen's RBM."""
    negative_phase = PCD(gibbs_steps=1, num_chains=RBM_BATCH_SIZE)
    rbm = RBM([1, RBM_SIZE, RBM_SIZE], RBM_HIDDEN, negative_phase=negative_phase)
    rbm.initialize(random_digits())
    optimizer = torch.optim.SGD(rbm.parameters(), lr=0.01, momentum=0.9, fused=True)

    def step(images: Tensor) -> None:
        loss = rbm(images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def scikit_learn_rbm() -> Step:
    """Return a training step of scikit-learn's RBM in float32."""
    from sklearn.neural_network import BernoulliRBM

    rbm = BernoulliRBM(
        n_components=RBM_HIDDEN, learning_rate=0.01, batch_size=RBM_BATCH_SIZE, random_state=0
    )
    rows = random_digits().flatten(1).float().numpy()
    rbm.partial_fit(rows)
    for name in ("components_", "intercept_visible_", "intercept_hidden_", "h_samples_"):
        setattr(rbm, name, getattr(rbm, name).astype("float32"))  # it starts in float64
    return lambda images: rbm.partial_fit(rows)


def learnergy_rbm() -> Step:
    """Return `LEARNERGY_BATCHES` training steps of learnergy's RBM."""
    from learnergy.models import bernoulli
    from torch.utils.data import TensorDataset

    rbm = bernoulli.RBM(
        n_visible=RBM_SIZE**2, n_hidden=RBM_HIDDEN, steps=1, learning_rate=0.01, momentum=0.9
    )
    rows = random_digits().flatten(1).float().repeat(LEARNERGY_BATCHES, 1)
    data = TensorDataset(rows, torch.zeros(len(rows)))
    return lambda images: rbm.fit(data, batch_size=RBM_BATCH_SIZE, epochs=1)


def gibbs_steps() -> Step:
    """Return a function that makes one Gibbs step per temperature."""
    rbm = RBM(RBM_SIZE**2, RBM_HIDDEN)
    states = gibbs(rbm, white_noise(rbm, RBM_BATCH_SIZE))

    def step(images: Tensor) -> None:
        with torch.no_grad():
            for _ in range(TEMPERATURES):
                next(states)

    return step


def tempering_step() -> Step:
    """Return a function that makes one step of parallel tempering."""
    rbm = RBM(RBM_SIZE**2, RBM_HIDDEN)
    replicas = ParallelTempering(TEMPERATURES, RBM_BATCH_SIZE, adapt=True)
    replicas.allocate(RBM_HIDDEN)

    def step(images: Tensor) -> None:
        with torch.no_grad():
            replicas.step(rbm)

    return step


def random_digits() -> Tensor:
    """Return a batch of random binary images."""
    return (torch.rand(RBM_BATCH_SIZE, 1, RBM_SIZE, RBM_SIZE) < 0.2).to(torch.uint8)


def random_faces() -> Tensor:
    """Return a batch of random color images of 5 bits."""
    return torch.randint(0, 32, (GLOW_BATCH_SIZE, 3, GLOW_SIZE, GLOW_SIZE), dtype=torch.uint8)


class Program(NamedTuple):
    """A program of a comparison. One call of its step makes `updates` updates of the weights."""

    name: str
    make_step: Callable[[], Step]
    updates: int = 1


class Comparison(NamedTuple):
    """Programs that do the same work. Speeds are relative to the first one.

    Attributes:
        title: Description of the work.
        unit: Unit of the speed.
        per_update: Number of units in an update.
        num_threads: Number of threads of every program.
        updates: Number of updates in a round.
        make_images: Returns the images of a batch.
        programs: The programs.
        flop_counted: Index of the program whose FLOPs are counted.
    """

    title: str
    unit: str
    per_update: int
    num_threads: int
    updates: int
    make_images: Callable[[], Tensor]
    programs: list[Program]
    flop_counted: int


COMPARISONS = [
    Comparison(
        f"Glow, {GLOW_SIZE}x{GLOW_SIZE} in color, {GLOW_LEVELS} levels of {GLOW_STEPS} steps, "
        f"width {GLOW_WIDTH}, batch {GLOW_BATCH_SIZE}",
        "images/s",
        per_update=GLOW_BATCH_SIZE,
        num_threads=2,
        updates=8,
        make_images=random_faces,
        programs=[
            Program("normflows", normflows_glow),
            Program("flowgen", lambda: flowgen_glow(compiled=False)),
            Program("flowgen, trainer.compile=true", lambda: flowgen_glow(compiled=True)),
        ],
        flop_counted=1,
    ),
    Comparison(
        f"RBM, PCD-1, {RBM_SIZE**2} visible and {RBM_HIDDEN} hidden units, batch {RBM_BATCH_SIZE}, "
        "float32 (learnergy: CD-1)",
        "updates/s",
        per_update=1,
        num_threads=1,
        updates=100,
        make_images=random_digits,
        programs=[
            Program("scikit-learn BernoulliRBM", scikit_learn_rbm),
            Program("learnergy RBM", learnergy_rbm, LEARNERGY_BATCHES),
            Program("flowgen RBM", flowgen_rbm),
        ],
        flop_counted=2,
    ),
    Comparison(
        f"{RBM_BATCH_SIZE} chains of this RBM",
        "calls/s",
        per_update=1,
        num_threads=1,
        updates=20,
        make_images=random_digits,
        programs=[
            Program(f"{TEMPERATURES} Gibbs steps", gibbs_steps),
            Program(f"1 tempering step of {TEMPERATURES} temperatures", tempering_step),
        ],
        flop_counted=0,
    ),
]


class Measurement(NamedTuple):
    """The speed of a program in one process."""

    speeds: list[float]  # units per second in each round
    flops: float  # per unit, or 0 if they are not counted
    matmul_flops: float  # per second, of float32 matrix products with the same threads


def measure(comparison: Comparison, program: Program, rounds: int) -> Measurement:
    """Measure a program in this process."""
    torch.set_num_threads(comparison.num_threads)
    torch.manual_seed(0)
    images = comparison.make_images()
    step = program.make_step()
    calls = max(1, comparison.updates // program.updates)
    units_per_call = program.updates * comparison.per_update
    flops = 0.0
    if program is comparison.programs[comparison.flop_counted]:
        with FlopCounterMode(display=False) as counter:
            step(images)
        flops = counter.get_total_flops() / comparison.per_update

    def speed(calls: int) -> float:
        return calls * units_per_call / seconds(lambda: [step(images) for _ in range(calls)])

    speed(min(calls, 3))  # the first steps compile and allocate
    speeds = [speed(calls) for _ in range(rounds)]
    matrix = torch.randn(MATRIX_SIZE, MATRIX_SIZE)
    matmul_seconds = min(seconds(lambda: matrix @ matrix) for _ in range(2 * rounds))
    return Measurement(speeds, flops, 2 * MATRIX_SIZE**3 / matmul_seconds)


def seconds(work: Callable[[], object]) -> float:
    """Return the time that a function takes, in seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure_in_process(index: int, program_index: int, rounds: int) -> Measurement:
    """Measure a program in a new process."""
    worker = ["--worker", f"{index} {program_index}", "--rounds", str(rounds)]
    num_threads = str(COMPARISONS[index].num_threads)
    output = subprocess.run(
        [sys.executable, __file__, *worker],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | dict.fromkeys(THREAD_VARIABLES, num_threads),
    ).stdout
    return Measurement(*json.loads(output.splitlines()[-1]))


def compare(index: int, rounds: int, turns: int) -> None:
    """Let the programs of a comparison take turns, and print their speeds."""
    comparison = COMPARISONS[index]
    measurements: list[list[Measurement]] = [[] for _ in comparison.programs]
    for _ in range(turns):
        for program_index, program_measurements in enumerate(measurements):
            program_measurements.append(measure_in_process(index, program_index, rounds))
    all_measurements = list(chain.from_iterable(measurements))
    matmul_flops = max(measurement.matmul_flops for measurement in all_measurements)
    flops = max(measurement.flops for measurement in all_measurements)
    print(
        f"{comparison.title}, {comparison.num_threads} threads; "
        f"matrix products {matmul_flops / 1e9:.0f} GFLOP/s"
    )
    speeds = [
        list(chain.from_iterable(measurement.speeds for measurement in program_measurements))
        for program_measurements in measurements
    ]
    for program, program_speeds in zip(comparison.programs, speeds, strict=True):
        best = max(program_speeds)
        print(
            f"  {program.name:40} {best:7.1f} {comparison.unit}, slowest round "
            f"{min(program_speeds):.1f}  {best / max(speeds[0]):.2f}x  "
            f"{best * flops / matmul_flops:.0%} of matrix products",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument(
        "--precision",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="precision of the networks of flowgen's couplings",
    )
    parser.add_argument(
        "--comparison",
        type=int,
        action="append",
        choices=range(len(COMPARISONS)),
        help="number of a comparison, by default all",
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # indices of comparison and program
    args = parser.parse_args()
    if args.worker:
        index, program_index = map(int, args.worker.split())
        comparison = COMPARISONS[index]
        print(json.dumps(measure(comparison, comparison.programs[program_index], args.rounds)))
        return
    if args.precision != "auto":
        os.environ["FLOWGEN_PRECISION"] = args.precision
    dtype = str(autocast_dtype("auto", torch.device("cpu"))).removeprefix("torch.")
    onednn = "on" if torch.backends.mkldnn.is_available() else "off"
    print(
        f"{datetime.now(UTC):%Y-%m-%d}  {platform.machine()}  torch {torch.__version__}  "
        f"{torch.backends.cpu.get_cpu_capability()} kernels, oneDNN {onednn}, "
        f"flowgen's networks in {dtype}"
    )
    for index in args.comparison or range(len(COMPARISONS)):
        compare(index, args.rounds, args.turns)


if __name__ == "__main__":
    main()
