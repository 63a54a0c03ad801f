"""Data sets: images with fixed splits, preprocessing and batches."""

from flowgen.utils import lazy_exports

DOWNLOADABLE = (
    "CIFAR10",
    "HubDataset",
    "MNIST",
    "SVHN",
)  # classes that download their files if they are missing

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "CIFAR10": "cifar10",
        "DownsampledImageNet": "imagenet",
        "Energy2D": "energy2d",
        "HubDataset": "hub",
        "ImageDataset": "dataset",
        "ImageFolder": "image_folder",
        "ImageStream": "preprocess",
        "MNIST": "mnist",
        "MNISTSample": "mnist",
        "SVHN": "svhn",
        "Split": "splits",
        "Toy2D": "toy2d",
    },
)
