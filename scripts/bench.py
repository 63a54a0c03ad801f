"""Training speed beside other packages in the same run: Glow beside normflows, the RBM beside scikit-learn and learnergy.

All run on the same threads: normflows as its documentation shows it (`GlowBlock`, `MultiscaleFlow`), forward, backward and Adam;
scikit-learn by `partial_fit`, learnergy by `fit`. Each is in a process of its own; they take turns, and each one's best round counts,
since a shared machine slows whichever runs at the wrong moment.
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

from flowgen.config import conf_folder
from flowgen.models import RBM, Glow
from flowgen.models.rbm.gibbs import gibbs, white_noise
from flowgen.models.rbm.negative_phase import PCD
from flowgen.models.rbm.tempering import Ladder
from flowgen.training.device import autocast_dtype

SIZE, LEVELS, STEPS, WIDTH, BATCH = 64, 4, 8, 128, 8
SIDE, HIDDEN, RBM_BATCH, TEMPERATURES, LEARNERGY_BATCHES = 28, 500, 100, 10, 20


def flowgen_step(compiled: bool) -> Callable[[Tensor], None]:
    arguments = yaml.safe_load((conf_folder() / "model" / "glow.yaml").read_text()) | {"channels": 3, "size": SIZE, "bits": 5}
    arguments |= {"levels": LEVELS, "steps_per_level": STEPS, "width": WIDTH}
    del arguments["_target_"]
    model = Glow(**arguments).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.initialize(torch.randint(0, 32, (64, 3, SIZE, SIZE), dtype=torch.uint8))
    if compiled:
        model.compile()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    dtype = autocast_dtype("auto", torch.device("cpu"))

    def step(levels: Tensor) -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(levels)
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
        blocks = [normflows.flows.GlowBlock(channels, WIDTH, split_mode="channel", scale=True) for _ in range(STEPS)]
        flows.append([*blocks, normflows.flows.Squeeze()])
        side = SIZE // 2 ** (LEVELS - level)
        if level > 0:
            merges.append(normflows.flows.Merge())
            channels //= 2
        bases.append(normflows.distributions.GlowBase((channels, side, side)))
    model = normflows.MultiscaleFlow(bases, flows, merges)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def step(levels: Tensor) -> None:
        loss = model.forward_kld((levels + torch.rand(levels.shape)) / 32)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def rbm_step() -> Callable[[Tensor], None]:
    rbm = RBM([1, SIDE, SIDE], HIDDEN, negative_phase=PCD(sweeps=1, chains=RBM_BATCH))
    rbm.initialize(digits())
    optimizer = torch.optim.SGD(rbm.parameters(), lr=0.01, momentum=0.9, fused=True)

    def step(levels: Tensor) -> None:
        loss = rbm(levels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def scikit_learn_step() -> Callable[[Tensor], None]:
    from sklearn.neural_network import BernoulliRBM

    rbm = BernoulliRBM(n_components=HIDDEN, learning_rate=0.01, batch_size=RBM_BATCH, random_state=0)
    rows = digits().flatten(1).float().numpy()
    rbm.partial_fit(rows)
    for name in ("components_", "intercept_visible_", "intercept_hidden_", "h_samples_"):  # it starts in float64
        setattr(rbm, name, getattr(rbm, name).astype("float32"))
    return lambda levels: rbm.partial_fit(rows)


def learnergy_step() -> Callable[[Tensor], None]:
    from learnergy.models import bernoulli
    from torch.utils.data import TensorDataset

    rbm = bernoulli.RBM(n_visible=SIDE**2, n_hidden=HIDDEN, steps=1, learning_rate=0.01, momentum=0.9)
    rows = TensorDataset(digits().flatten(1).float().repeat(LEARNERGY_BATCHES, 1), torch.zeros(LEARNERGY_BATCHES * RBM_BATCH))
    return lambda levels: rbm.fit(rows, batch_size=RBM_BATCH, epochs=1)


def gibbs_sweeps() -> Callable[[Tensor], None]:
    rbm = RBM(SIDE**2, HIDDEN)
    chain = gibbs(rbm, white_noise(rbm, RBM_BATCH))

    def step(levels: Tensor) -> None:
        with torch.no_grad():
            for _ in range(TEMPERATURES):
                next(chain)

    return step


def tempering_sweep() -> Callable[[Tensor], None]:
    rbm = RBM(SIDE**2, HIDDEN)
    ladder = Ladder(TEMPERATURES, RBM_BATCH, adapt=True)
    ladder.allocate(HIDDEN)

    def step(levels: Tensor) -> None:
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
    levels: Callable[[], Tensor]
    programs: list[Program]


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
    ),
]


def measure(contest: Contest, program: Program, rounds: int) -> list[float]:
    """Units per second in each of some rounds, in this process."""
    torch.set_num_threads(contest.threads)
    torch.manual_seed(0)
    levels, step = contest.levels(), program.make()
    calls = max(1, contest.repeats // program.updates)

    def once(calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            step(levels)
        return calls * program.updates * contest.per_update / (time.perf_counter() - began)

    once(min(calls, 3))  # the first steps compile and allocate
    return [once(calls) for _ in range(rounds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--only", help=argparse.SUPPRESS)  # contest and program, in a process of its own
    options = parser.parse_args()
    if options.only:
        contest, program = map(int, options.only.split())
        print(json.dumps(measure(CONTESTS[contest], CONTESTS[contest].programs[program], options.rounds)))
        return
    print(f"{datetime.now(UTC):%Y-%m-%d}  {platform.machine()}  torch {torch.__version__}")
    for number, contest in enumerate(CONTESTS):
        speeds: list[list[float]] = [[] for _ in contest.programs]
        for _ in range(options.turns):
            for place, found in enumerate(speeds):
                words = [sys.executable, __file__, "--only", f"{number} {place}", "--rounds", str(options.rounds)]
                threads = {name: str(contest.threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
                environment = os.environ | threads
                found += json.loads(subprocess.run(words, check=True, capture_output=True, text=True, env=environment).stdout)
        print(f"{contest.title}, {contest.threads} threads")
        for program, found in zip(contest.programs, speeds, strict=True):
            ratio = max(found) / max(speeds[0])
            print(f"  {program.name:40} {max(found):7.1f} {contest.unit}, slowest round {min(found):.1f}  {ratio:.2f}x", flush=True)


if __name__ == "__main__":
    main()
