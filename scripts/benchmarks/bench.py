"""Compare the speed with other programs: normflows, scikit-learn, learnergy and plain torch.

All programs use the same number of threads. normflows is used as in its documentation
(`GlowBlock`, `MultiscaleFlow`) with a forward pass, a backward pass and Adam; scikit-learn is used
through `partial_fit`, and learnergy through `fit`. The models of `plain_models` do the same
operations as rosinality/glow-pytorch and as the TarFlow of its authors, apple/ml-tarflow.

Every program runs in its own process, and the programs take turns. The script prints medians over
all rounds with their range: the speed per second of CPU time, summed over threads, and per second
of wall time. Other work on the machine changes the second much more than the first. It also prints
the FLOPs per CPU second as a share of those of a 3x3 convolution on the same machine, in the
precision of the program. For all programs of a comparison it assumes the FLOPs of convolutions and
matrix products that torch counts in one of them. The results are saved as JSON, with the name of
the processor.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch._functorch.config as aot_config
from flops import count_flops
from plain_models import PlainGlow, PlainTarFlow
from torch import Tensor, nn

from flowgen.models.flows.glow import Glow
from flowgen.models.flows.tarflow import TarFlow
from flowgen.models.rbm.negative_phase import PCD
from flowgen.models.rbm.rbm import RBM
from flowgen.models.rbm.sampling import ParallelTempering, gibbs, white_noise
from flowgen.training.device import autocast_dtype

IMAGE_SIZE = 64  # height and width of the images
GLOW_LEVELS = 4
GLOW_STEPS = 8  # steps of flow per level
GLOW_WIDTH = 128
GLOW_BATCH_SIZE = 8
GRAD_CLIP = 50.0
TARFLOW_PATCH = 4
TARFLOW_LAYERS = [2, 2, 2, 2]  # layers of each block
TARFLOW_WIDTH = 64
TARFLOW_HEADS = 2
TARFLOW_BATCH_SIZE = 16
RBM_SIZE = 28
RBM_HIDDEN = 500
RBM_BATCH_SIZE = 100
LEARNERGY_BATCHES = 20  # per call
TEMPERATURES = 10
CONV_WIDTH = 128  # channels of the convolutions that measure the machine
CONV_SIZE = 32  # height and width of their images
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

Step = Callable[[Tensor], object]


def flowgen_glow() -> Glow:
    """Return flowgen's Glow."""
    model = Glow(
        image_shape=(3, IMAGE_SIZE, IMAGE_SIZE),
        bits=5,
        levels=GLOW_LEVELS,
        steps_per_level=GLOW_STEPS,
        width=GLOW_WIDTH,
    )
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.initialize(torch.randint(0, 32, (64, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8))
    return model


def flowgen_glow_step(compiled: bool) -> Step:
    """Return a training step of flowgen's Glow."""
    model = flowgen_glow()
    if compiled:
        aot_config.backward_pass_autocast = "off"  # as in the trainer
        model.compile()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    dtype = autocast_dtype("auto", torch.device("cpu"))

    def step(images: Tensor) -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(images)
        optimizer.zero_grad()
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        norm = nn.utils.get_total_norm(gradients)  # type: ignore[arg-type]
        if norm > GRAD_CLIP:
            nn.utils.clip_grads_with_norm_(model.parameters(), GRAD_CLIP, norm)
        optimizer.step()

    return step


def normflows_glow() -> Any:
    """Return normflows' Glow."""
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
        size = IMAGE_SIZE // 2 ** (GLOW_LEVELS - level)
        if level > 0:
            merges.append(normflows.flows.Merge())
            channels //= 2
        bases.append(normflows.distributions.GlowBase((channels, size, size)))
    return normflows.MultiscaleFlow(bases, flows, merges)


def normflows_glow_step() -> Step:
    """Return a training step of normflows' Glow."""
    model = normflows_glow()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def step(images: Tensor) -> None:
        loss = model.forward_kld((images + torch.rand(images.shape)) / 32)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def plain_glow_step() -> Step:
    """Return a training step of a plain Glow."""
    model = PlainGlow(GLOW_LEVELS, GLOW_STEPS, GLOW_WIDTH)
    return training(model, torch.float32, fused=False)


def flowgen_samples() -> Step:
    """Return a function that draws a batch from flowgen's Glow."""
    model = flowgen_glow().eval()
    return lambda images: model.sample(GLOW_BATCH_SIZE)


def normflows_samples() -> Step:
    """Return a function that draws a batch from normflows' Glow."""
    model = normflows_glow().eval()
    model.forward_kld(torch.rand(64, 3, IMAGE_SIZE, IMAGE_SIZE))  # initializes ActNorm

    def step(images: Tensor) -> None:
        with torch.no_grad():
            model.sample(GLOW_BATCH_SIZE)

    return step


def plain_tarflow() -> PlainTarFlow:
    """Return a plain TarFlow."""
    return PlainTarFlow(IMAGE_SIZE, TARFLOW_PATCH, TARFLOW_LAYERS, TARFLOW_WIDTH, TARFLOW_HEADS)


def flowgen_tarflow() -> TarFlow:
    """Return flowgen's TarFlow with the architecture of the paper."""
    model = TarFlow(
        image_shape=(3, IMAGE_SIZE, IMAGE_SIZE),
        bits=5,
        patch=TARFLOW_PATCH,
        num_layers=TARFLOW_LAYERS,
        width=TARFLOW_WIDTH,
        num_heads=TARFLOW_HEADS,
        transform="affine",
        local=False,
        permutation="none",
        gaussianize=False,
    )
    model.initialize(torch.randint(0, 32, (64, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8))
    return model


def training(model: nn.Module, dtype: torch.dtype, fused: bool) -> Step:
    """Return a training step of a model that computes its loss.

    Args:
        model: The model.
        dtype: Number format of autocast.
        fused: Whether AdamW updates all parameters in one kernel.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)

    def step(images: Tensor) -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def sampling(model: Any) -> Step:
    """Return a function that draws a batch of samples."""
    return lambda images: model.sample(TARFLOW_BATCH_SIZE)


def flowgen_rbm_step() -> Step:
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


def scikit_learn_rbm_step() -> Step:
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


def learnergy_rbm_step() -> Step:
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


def random_faces(count: int = GLOW_BATCH_SIZE) -> Tensor:
    """Return a batch of random color images of 5 bits."""
    return torch.randint(0, 32, (count, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)


class Program(NamedTuple):
    """A program of a comparison.

    Attributes:
        name: Name in the table.
        make_step: Returns its step.
        updates: Number of updates of the weights in one call of the step.
        precision: Precision of most of its arithmetic: float32, or "auto" as in flowgen.
    """

    name: str
    make_step: Callable[[], Step]
    updates: int = 1
    precision: str = "float32"


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


TARFLOW_TITLE = (
    f"TarFlow, {IMAGE_SIZE}x{IMAGE_SIZE} in color, {len(TARFLOW_LAYERS)} blocks of "
    f"{TARFLOW_LAYERS[0]} layers, width {TARFLOW_WIDTH}, batch {TARFLOW_BATCH_SIZE}"
)
COMPARISONS = [
    Comparison(
        f"Glow, {IMAGE_SIZE}x{IMAGE_SIZE} in color, {GLOW_LEVELS} levels of {GLOW_STEPS} steps, "
        f"width {GLOW_WIDTH}, batch {GLOW_BATCH_SIZE}",
        "images/s",
        per_update=GLOW_BATCH_SIZE,
        num_threads=2,
        updates=8,
        make_images=random_faces,
        programs=[
            Program("normflows", normflows_glow_step),
            Program("plain Glow", plain_glow_step),
            Program("flowgen", lambda: flowgen_glow_step(compiled=False), precision="auto"),
            Program(
                "flowgen, trainer.compile=true",
                lambda: flowgen_glow_step(compiled=True),
                precision="auto",
            ),
        ],
        flop_counted=2,
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
            Program("scikit-learn BernoulliRBM", scikit_learn_rbm_step),
            Program("learnergy RBM", learnergy_rbm_step, LEARNERGY_BATCHES),
            Program("flowgen RBM", flowgen_rbm_step),
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
    *(
        Comparison(
            f"Training of {TARFLOW_TITLE}, {precision}",
            "images/s",
            per_update=TARFLOW_BATCH_SIZE,
            num_threads=1,
            updates=4,
            make_images=lambda: random_faces(TARFLOW_BATCH_SIZE),
            programs=[
                Program(
                    "plain TarFlow",
                    partial(lambda dtype: training(plain_tarflow(), dtype, False), dtype),
                    precision=precision,
                ),
                Program(
                    "flowgen",
                    partial(lambda dtype: training(flowgen_tarflow(), dtype, True), dtype),
                    precision=precision,
                ),
            ],
            flop_counted=1,
        )
        for precision, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    ),
    Comparison(
        f"Samples of {TARFLOW_TITLE}, float32",
        "images/s",
        per_update=TARFLOW_BATCH_SIZE,
        num_threads=1,
        updates=1,
        make_images=random_faces,
        programs=[
            Program("plain TarFlow", lambda: sampling(plain_tarflow())),
            Program("flowgen", lambda: sampling(flowgen_tarflow())),
        ],
        flop_counted=0,
    ),
    Comparison(
        f"Samples of the Glow of comparison 0, {GLOW_BATCH_SIZE} at a time, float32",
        "images/s",
        per_update=GLOW_BATCH_SIZE,
        num_threads=2,
        updates=4,
        make_images=random_faces,
        programs=[Program("normflows", normflows_samples), Program("flowgen", flowgen_samples)],
        flop_counted=1,
    ),
]


@dataclass
class Measurement:
    """The speed of a program in one process.

    Attributes:
        cpu_speeds: Units per second of CPU time, summed over threads, in each round.
        wall_speeds: Units per second of wall time in each round.
        flops: FLOPs per unit, or 0 if they are not counted.
        conv_flops: FLOPs per second of CPU time of a large convolution in the same precision.
    """

    cpu_speeds: list[float]
    wall_speeds: list[float]
    flops: float
    conv_flops: float


def measure(comparison: Comparison, program: Program, rounds: int) -> Measurement:
    """Measure a program in this process."""
    torch.manual_seed(0)
    images = comparison.make_images()
    step = program.make_step()
    calls = max(1, comparison.updates // program.updates)
    units = calls * program.updates * comparison.per_update
    flops = 0.0
    if program is comparison.programs[comparison.flop_counted]:
        flops = count_flops(lambda: step(images)) / comparison.per_update
    for _ in range(3):
        step(images)  # the first steps compile and allocate
    times = [seconds(lambda: [step(images) for _ in range(calls)]) for _ in range(rounds)]
    return Measurement(
        [units / cpu for cpu, _ in times],
        [units / wall for _, wall in times],
        flops,
        conv_flops(program.precision, rounds),
    )


def conv_flops(precision: str, rounds: int) -> float:
    """Return the FLOPs per second of CPU time of a 3x3 convolution, the median of all rounds."""
    dtype = autocast_dtype(precision, torch.device("cpu"))
    x = torch.randn(GLOW_BATCH_SIZE, CONV_WIDTH, CONV_SIZE, CONV_SIZE, dtype=dtype)
    x = x.to(memory_format=torch.channels_last)
    weight = torch.randn(CONV_WIDTH, CONV_WIDTH, 3, 3, dtype=dtype)
    nn.functional.conv2d(x, weight, padding=1)  # the first call allocates
    times = [seconds(lambda: nn.functional.conv2d(x, weight, padding=1)) for _ in range(2 * rounds)]
    return 2 * 9 * CONV_WIDTH * x.numel() / median(cpu for cpu, _ in times)


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Return the CPU time and the wall time that a function takes, in seconds."""
    cpu_start = time.process_time()
    wall_start = time.perf_counter()
    work()
    return time.process_time() - cpu_start, time.perf_counter() - wall_start


def measure_in_process(
    index: int, program_index: int, rounds: int, num_threads: int
) -> Measurement:
    """Measure a program in a new process."""
    worker = ["--worker", f"{index} {program_index}", "--rounds", str(rounds)]
    output = subprocess.run(
        [sys.executable, __file__, *worker],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | dict.fromkeys(THREAD_VARIABLES, str(num_threads)),
    ).stdout
    return Measurement(**json.loads(output.splitlines()[-1]))


def compare(
    index: int, rounds: int, turns: int, num_threads: int, leave_out: str | None
) -> list[dict[str, Any]]:
    """Let the programs of a comparison take turns, print their speeds and return them as rows."""
    comparison = COMPARISONS[index]
    measurements: dict[int, list[Measurement]] = {
        program_index: []
        for program_index, program in enumerate(comparison.programs)
        if not leave_out or leave_out not in program.name
    }
    for _ in range(turns):
        for program_index, program_measurements in measurements.items():
            program_measurements.append(
                measure_in_process(index, program_index, rounds, num_threads)
            )
    flops = max(item.flops for items in measurements.values() for item in items)
    rows = [
        row(comparison, comparison.programs[program_index], items, flops, num_threads)
        for program_index, items in measurements.items()
    ]
    print(f"{comparison.title}; threads: {num_threads}")
    for result in rows:
        cpu, wall = result["per_cpu_second"], result["per_second"]
        print(
            f"  {result['program']:40} {cpu['median']:7.1f} [{cpu['min']:.1f}..{cpu['max']:.1f}] "
            f"{comparison.unit} of CPU time  "
            f"{cpu['median'] / rows[0]['per_cpu_second']['median']:.2f}x  "
            f"{result['share_of_convolution']:.0%} of a convolution; "
            f"{wall['median']:.1f} [{wall['min']:.1f}..{wall['max']:.1f}] of wall time",
            flush=True,
        )
    return rows


def row(
    comparison: Comparison,
    program: Program,
    measurements: list[Measurement],
    flops: float,
    num_threads: int,
) -> dict[str, Any]:
    """Return the results of one program, as they are saved."""
    cpu_speeds = [speed for item in measurements for speed in item.cpu_speeds]
    wall_speeds = [speed for item in measurements for speed in item.wall_speeds]
    rate = median(item.conv_flops for item in measurements)
    return {
        "comparison": comparison.title,
        "program": program.name,
        "threads": num_threads,
        "unit": comparison.unit.split("/")[0],
        "per_cpu_second": spread(cpu_speeds),
        "per_second": spread(wall_speeds),
        "convolution_gflops_per_cpu_second": rate / 1e9,
        "share_of_convolution": median(cpu_speeds) * flops / rate,
    }


def spread(values: list[float]) -> dict[str, float]:
    """Return the median and the range of values."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def processor_name() -> str:
    """Return the name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")  # on Linux only
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--threads", type=int, help="threads of all programs, instead of 1 or 2")
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
    parser.add_argument("--leave-out", help="leave out programs with this text in their name")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench.json"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # indices of comparison and program
    args = parser.parse_args()
    if args.worker:
        index, program_index = map(int, args.worker.split())
        comparison = COMPARISONS[index]
        torch.set_num_threads(int(os.environ[THREAD_VARIABLES[0]]))
        measurement = measure(comparison, comparison.programs[program_index], args.rounds)
        print(json.dumps(asdict(measurement)))
        return
    if args.precision != "auto":
        os.environ["FLOWGEN_PRECISION"] = args.precision
    machine = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "precision": str(autocast_dtype("auto", torch.device("cpu"))).removeprefix("torch."),
    }
    print("  ".join(f"{key}: {value}" for key, value in machine.items()))
    rows = []
    for index in args.comparison or range(len(COMPARISONS)):
        threads = args.threads or COMPARISONS[index].num_threads
        rows += compare(index, args.rounds, args.turns, threads, args.leave_out)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({**machine, "rows": rows}, indent=2) + "\n")
    print(f"saved {args.out}")


if __name__ == "__main__":
    main()
