"""log Z of an RBM, see `flowgen.models.rbm`."""

from flowgen.models.rbm.annealing import ais, reverse_ais
from flowgen.models.rbm.bridge import bridge
from flowgen.models.rbm.partition import Estimate, exact_log_z

__all__ = ["Estimate", "ais", "bridge", "exact_log_z", "reverse_ais"]
