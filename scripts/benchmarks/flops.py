"""Count floating-point operations."""

from collections.abc import Callable

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_flops(work: Callable[[], object]) -> int:
    """Return the FLOPs of the convolutions and matrix products of a function, attention included.

    Args:
        work: The function, which is called once.
    """
    # On a CPU, the counter knows no kernel of attention except the math kernel.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return int(counter.get_total_flops())
