"""Attributes as directions in the latents of a model."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from flowgen.models.base import ClassConditional, GenerativeModel
from flowgen.utils.errors import UserError

RIDGE = 10.0  # images in which an attribute goes with nothing, as many as the ridge is worth
BATCH = 64


class Moments(NamedTuple):
    """Of so many `images`: the means of their latents (D,) and attributes (K,), and the attributes' covariances (K, K) and (K, D)."""

    images: Tensor
    latent: Tensor
    attributes: Tensor
    among: Tensor
    across: Tensor


@torch.no_grad()
def moments(model: GenerativeModel, batches: Iterable[tuple[Tensor, Tensor]]) -> Moments:
    """Of batches of levels and attributes (batch, K), in double precision on the CPU."""
    generator = torch.Generator(model.device).manual_seed(0)
    sums: list[Tensor] = []
    for images, attributes in batches:
        a, z = (
            attributes.double().cpu(),
            model.encode(images.to(model.device), generator).double().cpu(),
        )
        batch = [torch.tensor(len(a), dtype=torch.double), z.sum(0), a.sum(0), a.T @ a, a.T @ z]
        sums = [one + other for one, other in zip(sums, batch, strict=True)] if sums else batch
    count, z_mean, a_mean, among, across = sums[0], *(each / sums[0] for each in sums[1:])
    return Moments(
        count,
        z_mean,
        a_mean,
        among - torch.outer(a_mean, a_mean),
        across - torch.outer(a_mean, z_mean),
    )


def ridge(found: Moments) -> Tensor:
    """The change of the latents with each attribute while the others stay: (C_aa + r/N diag C_aa)^-1 C_az, (K, D).

    Hoerl and Kennard, Ridge regression (1970), on attributes of one variance.
    """
    variances = found.among.diagonal().diag()
    return torch.linalg.solve(found.among + RIDGE / found.images * variances, found.across)


def mean_difference(found: Moments) -> Tensor:
    """The mean of the latents with each attribute less that without it, (K, D), whatever else goes with it: 1807.03039, section 5."""
    return found.across / found.among.diagonal()[:, None]


def class_means(found: Moments) -> Tensor:
    """The mean of the latents of each class, (K, D), where the attributes are the classes, one-hot."""
    return found.latent + found.across / found.attributes[:, None]


METHODS = {"ridge": ridge, "difference": mean_difference}


@dataclass(frozen=True)
class Directions:
    """How the latents of a model change with attributes, (names, D) `changes` from without each to with it.

    Where the attributes are `classes`, which exclude one another, these are the classes' middles, and an image moves away from its own.
    """

    names: tuple[str, ...]
    changes: Tensor
    classes: bool = False

    def step(self, amounts: Mapping[str, float], own: Tensor | None = None) -> Tensor:
        """What to add to latents for `amounts` of the attributes: (D,), or (batch, D) for images whose classes are `own` (batch,).

        Raises FlowgenError for an attribute that there is not.
        """
        for name in amounts:
            if name not in self.names:
                raise UserError(
                    f"{'class' if self.classes else 'attribute'} {name} is not there: choose one of {', '.join(self.names)}"
                )
        chosen = self.changes[[self.names.index(name) for name in amounts]]
        weights = chosen.new_tensor(list(amounts.values()))
        step = weights @ chosen
        return step if own is None else step - weights.sum() * self.changes[own]

    def nearest(self, latent: Tensor) -> Tensor:
        """The classes whose middles are nearest to latents (batch, D): (batch,)."""
        return torch.cdist(latent, self.changes).argmin(1)


def directions_from(
    found: Moments, names: tuple[str, ...], classes: bool, method: str = "ridge"
) -> Directions:
    """By the method of that name for attributes; classes have their means. Attributes that tell no images apart are left out.

    Raises FlowgenError where none is left.
    """
    kept = (found.among.diagonal() > 1e-12).nonzero().flatten()
    if not len(kept):
        raise UserError(
            "no attribute tells these images apart: label some that have one and some that have not"
        )
    found = found._replace(
        attributes=found.attributes[kept],
        among=found.among[kept][:, kept],
        across=found.across[kept],
    )
    changes = class_means(found) if classes else METHODS[method](found)
    return Directions(tuple(names[place] for place in kept), changes.float(), classes)


def class_directions(model: ClassConditional) -> Directions:
    """From class to class of a model that knows them itself."""
    middles = model.class_latents().detach()
    return Directions(tuple(map(str, range(len(middles)))), middles, classes=True)


@torch.no_grad()
def move_along(
    model: GenerativeModel,
    directions: Directions,
    images: Tensor,
    amounts: Mapping[str, float],
    shares: Tensor,
) -> Tensor:
    """Images of `levels` (N, channels, height, width) moved by each of `shares` (steps,) of `amounts`: (steps, N, ...), on the CPU.

    The noise within their levels is drawn, the same at every call. Raises FlowgenError for an attribute that there is not.
    """
    generator, batches = (
        torch.Generator(model.device).manual_seed(0),
        images.to(model.device).split(BATCH),
    )
    latent = torch.cat([model.encode(batch, generator) for batch in batches])
    own = None
    if directions.classes:
        if isinstance(model, ClassConditional) and model.num_classes is not None:
            own = torch.cat([model.classify(batch) for batch in batches]).argmax(1)
        else:
            own = directions.nearest(latent)
    step = directions.step(amounts, own)
    moved = latent + shares.to(latent)[:, None, None] * step
    return (
        torch.cat([model.decode(part) for part in moved.flatten(0, 1).split(BATCH)])
        .view(len(shares), *images.shape)
        .cpu()
    )


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Classes (N,) as attributes, (N, classes)."""
    return F.one_hot(labels.long(), classes)
