"""Restricted Boltzmann machines: model, samplers, negative phases and estimates of log Z."""

from flowgen.utils import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {name: name for name in ("energy", "log_z", "negative_phase", "rbm", "sampling")},
)
