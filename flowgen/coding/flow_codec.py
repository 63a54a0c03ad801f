"""The codec of a flow: a batch of images becomes bits on a stack, and back.

Encoding borrows the dequantization noise from the stack, maps the noisy images to latents, and
pushes these under the base distribution. The stack grows by

    -log2 p(x) + log2 q(u) + D log2(bins)

bits for the D numbers x = (images + u) / bins. Divided by D, this is the model's own bits/dim for
this noise, up to rounding.
"""

import copy
import math

import torch
from torch import Tensor

from flowgen.bijections.base import Bijection, Chain, standard_normal_log_prob
from flowgen.coding.codec import Codec
from flowgen.coding.coder import Coder
from flowgen.coding.layers import code, has_rule, refusal
from flowgen.coding.normal import TABLES, pop_normal, push_normal
from flowgen.coding.pixels import PixelCoder, split_first
from flowgen.models.base import GenerativeModel, SupportsCompression
from flowgen.models.flows.dequantization import VariationalDequantizer
from flowgen.models.flows.flow import Flow
from flowgen.utils.errors import UserError


def check_compressible(model: GenerativeModel) -> Flow:
    """Return the model if it can compress images, and otherwise raise a UserError that says why."""
    if not isinstance(model, SupportsCompression) or not isinstance(model, Flow):
        raise UserError(
            f"{type(model).__name__} cannot compress images: choose a run of an RBM, a PixelCNN or "
            f"a flow with an exact inverse, such as {SupportsCompression.train_hint}"
        )
    if model.likelihood == "none":
        raise UserError(
            "a flow of noisy images (model.dequantization=gaussian:...) cannot compress images, "
            "because its noise does not determine the pixel values: train one with "
            "model.dequantization=uniform"
        )
    _, layers = split_first(model)
    for part in (module for layer in layers for module in layer.modules()):
        if isinstance(part, Bijection) and not has_rule(part):
            raise UserError(refusal(part))
    return model


class FlowCodec(Codec):
    """Encoder and decoder of batches of images with a flow.

    Args:
        flow: A trained flow.
    """

    length_description = "the model for the same noise"

    def __init__(self, flow: GenerativeModel):
        self.float_flow = copy.deepcopy(check_compressible(flow)).eval()
        super().__init__(self.float_flow)
        self.flow = copy.deepcopy(self.float_flow).cpu().double()
        self.pixels = PixelCoder(self.flow)
        self.layers = Chain(*self.pixels.rest)
        if self.pixels.nodes is None and flow.bits > 5:
            # The grid must be much finer than the intervals of the pixel values.
            self.grid_bits = max(self.grid_bits, flow.bits + 8)
        self.noise_bits = self.dimensions * self.grid_bits

    def checksum(self) -> int:
        return self.pixels.checksum() ^ TABLES.checksum()

    @torch.no_grad()
    def encode(self, images: Tensor, coder: Coder) -> Tensor:
        flow = self.flow
        x, points, normal = self.pixels.dequantize(images, coder)
        log_densities = self._class_log_density(points)
        bits = -log_densities.logsumexp(1) + math.log(len(flow.means))
        bits = (
            bits + self._log_noise_density(images, normal) + self.dimensions * math.log(self.bins)
        )
        labels = log_densities.argmax(1) if flow.num_classes is not None else None
        one_hot = flow.one_hot(labels)
        z = code(self.layers, x, flow.network_condition(one_hot), coder, False)
        if one_hot is not None:
            z = z - coder.to_grid(coder.quantize_parameters(one_hot @ flow.means))
        push_normal(coder, z)
        if labels is not None:
            coder.push(labels, torch.full_like(labels, len(flow.means)))
        return bits / math.log(2)

    @torch.no_grad()
    def decode(self, count: int, coder: Coder) -> Tensor:
        flow = self.flow
        labels = None
        if flow.num_classes is not None:
            labels = coder.pop(torch.full((count,), len(flow.means)))
        one_hot = flow.one_hot(labels)
        z = pop_normal(coder, torch.Size((count, self.dimensions)))
        if one_hot is not None:
            z = z + coder.to_grid(coder.quantize_parameters(one_hot @ flow.means))
        x = code(self.layers, z, flow.network_condition(one_hot), coder, True)
        return self.pixels.quantize_points(x, coder)

    def _class_log_density(self, points: Tensor) -> Tensor:
        """Return log p(x | y) in nats of every class, (batch, classes), computed in float32.

        It chooses the class, which is coded, and measures the overhead. Neither needs to be exact.
        """
        flow = self.float_flow
        return flow.class_log_density(points.to(flow.device, flow.dtype)).double().cpu()

    def _log_noise_density(self, images: Tensor, normal: Tensor | None) -> Tensor:
        """Return log q(u) in nats, (batch,)."""
        dequantizer = self.float_flow.dequantizer
        if normal is None or not isinstance(dequantizer, VariationalDequantizer):
            return torch.zeros(len(images), dtype=torch.float64)
        flow = self.float_flow
        e = (normal.double() * 2.0**-self.grid_bits).to(flow.device, flow.dtype)
        condition = dequantizer.condition(images.to(flow.device), flow.dtype)
        g, log_det = dequantizer.bijection(e, condition)
        log_e = standard_normal_log_prob(e.flatten(1))
        log_g = standard_normal_log_prob(g.flatten(1))
        return (log_e - log_det - log_g).double().cpu()
