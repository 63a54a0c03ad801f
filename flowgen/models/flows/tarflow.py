"""What flows of patches share: into how large ones an image is cut, and of what shape their transformers can be."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from flowgen.bijections.autoregressive import (
    Invert,
    TokenAutoregressive,
    TokenHead,
    autoregressive_head,
)
from flowgen.bijections.base import Bijection
from flowgen.bijections.batchnorm import ActNorm
from flowgen.bijections.chain import Chain
from flowgen.bijections.elementwise import MarginalGaussianization, Standardize
from flowgen.bijections.linear import FusedAffine, InvertibleConv1x1LU
from flowgen.bijections.networks import CausalTransformer, RandomSource
from flowgen.bijections.reshape import Flatten, Roll, Squeeze
from flowgen.bijections.univariate import TRANSFORMS, guided
from flowgen.models.base import MAX_DEPTH, SupportsTokenSampling, square_shape
from flowgen.models.flows.flow import Flow
from flowgen.utils.errors import UserError, check_choice, check_number, check_whole


def patch_size(size: int, patch: int | None) -> int:
    """`patch`, or, where that is None, the largest of 4, 2 and 1 that divides `size`. Raises FlowgenError where it does not divide it."""
    if patch is None:
        return next(patch for patch in (4, 2, 1) if size % patch == 0)
    check_whole(patch=patch)
    if size % patch:
        raise UserError(
            f"patch={patch} does not divide images of size={size}: choose one that does, or null"
        )
    return patch


def check_transformers(
    num_layers: Sequence[int], width: int, num_heads: int, dropout: float
) -> None:
    """Raises FlowgenError where these are no transformers, of so many layers each."""
    if not isinstance(num_layers, list | tuple) or not num_layers:
        raise UserError(
            f"layers must be a list of numbers, one for each block, as in model.num_layers=[2,2,4], not {num_layers!r}"
        )
    for depth in num_layers:
        check_whole(high=MAX_DEPTH, num_layers=depth)
    check_whole(width=width, num_heads=num_heads)
    check_number(dropout=dropout)
    if dropout >= 1:
        raise UserError(f"dropout must be below 1, not {dropout}")
    if width % num_heads:
        raise UserError(
            f"width={width} is not a multiple of heads={num_heads}: choose other numbers"
        )


LABEL_DROPOUT = (
    0.1  # share of the training images whose class the networks are not told, for guidance
)


class TarFlow(Flow, SupportsTokenSampling):
    """Patches as tokens, then blocks that are autoregressive in the tokens, in turn from the first to the last and back.

    Networks that see classes are told none, the mean of all, of a few training images, so that they know p(x) for guidance too.
    `conf/model/tarflow.yaml` says what each argument means.
    """

    def __init__(
        self,
        *,
        image_shape: Sequence[int] = (1, 28, 28),
        bits: int = 8,
        patch: int | None = None,
        num_layers: Sequence[int] = (2, 2, 2, 2),
        width: int = 64,
        num_heads: int = 2,
        dropout: float = 0.0,
        transform: str | None = None,
        local: bool = True,
        roll: bool = False,
        permutation: str | None = None,
        gaussianize: bool = True,
        dequantization: str = "uniform",
        num_classes: int | None = None,
        condition_networks: bool = True,
    ):
        channels, size = square_shape(image_shape)
        check_whole(bits=bits)
        check_transformers(num_layers, width, num_heads, dropout)
        transform = ("mixture" if channels == 1 else "affine") if transform is None else transform
        permutation = (
            ("actnorm" if channels == 1 else "plu") if permutation is None else permutation
        )
        check_choice(TRANSFORMS, transform=transform)
        check_choice(("none", "actnorm", "plu"), permutation=permutation)
        check_choice(
            (True, False),
            local=local,
            roll=roll,
            gaussianize=gaussianize,
            condition_networks=condition_networks,
        )
        patch = patch_size(size, patch)
        maps, side = channels * patch**2, size // patch
        seen = num_classes if num_classes is not None and condition_networks else 0

        def block(number: int, depth: int) -> list[Bijection]:
            mix: dict[str, list[Bijection]] = {
                "none": [],
                "actnorm": [ActNorm(maps)],
                "plu": [FusedAffine(ActNorm(maps), InvertibleConv1x1LU(maps))],
            }
            how = TRANSFORMS[transform]("bounded")
            network = CausalTransformer(side**2, maps, width, num_heads, depth, dropout, seen)
            head = (autoregressive_head if local else TokenHead)(maps, width, how)
            return [
                *mix[permutation],
                TokenAutoregressive(network, head, backwards=number % 2 == 1),
            ]

        def rolled(number: int) -> list[Bijection]:
            """Moves the borders of the patches before every second pair of blocks, and back before the others."""
            if not roll or number == 0 or number % 2:
                return []
            pixels = patch // 2 if number % 4 == 2 else -(patch // 2)
            return [Invert(Squeeze(patch)), Roll(pixels), Squeeze(patch)]

        bijections: list[Bijection] = (
            [MarginalGaussianization(channels, 2**bits)] if gaussianize else []
        )
        bijections += [Squeeze(patch), ActNorm(maps)]
        for number, depth in enumerate(num_layers):
            bijections += [*rolled(number), *block(number, depth)]
        bijections += [Flatten(maps, side, side), Standardize(channels * size**2)]
        super().__init__(
            Chain(*bijections),
            image_shape,
            bits,
            dequantization,
            num_classes,
            condition_networks,
        )
        self.random_source = RandomSource()
        self.affine, self.guidance = transform == "affine", 0.0

    @torch.no_grad()
    def sample(
        self,
        count: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        label: int | None = None,
        first: int = 0,
        guidance: float = 0.0,
        jacobi: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """As `Flow.sample`; with guidance w each number of a block is under p(x | class)^(1 + w) / p(x)^w; log p(x | class) is returned."""
        check_number(guidance=guidance)
        try:
            self.guidance = guidance
            with self._blocks_are(jacobi=jacobi):
                return super().sample(count, temperature, generator, label, first)
        finally:
            self.guidance = 0.0

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        with self._blocks_are(exact=True):
            return super().encode(images, generator)

    def _carry(self, z: Tensor, one_hot: Tensor | None) -> tuple[Tensor, Tensor]:
        if not self.guidance:
            return super()._carry(z, one_hot)
        if one_hot is None or not self.affine or not self.condition_networks:
            raise UserError(
                "guidance needs classes and affine maps: train with model.num_classes=10 model.transform=affine"
            )
        conditions = torch.cat((one_hot, torch.full_like(one_hot, 1 / one_hot.shape[1])))
        means = self._class_means()
        towards = self.guidance * (
            one_hot @ means - means.mean(0)
        )  # which is guidance wherever the two maps scale alike
        with guided([block.head for block in self._blocks()], self.guidance):  # type: ignore[misc]
            x = self.bijection.inverse((z + towards).repeat(2, 1), conditions)[0][: len(z)]
        return x, self.log_density(x, one_hot.argmax(1))

    def sweeps(self) -> list[int]:
        return [block.sweeps for block in self._blocks()]

    @contextmanager
    def _blocks_are(self, **flags: bool) -> Iterator[None]:
        blocks = self._blocks()
        try:
            for block in blocks:
                vars(block).update(flags)
            yield
        finally:
            for block in blocks:
                vars(block).update(dict.fromkeys(flags, False))

    def _blocks(self) -> list[TokenAutoregressive]:
        return [module for module in self.modules() if isinstance(module, TokenAutoregressive)]

    def _one_hot(self, labels: Tensor | None) -> Tensor | None:
        one_hot = super()._one_hot(labels)
        if one_hot is None or not self.training or not self.condition_networks:
            return one_hot
        untold = (
            self.random_source(torch.rand, (len(one_hot), 1), device=one_hot.device) < LABEL_DROPOUT
        )
        return torch.where(untold, 1 / one_hot.shape[1], one_hot)
