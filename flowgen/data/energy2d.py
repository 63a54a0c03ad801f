"""Points of unnormalized densities in the plane."""

from typing import Any

import torch

from flowgen.data.dataset import ImageDataset
from flowgen.data.splits import Split
from flowgen.utils.energies import CELLS, ENERGIES, NODES, density_grid
from flowgen.utils.errors import check_choice, check_whole
from flowgen.utils.toy2d import TOY2D_SHAPE


class Energy2D(ImageDataset):
    """Points of an unnormalized density exp(-U(x)) in the square [-4, 4] x [-4, 4].

    The square is divided into 2^bits x 2^bits pixel values. A cell is drawn with its probability,
    which is computed by quadrature. `flowgen.models.ReverseKL` trains with the density itself and
    needs no points, so that they are a test for it.

    Args:
        name: "u1" to "u4" (Rezende and Mohamed, 1505.05770, table 1), "ring" or "mixture".
        num_points: Number of points in each split.
        options: `bits` of `ImageDataset`. Its other options have no effect on points.

    Attributes:
        density: The name of the density.

    Example:
        >>> from flowgen.data import Energy2D
        >>> data = Energy2D(name="ring", num_points=100)
        >>> data.train.images.shape
        torch.Size([100, 2, 1, 1])
    """

    def __init__(self, *, name: str = "u1", num_points: int = 50000, **options: Any):
        check_choice(ENERGIES, name=name)
        check_whole(num_points=num_points)
        self.density = name
        weights = density_grid(name).unfold(0, NODES, NODES).unfold(1, NODES, NODES).sum((2, 3))
        generator = torch.Generator().manual_seed(0)
        cells = torch.multinomial(
            weights.flatten(), 3 * num_points, replacement=True, generator=generator
        )
        values = torch.stack((cells % CELLS, cells // CELLS), 1).to(torch.uint8)
        train, validation, test = map(Split, values.view(3, num_points, *TOY2D_SHAPE))
        super().__init__(train, validation, test, **options)
