"""TarFlow: Zhai et al., Normalizing Flows are Capable Generative Models (2412.06329)."""

from flowgen.bijections import (
    TRANSFORMS,
    ActNorm,
    Bijection,
    CausalTransformer,
    Chain,
    Flatten,
    Folded,
    Gaussianize,
    Head,
    Inverse,
    PLUConv1x1,
    Roll,
    Squeeze,
    Standardize,
    TokenAutoregressive,
    local_head,
)
from flowgen.errors import check_choice, check_whole
from flowgen.models.flows.flow import Flow
from flowgen.models.flows.patches import check_transformers, patch_size


class TarFlow(Flow):
    """Patches as tokens, then blocks that are autoregressive in the tokens, in turn from the first to the last and back.

    `conf/model/tarflow.yaml` says what each argument means.
    """

    def __init__(
        self,
        *,
        channels: int,
        size: int,
        bits: int,
        patch: int | None,
        layers: list[int],
        width: int,
        heads: int,
        dropout: float,
        transform: str,
        local: bool,
        roll: bool,
        mixing: str,
        gaussianize: bool,
        dequantisation: str,
        classes: int | None,
        class_networks: bool,
    ):
        check_whole(channels=channels, size=size, bits=bits)
        check_transformers(layers, width, heads, dropout)
        check_choice(TRANSFORMS, transform=transform)
        check_choice(("none", "actnorm", "plu"), mixing=mixing)
        check_choice((True, False), local=local, roll=roll, gaussianize=gaussianize, class_networks=class_networks)
        patch = patch_size(size, patch)
        maps, side = channels * patch**2, size // patch
        seen = classes if classes is not None and class_networks else 0

        def block(number: int, depth: int) -> list[Bijection]:
            mix: dict[str, list[Bijection]] = {"none": [], "actnorm": [ActNorm(maps)], "plu": [Folded(ActNorm(maps), PLUConv1x1(maps))]}
            how = TRANSFORMS[transform]("bounded")
            network = CausalTransformer(side**2, maps, width, heads, depth, dropout, seen)
            head = (local_head if local else Head)(maps, width, how)
            return [*mix[mixing], TokenAutoregressive(network, head, backwards=number % 2 == 1)]

        def rolled(number: int) -> list[Bijection]:
            """Moves the borders of the patches before every second pair of blocks, and back before the others."""
            if not roll or number == 0 or number % 2:
                return []
            pixels = patch // 2 if number % 4 == 2 else -(patch // 2)
            return [Inverse(Squeeze(patch)), Roll(pixels), Squeeze(patch)]

        bijections: list[Bijection] = [Gaussianize(channels, 2**bits)] if gaussianize else []
        bijections += [Squeeze(patch), ActNorm(maps)]
        for number, depth in enumerate(layers):
            bijections += [*rolled(number), *block(number, depth)]
        bijections += [Flatten(maps, side, side), Standardize(channels * size**2)]
        super().__init__(Chain(*bijections), (channels, size, size), bits, dequantisation, classes, class_networks)
