"""Where checkpoints name the classes of `flowgen.models.rbm.negative_phase`."""

from flowgen.models.rbm.negative_phase import CD, PCD, MeanField, NegativePhase, Tempering

__all__ = ["CD", "PCD", "MeanField", "NegativePhase", "Tempering"]
