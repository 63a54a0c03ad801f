"""log Z of an RBM, see `flowgen.models.rbm.partition`."""

from flowgen.models.rbm.partition import Estimate, ais, bridge, exact_log_z, reverse_ais

__all__ = ["Estimate", "ais", "bridge", "exact_log_z", "reverse_ais"]
