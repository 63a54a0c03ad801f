"""What a trained model answers, one question at a time, to a page or a bot that many may ask at once."""

from flowgen.answers.answers import Answers
from flowgen.answers.turns import leave

__all__ = ["Answers", "leave"]
