"""Directions in the latent space of a model that correspond to attributes of the images."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flowgen.models.base import ClassConditional, GenerativeModel
from flowgen.utils.errors import UserError, check

RIDGE_IMAGES = 10.0  # the penalty has the weight of this many images with independent attributes
MIN_VARIANCE = 1e-13  # of an attribute that distinguishes images, as a share of its mean square
BATCH_SIZE = 64


class Moments(NamedTuple):
    """First and second moments of the latents z (D,) and attributes a (K,) of labeled images."""

    num_images: Tensor  # a scalar
    latent_mean: Tensor  # (D,)
    attribute_mean: Tensor  # (K,)
    attribute_cov: Tensor  # covariance of the attributes, (K, K)
    cross_cov: Tensor  # covariance of attributes and latents, (K, D)


@torch.no_grad()
def compute_moments(model: GenerativeModel, batches: Iterable[tuple[Tensor, Tensor]]) -> Moments:
    """Return the moments of labeled images, in double precision on the CPU.

    Args:
        model: The model that encodes the images.
        batches: Images (batch, channels, height, width) and their attributes (batch, K).
    """
    generator = torch.Generator(model.device).manual_seed(0)
    sums: list[Tensor] = []
    for images, attributes in batches:
        a = attributes.double().cpu()
        z = model.encode(images.to(model.device), generator).double().cpu()
        batch = [torch.tensor(len(a), dtype=torch.double), z.sum(0), a.sum(0), a.T @ a, a.T @ z]
        sums = [total + new for total, new in zip(sums, batch, strict=True)] if sums else batch
    count, *totals = sums
    z_mean, a_mean, aa_mean, az_mean = (total / count for total in totals)
    return Moments(
        num_images=count,
        latent_mean=z_mean,
        attribute_mean=a_mean,
        attribute_cov=aa_mean - torch.outer(a_mean, a_mean),
        cross_cov=az_mean - torch.outer(a_mean, z_mean),
    )


def ridge(moments: Moments) -> Tensor:
    """Return the change of the latents with each attribute at constant others, (K, D).

    Ridge regression with standardized attributes (Hoerl and Kennard, 1970):
    (C_aa + r/N diag C_aa)^-1 C_az with r = `RIDGE_IMAGES`.
    """
    penalty = RIDGE_IMAGES / moments.num_images * moments.attribute_cov.diagonal().diag()
    return torch.linalg.solve(moments.attribute_cov + penalty, moments.cross_cov)


def mean_difference(moments: Moments) -> Tensor:
    """Return the mean latent with each attribute minus the mean latent without it, (K, D).

    It includes the effect of correlated attributes (Kingma and Dhariwal, Glow, arXiv:1807.03039,
    section 6).
    """
    return moments.cross_cov / moments.attribute_cov.diagonal()[:, None]


def class_means(moments: Moments) -> Tensor:
    """Return the mean latent of each class, (K, D), where the attributes are one-hot classes."""
    return moments.latent_mean + moments.cross_cov / moments.attribute_mean[:, None]


METHODS = {"ridge": ridge, "difference": mean_difference}


@dataclass(frozen=True)
class Directions:
    """Changes of the latents of a model from images without an attribute to images with it.

    Args:
        names: Names of the attributes, or of the classes.
        changes: Changes of the latents, (names, D); for classes, the mean latent of each class.
        classes: Whether the attributes are classes, which exclude each other. An image then moves
            away from the mean of its class.

    Example:
        >>> directions = Directions(("smile", "hat"), torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        >>> directions.shift({"smile": 0.5, "hat": -1.0})
        tensor([ 0.5000, -2.0000])
    """

    names: tuple[str, ...]
    changes: Tensor
    classes: bool = False

    def shift(self, amounts: Mapping[str, float], image_classes: Tensor | None = None) -> Tensor:
        """Return the change of the latents for the given amounts of attributes.

        Args:
            amounts: Amount of each attribute; 1 moves from without to with.
            image_classes: Classes of the images, (batch,), if the attributes are classes.

        Returns:
            The change, (D,), or (batch, D) with `image_classes`.

        Raises:
            UserError: For an unknown attribute.
        """
        check_names(amounts, self.names, self.classes)
        changes = self.changes[[self.names.index(name) for name in amounts]]
        weights = changes.new_tensor(list(amounts.values()))
        start = 0 if image_classes is None else weights.sum() * self.changes[image_classes]
        return weights @ changes - start

    def nearest_class(self, latent: Tensor) -> Tensor:
        """Return the class with the nearest mean, (batch,), for latents (batch, D)."""
        return torch.cdist(latent, self.changes.to(latent)).argmin(1)


def check_names(wanted: Iterable[str], names: Collection[str], classes: bool) -> None:
    """Raise `UserError` unless `names` of attributes, or of classes, contains all wanted ones."""
    for name in wanted:
        check(
            name in names,
            f"unknown {'class' if classes else 'attribute'} {name}: "
            f"choose one of {', '.join(names)}",
        )


def fit_directions(
    moments: Moments, names: tuple[str, ...], classes: bool, method: str = "ridge"
) -> Directions:
    """Return the directions of attributes or classes.

    Attributes that have the same value in all images are left out.

    Args:
        moments: Result of `compute_moments`.
        names: Names of the K attributes.
        classes: Whether the attributes are one-hot classes, which get their means.
        method: Method for attributes, a key of `METHODS`.

    Raises:
        UserError: If no attribute distinguishes images.
    """
    variance = moments.attribute_cov.diagonal()
    mean_square = variance + moments.attribute_mean.square()
    varying = (variance > MIN_VARIANCE * mean_square).nonzero().flatten()
    if not len(varying):
        raise UserError(
            "every attribute has the same value in all images: "
            "label some images that have it and some that do not"
        )
    moments = moments._replace(
        attribute_mean=moments.attribute_mean[varying],
        attribute_cov=moments.attribute_cov[varying][:, varying],
        cross_cov=moments.cross_cov[varying],
    )
    changes = class_means(moments) if classes else METHODS[method](moments)
    return Directions(tuple(names[index] for index in varying), changes.float(), classes)


def class_directions(model: ClassConditional) -> Directions:
    """Return the directions between the classes of a class-conditional model."""
    means = model.class_latents().detach()
    return Directions(tuple(map(str, range(len(means)))), means, classes=True)


@torch.no_grad()
def move_along(
    model: GenerativeModel,
    directions: Directions,
    images: Tensor,
    amounts: Mapping[str, float],
    fractions: Tensor,
) -> Tensor:
    """Change attributes of images by moving their latents.

    The dequantization noise is the same at every call.

    Args:
        model: The model.
        directions: Directions in its latent space.
        images: Images (N, channels, height, width).
        amounts: Amount of each attribute.
        fractions: Factors on the amounts, (steps,).

    Returns:
        Images (steps, N, channels, height, width) on the CPU.

    Raises:
        UserError: For an unknown attribute.
    """
    generator = torch.Generator(model.device).manual_seed(0)
    batches = images.to(model.device).split(BATCH_SIZE)
    latent = torch.cat([model.encode(batch, generator) for batch in batches])
    image_classes = directions.nearest_class(latent) if directions.classes else None
    if directions.classes and isinstance(model, ClassConditional) and model.num_classes is not None:
        image_classes = torch.cat([model.classify(batch) for batch in batches]).argmax(1)
    shift = fractions.to(latent)[:, None, None] * directions.shift(amounts, image_classes)
    edited = (latent + shift).flatten(0, 1).split(BATCH_SIZE)
    decoded = torch.cat([model.decode(batch) for batch in edited])
    return decoded.view(len(fractions), *images.shape).cpu()
