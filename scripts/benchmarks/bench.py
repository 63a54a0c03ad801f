"""Training speed beside other packages in the same run: Glow beside normflows, the RBM beside scikit-learn and learnergy.

All run on the same threads: normflows as its documentation shows it (`GlowBlock`, `MultiscaleFlow`), forward, backward and Adam;
scikit-learn by `partial_fit`, learnergy by `fit`. Each is in a process of its own; they take turns, and each one's best round counts,
since a shared machine slows whichever runs at the wrong moment. Behind each speed stands its share of the machine's rate of float32
matrix products: the arithmetic of flowgen's convolutions and matrix products, counted by torch, for everybody's time.
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
from typing import NamedTuple

import torch
import yaml
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flowgen.config.compose import conf_folder
from flowgen.models.flows.glow import Glow
from flowgen.models.rbm.negative_phase import PCD
from flowgen.models.rbm.rbm import RBM
from flowgen.models.rbm.sampling import ParallelTempering, gibbs, white_noise
from flowgen.training.device import autocast_dtype

SIZE, LEVELS, STEPS, WIDTH, BATCH = 64, 4, 8, 128, 8
SIDE, HIDDEN, RBM_BATCH, TEMPERATURES, LEARNERGY_BATCHES = 28, 500, 100, 10, 20


def flowgen_step(compiled: bool) -> Callable[[Tensor], None]:
    arguments = yaml.safe_load((conf_folder() / "model" / "glow.yaml").read_text()) | {
        "image_shape": (3, SIZE, SIZE),
        "bits": 5,
    }
    arguments |= {"levels": LEVELS, "steps_per_level": STEPS, "width": WIDTH}
    del arguments["_target_"]
    model = Glow(**arguments).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.initialize(torch.randint(0, 32, (64, 3, SIZE, SIZE), dtype=torch.uint8))
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


def normflows_step() -> Callable[[Tensor], None]:
    import normflows

    bases, merges, flows = [], [], []
    for level in range(LEVELS):
        channels = 3 * 2 ** (LEVELS + 1 - level)
        blocks = [
            normflows.flows.GlowBlock(channels, WIDTH, split_mode="channel", scale=True)
            for _ in range(STEPS)
        ]
        flows.append([*blocks, normflows.flows.Squeeze()])
        side = SIZE // 2 ** (LEVELS - level)
        if level > 0:
            merges.append(normflows.flows.Merge())
            channels //= 2
        bases.append(normflows.distributions.GlowBase((channels, side, side)))
    model = normflows.MultiscaleFlow(bases, flows, merges)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def step(images: Tensor) -> None:
        loss = model.forward_kld((images + torch.rand(images.shape)) / 32)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def rbm_step() -> Callable[[Tensor], None]:
    rbm = RBM([1, SIDE, SIDE], HIDDEN, negative_phase=PCD(gibbs_steps=1, chains=RBM_BATCH))
    rbm.initialize(digits())
    optimizer = torch.optim.SGD(rbm.parameters(), lr=0.01, momentum=0.9, fused=True)

    def step(images: Tensor) -> None:
        loss = rbm(images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def scikit_learn_step() -> Callable[[Tensor], None]:
    from sklearn.neural_network import BernoulliRBM

    rbm = BernoulliRBM(
        n_components=HIDDEN, learning_rate=0.01, batch_size=RBM_BATCH, random_state=0
    )
    rows = digits().flatten(1).float().numpy()
    rbm.partial_fit(rows)
    for name in (
        "components_",
        "intercept_visible_",
        "intercept_hidden_",
        "h_samples_",
    ):  # it starts in float64
        setattr(rbm, name, getattr(rbm, name).astype("float32"))
    return lambda images: rbm.partial_fit(rows)


def learnergy_step() -> Callable[[Tensor], None]:
    from learnergy.models import bernoulli
    from torch.utils.data import TensorDataset

    rbm = bernoulli.RBM(
        n_visible=SIDE**2, n_hidden=HIDDEN, steps=1, learning_rate=0.01, momentum=0.9
    )
    rows = TensorDataset(
        digits().flatten(1).float().repeat(LEARNERGY_BATCHES, 1),
        torch.zeros(LEARNERGY_BATCHES * RBM_BATCH),
    )
    return lambda images: rbm.fit(rows, batch_size=RBM_BATCH, epochs=1)


def gibbs_sweeps() -> Callable[[Tensor], None]:
    rbm = RBM(SIDE**2, HIDDEN)
    chain = gibbs(rbm, white_noise(rbm, RBM_BATCH))

    def step(images: Tensor) -> None:
        with torch.no_grad():
            for _ in range(TEMPERATURES):
                next(chain)

    return step


def tempering_sweep() -> Callable[[Tensor], None]:
    rbm = RBM(SIDE**2, HIDDEN)
    ladder = ParallelTempering(TEMPERATURES, RBM_BATCH, adapt=True)
    ladder.allocate(HIDDEN)

    def step(images: Tensor) -> None:
        with torch.no_grad():
            ladder.sweep(rbm)

    return step


def digits() -> Tensor:
    return (torch.rand(RBM_BATCH, 1, SIDE, SIDE) < 0.2).to(torch.uint8)


def faces() -> Tensor:
    return torch.randint(0, 32, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8)


class Program(NamedTuple):
    name: str
    make: Callable[[], Callable[[Tensor], None]]
    updates: int = 1  # of one call


class Contest(NamedTuple):
    """Programs that do the same work; the first one is what the others are measured by."""

    title: str
    unit: str
    per_update: int  # units
    threads: int
    repeats: int
    images: Callable[[], Tensor]
    programs: list[Program]
    counted: int  # the program whose arithmetic is counted


CONTESTS = [
    Contest(
        f"Glow, {SIZE}x{SIZE} colour, {LEVELS} levels of {STEPS} steps, width {WIDTH}, batch {BATCH}",
        "images/s",
        BATCH,
        2,
        8,
        faces,
        [
            Program("normflows", normflows_step),
            Program("flowgen", lambda: flowgen_step(compiled=False)),
            Program("flowgen, trainer.compile=true", lambda: flowgen_step(compiled=True)),
        ],
        1,
    ),
    Contest(
        f"RBM, PCD-1, {SIDE**2} visible and {HIDDEN} hidden units, batch {RBM_BATCH}, float32 (learnergy: its CD-1)",
        "updates/s",
        1,
        1,
        100,
        digits,
        [
            Program("scikit-learn BernoulliRBM", scikit_learn_step),
            Program("learnergy RBM", learnergy_step, LEARNERGY_BATCHES),
            Program("flowgen RBM", rbm_step),
        ],
        2,
    ),
    Contest(
        f"{RBM_BATCH} chains of that RBM",
        "calls/s",
        1,
        1,
        20,
        digits,
        [
            Program(f"{TEMPERATURES} Gibbs sweeps", gibbs_sweeps),
            Program(f"1 tempering sweep of {TEMPERATURES} temperatures", tempering_sweep),
        ],
        0,
    ),
]


class MetricValue(NamedTuple):
    speeds: list[float]  # units per second, a round each
    flops: float  # of a unit; 0 where they are not counted
    flops_per_second: float  # of float32 matrix products here, on as many threads


def measure(contest: Contest, program: Program, rounds: int) -> MetricValue:
    """How fast a program is in this process."""
    torch.set_num_threads(contest.threads)
    torch.manual_seed(0)
    images, step, flops = contest.images(), program.make(), 0.0
    calls = max(1, contest.repeats // program.updates)
    if program is contest.programs[contest.counted]:
        with FlopCounterMode(display=False) as counter:
            step(images)
        flops = counter.get_total_flops() / contest.per_update

    def once(calls: int) -> float:
        return (
            calls
            * program.updates
            * contest.per_update
            / seconds(lambda: [step(images) for _ in range(calls)])
        )

    once(min(calls, 3))  # the first steps compile and allocate
    speeds = [once(calls) for _ in range(rounds)]
    square = torch.randn(2048, 2048)
    return MetricValue(
        speeds,
        flops,
        2 * 2048**3 / min(seconds(lambda: square @ square) for _ in range(2 * rounds)),
    )


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def compare(contest: Contest, number: int, rounds: int, turns: int) -> None:
    """Let the programs of a contest take turns, each in a process of its own, and print what they reached."""
    found: list[list[MetricValue]] = [[] for _ in contest.programs]
    for _ in range(turns):
        for place in range(len(contest.programs)):
            words = [
                sys.executable,
                __file__,
                "--only",
                f"{number} {place}",
                "--rounds",
                str(rounds),
            ]
            threads = {
                name: str(contest.threads)
                for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
            }
            out = subprocess.run(
                words, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | threads
            ).stdout
            found[place].append(MetricValue(*json.loads(out.splitlines()[-1])))
    everything = [measured for turns_ in found for measured in turns_]
    rate, flops = (
        max(measured.flops_per_second for measured in everything),
        max(measured.flops for measured in everything),
    )
    print(f"{contest.title}, {contest.threads} threads; matrix products {rate / 1e9:.0f} GFLOP/s")
    first = max(speed for measured in found[0] for speed in measured.speeds)
    for program, turns_ in zip(contest.programs, found, strict=True):
        speeds = [speed for measured in turns_ for speed in measured.speeds]
        best, share = max(speeds), max(speeds) * flops / rate
        reached = f"{best:7.1f} {contest.unit}, slowest round {min(speeds):.1f}"
        print(
            f"  {program.name:40} {reached}  {best / first:.2f}x  {share:.0%} of that rate",
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
        help="of flowgen's networks inside couplings",
    )
    parser.add_argument(
        "--contest", type=int, action="append", choices=range(len(CONTESTS)), help="by default all"
    )
    parser.add_argument(
        "--only", help=argparse.SUPPRESS
    )  # contest and program, in a process of its own
    options = parser.parse_args()
    if options.only:
        contest, program = map(int, options.only.split())
        print(
            json.dumps(
                measure(CONTESTS[contest], CONTESTS[contest].programs[program], options.rounds)
            )
        )
        return
    if options.precision != "auto":
        os.environ["FLOWGEN_PRECISION"] = options.precision
    dtype = str(autocast_dtype("auto", torch.device("cpu"))).removeprefix("torch.")
    kernels = f"{torch.backends.cpu.get_cpu_capability()} kernels, oneDNN {'on' if torch.backends.mkldnn.is_available() else 'off'}"
    print(
        f"{datetime.now(UTC):%Y-%m-%d}  {platform.machine()}  torch {torch.__version__}  {kernels}, flowgen's networks in {dtype}"
    )
    for number in options.contest or range(len(CONTESTS)):
        compare(CONTESTS[number], number, options.rounds, options.turns)


if __name__ == "__main__":
    main()
