"""Restricted Boltzmann machines: model, samplers, negative phases and estimates of log Z."""

from flowgen.utils import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "energy": "energy",
        "log_z": "log_z",
        "negative_phase": "negative_phase",
        "rbm": "rbm",
        "sampling": "sampling",
        "Estimate": "log_z",
        "LogZ": "log_z",
        "ais": "log_z",
        "bridge": "log_z",
        "estimate_log_z": "log_z",
        "exact_log_z": "log_z",
        "reverse_ais": "log_z",
        "CD": "negative_phase",
        "MeanField": "negative_phase",
        "NegativePhase": "negative_phase",
        "PCD": "negative_phase",
        "Tempering": "negative_phase",
        "RBM": "rbm",
        "ParallelTempering": "sampling",
        "gibbs": "sampling",
        "mean_field": "sampling",
        "tempering": "sampling",
    },
)
