"""Training: the trainer and its settings, optimizers, checkpoints and the folders of runs."""

from flowgen.utils import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__, {"Run": "run_dir", "Trainer": "trainer", "TrainerConfig": "trainer"}
)
