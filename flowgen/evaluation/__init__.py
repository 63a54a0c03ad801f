"""Evaluation of generative models: sample quality, out-of-distribution scores, interpolation."""

from flowgen.utils import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "AUROC": "ood",
        "OODDetector": "ood",
        "auroc": "ood",
        "png_complexity": "ood",
        "Classifier": "sample_quality",
        "PrincipalComponents": "sample_quality",
        "SampleQuality": "sample_quality",
        "coverage": "sample_quality",
        "fid_metrics": "sample_quality",
        "frechet_distance": "sample_quality",
        "measure_sample_quality": "sample_quality",
        "train_classifier": "sample_quality",
        "interpolate_pairs": "interpolation",
        "lerp": "interpolation",
        "slerp": "interpolation",
        "step_sizes": "interpolation",
        "unevenness": "interpolation",
        "Directions": "latent_directions",
        "Moments": "latent_directions",
        "compute_moments": "latent_directions",
        "fit_directions": "latent_directions",
        "move_along": "latent_directions",
        "Mean": "stats",
        "jackknife_errors": "stats",
        "mean": "stats",
        "paired_difference": "stats",
    },
)
