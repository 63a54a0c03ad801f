"""Compilation of a model by torch.compile, if a compiler exists and steps become faster."""

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

from flowgen.utils.errors import check, log

TIMED_STEPS = 3  # of each mode, to compare their speed


def compile_model(
    model: nn.Module,
    compute_gradients: Callable[[], None],
    mode: str,
    required: bool,
    min_speedup: float,
) -> bool:
    """Compile a model on one batch, without training it.

    Args:
        model: The model, which is compiled in place.
        compute_gradients: Runs the forward and backward passes of a step.
        mode: Mode of torch.compile.
        required: Whether to raise an error if there is no compiler. Otherwise the model stays in
            eager mode.
        min_speedup: Smallest speedup of compiled steps. Below it, the model returns to eager mode.

    Returns:
        Whether the model is compiled.

    Raises:
        UserError: If it is required and there is no C++ compiler.
    """
    import torch._functorch.config as aot_config  # few runs need these modules
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    if not _is_on_gpu(model):
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            check(
                not required,
                "trainer.compile=true needs a C++ compiler: install g++, or leave it out",
            )
            log.info("steps are not compiled: this needs a C++ compiler, such as g++")
            return False
    eager_seconds = time_steps(model, compute_gradients)
    log.info("compiling the model, which may take minutes")
    start_time = time.monotonic()
    # Gradients of layers without autocast are float32, as in eager mode. By default, the compiler
    # computes them in bfloat16 if the whole model runs under autocast.
    aot_config.backward_pass_autocast = "off"
    model.compile(mode=mode)
    try:
        time_steps(model, compute_gradients, 1)
    except TorchDynamoException as error:
        if required:
            raise
        log.warning("steps are not compiled, because the compiler failed: %s", error)
        model._compiled_call_impl = None
        return False
    compile_seconds = time.monotonic() - start_time
    speedup = eager_seconds / time_steps(model, compute_gradients)
    log.info(
        "compiled in %.0f s: forward and backward passes are %.2f times as fast",
        compile_seconds,
        speedup,
    )
    if speedup < min_speedup:
        log.info("the model stays in eager mode, because this is too little")
        model._compiled_call_impl = None
    return speedup >= min_speedup


def time_steps(
    model: nn.Module, compute_gradients: Callable[[], None], count: int = TIMED_STEPS
) -> float:
    """Return the median time in seconds of `count` forward and backward passes.

    They change neither weights nor buffers.
    """
    # A forward pass changes running statistics and Markov chains.
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    seconds = []
    try:
        for _ in range(count):
            start_time = time.monotonic()
            compute_gradients()
            if _is_on_gpu(model):
                torch.cuda.synchronize()
            seconds.append(time.monotonic() - start_time)
            model.zero_grad()
    finally:
        model.zero_grad()
        for buffer, original in buffers:
            buffer.copy_(original)
    return median(seconds)


def _is_on_gpu(model: nn.Module) -> bool:
    return next(model.parameters()).is_cuda
