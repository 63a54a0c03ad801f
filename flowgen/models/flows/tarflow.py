"""TarFlow: Zhai et al., Normalizing Flows are Capable Generative Models (2412.06329)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flowgen.bijections import elementwise, linear, networks, reshape
from flowgen.bijections.autoregressive import TokenAutoregressive, TokenHead, autoregressive_head
from flowgen.bijections.base import Bijection, Chain, Invert
from flowgen.bijections.univariate import Affine, GuidedAffine
from flowgen.models.base import SupportsTokenSampling
from flowgen.models.flows.builders import choose, gaussianization, make_transform, num_cond_channels
from flowgen.models.flows.flow import Flow
from flowgen.models.shapes import check_transformer, choose_patch, split_shape, squeezed
from flowgen.utils.errors import UserError, check_number

LABEL_DROPOUT = 0.1  # share of training images whose class is hidden from the networks


class TarFlow(Flow, SupportsTokenSampling):
    """TarFlow: blocks that are autoregressive in the patches of an image, in alternating order.

    For some training images, the networks get the mean of all classes as their input instead of the
    class. So they also learn p(x), which classifier-free guidance needs. Zhai et al. (2412.06329),
    section 2.6.

    Args:
        image_shape: (channels, height, width).
        bits: Bits per pixel value.
        patch: Side length of the patches, the tokens of the transformers; None selects the largest
            of 4, 2 and 1 that divides height and width.
        num_layers: Layers of the transformer of each block, from the image to the noise. With at
            least two blocks, each patch depends on all others.
        width: Width of the transformers, a multiple of `num_heads`.
        num_heads: Attention heads of the transformers.
        dropout: Dropout of the transformers, from 0 to 1.
        transform: "additive", "multiplicative", "affine" (as in the paper), "spline" or "mixture"
            (of logistics); None selects "affine" for color and "mixture" for gray images.
        local: Make each number depend also on the previous numbers of its patch; False as in the
            paper.
        roll: Shift the borders of the patches every two blocks.
        permutation: Mixing of the channels of a patch before each block: "none" (as in the paper),
            "actnorm" or "plu" (ActNorm and an invertible 1x1 convolution); None selects "plu" for
            color and "actnorm" for gray images.
        gaussianize: Start from the marginal distribution of the pixels if few values are frequent.
        dequantization: "uniform", "variational" or "gaussian:STD" (as in the paper).
        num_classes: Number of classes of a class-conditional model, or None.
        condition_networks: With classes, make the class an input of all networks; p(x) then takes
            one pass per class. Otherwise only the base depends on the class.

    Example:
        >>> import torch
        >>> model = TarFlow(image_shape=(1, 4, 4), bits=5, patch=2, num_layers=[1, 1], width=8)
        >>> images = torch.randint(32, (16, 1, 4, 4), dtype=torch.uint8)
        >>> model.initialize(images)
        >>> model.log_prob(images).shape
        torch.Size([16])
        >>> model.sample(2, jacobi=True)[0].shape
        torch.Size([2, 1, 4, 4])
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
        image_channels, resolution = split_shape(image_shape)
        is_gray = image_channels == 1
        check_transformer(num_layers, width, num_heads, dropout)
        transform_fn = make_transform(transform or ("mixture" if is_gray else "affine"))
        patch = choose_patch(resolution, patch)
        channels = image_channels * patch**2
        rows, columns = squeezed(resolution, patch)

        def block(index: int, depth: int) -> list[Bijection]:
            # All options are built, so that the other parameters do not depend on the choice.
            mixing: dict[str, list[Bijection]] = {
                "none": [],
                "actnorm": [linear.ActNorm(channels)],
                "plu": [
                    linear.FusedAffine(
                        linear.ActNorm(channels), linear.InvertibleConv1x1LU(channels)
                    )
                ],
            }
            network = networks.CausalTransformer(
                rows * columns,
                channels,
                width,
                num_heads,
                depth,
                dropout,
                num_cond_channels(num_classes, condition_networks),
            )
            head = (autoregressive_head if local else TokenHead)(channels, width, transform_fn)
            return [
                *choose("permutation", permutation or ("actnorm" if is_gray else "plu"), mixing),
                TokenAutoregressive(network, head, reverse=index % 2 == 1),
            ]

        def shift(index: int) -> list[Bijection]:
            """Roll the image before every second pair of blocks, and back before the others."""
            if not roll or index == 0 or index % 2:
                return []
            pixels = patch // 2 if index % 4 == 2 else -(patch // 2)
            return [Invert(reshape.Squeeze(patch)), reshape.Roll(pixels), reshape.Squeeze(patch)]

        chain = Chain(
            *gaussianization(gaussianize, image_channels, bits),
            reshape.Squeeze(patch),
            linear.ActNorm(channels),
            *(
                bijection
                for index, depth in enumerate(num_layers)
                for bijection in (*shift(index), *block(index, depth))
            ),
            reshape.Flatten(channels, rows, columns),
            elementwise.Standardize(channels * rows * columns),
        )
        super().__init__(chain, image_shape, bits, dequantization, num_classes, condition_networks)
        self.random_source = networks.RandomSource()
        self.transform = transform_fn
        self.guidance = 0.0

    @torch.no_grad()
    def sample(
        self,
        count: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        label: int | None = None,
        start_index: int = 0,
        guidance: float = 0.0,
        jacobi: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Draw images, and return them with their log p(x), (count,), as in `Flow.sample`.

        With guidance w, each number of a block follows p(x | class)^(1 + w) / p(x)^w, and
        log p(x | class) is returned.

        Args:
            count: Number of images.
            temperature: Standard deviation of every latent around its mean.
            generator: Random generator, or None for the global one.
            label: The class; None cycles through the classes, if the flow has any.
            start_index: Index of the first image in this cycle.
            guidance: The weight w of classifier-free guidance; needs classes and
                transform="affine".
            jacobi: Update all tokens in parallel until they converge (Jacobi iteration).
        """
        check_number(guidance=guidance)
        with (
            networks.temporary_attributes([self], guidance=guidance),
            # The stopping rule of Jacobi iterations is finer than the rounding errors of float32.
            networks.temporary_attributes(self._blocks(), jacobi=jacobi, float64_inverse=jacobi),
        ):
            return super().sample(count, temperature, generator, label, start_index)

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the latents of images, computed in float64."""
        with networks.temporary_attributes(self._blocks(), float64_forward=True):
            return super().encode(images, generator)

    def jacobi_iterations(self) -> list[int]:
        return [block.num_iterations for block in self._blocks()]

    def _invert(self, z: Tensor, one_hot: Tensor | None) -> tuple[Tensor, Tensor]:
        if not self.guidance:
            return super()._invert(z, one_hot)
        if one_hot is None or not self.condition_networks or not isinstance(self.transform, Affine):
            raise UserError(
                "guidance needs classes and affine transforms: train with "
                "model.num_classes=10 model.transform=affine"
            )
        # The first half of the batch has the class, the second half the mean of all classes.
        conditions = torch.cat((one_hot, torch.full_like(one_hot, 1 / one_hot.shape[1])))
        # Guidance of the base, exact if the transforms of both halves have the same scale.
        guided_z = z + self.guidance * (one_hot @ self.means - self.means.mean(0))
        guided = GuidedAffine(self.transform, self.guidance)
        with networks.temporary_attributes(
            [block.head for block in self._blocks()], transform=guided
        ):
            x, _ = self.bijection.inverse(guided_z.repeat(2, 1), conditions)
        x = x[: len(z)]
        return x, self.log_density(x, one_hot.argmax(1))

    def _blocks(self) -> list[TokenAutoregressive]:
        return [module for module in self.modules() if isinstance(module, TokenAutoregressive)]

    def one_hot(self, labels: Tensor | None) -> Tensor | None:
        """Return the classes (batch, classes), with label dropout in training."""
        one_hot = super().one_hot(labels)
        if one_hot is None or not self.training or not self.condition_networks:
            return one_hot
        uniform = self.random_source(torch.rand, (len(one_hot), 1), device=one_hot.device)
        return torch.where(uniform < LABEL_DROPOUT, 1 / one_hot.shape[1], one_hot)
