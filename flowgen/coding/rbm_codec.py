"""The codec of an RBM: bits-back coding through annealing.

Annealed sampling draws v_0 from independent pixels, and then, for every inverse temperature beta_k
up to 1, h from P_k(h | v_k-1) and v_k from P_k(v | h). The last v is the image. A code for a whole
path would be too long, and the decoder needs only its end. The codec therefore pops the path from
the stack, backwards from the image: each step pops h given v and v' given h, and pushes v given h
and h given v'. The decoder samples forwards and pushes what the encoder popped.

The length is -log2 of a weight of reverse annealed importance sampling (Burda, Grosse and
Salakhutdinov, 1412.8566). No estimate of log Z is part of it, and by Kraft's inequality it cannot
be too short.
"""

import zlib
from collections.abc import Iterable
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowgen.coding.codec import Codec
from flowgen.coding.coder import OFFSET, Coder
from flowgen.coding.stack import PROBABILITY_BITS
from flowgen.models.rbm.rbm import RBM
from flowgen.utils.errors import UserError, check_whole

MAX_ANNEALING_STEPS = 10**6
WEIGHT_BITS = 20  # weights are multiples of 2^-20, so that their sums in float64 are exact
BETA_BITS = 20  # inverse temperatures are multiples of 2^-20
LOGIT_BITS = 12  # log-odds are rounded to 2^-12 before the logistic function
LOGIT_RANGE = 16  # of the table of the logistic function
MAX_INPUT = 2.0**11  # larger log-odds could overflow the 53 bits of a float64


class RBMCodec(Codec):
    """Encoder and decoder of batches of binary images with an RBM.

    Weights, inverse temperatures and log-odds are integers, so all machines compute the same.

    Args:
        rbm: A trained RBM.
        annealing_steps: Number of inverse temperatures. More steps make shorter codes.
    """

    length_description = "the model with log Z of `flowgen evaluate`"

    def __init__(self, rbm: RBM, annealing_steps: int):
        check_whole(high=MAX_ANNEALING_STEPS, annealing_steps=annealing_steps)
        super().__init__(rbm)
        self.rbm = rbm
        self.annealing_steps = annealing_steps
        self.noise_bits = rbm.hidden + rbm.visible  # of the first step; later steps repay it
        self.weight = _to_integers(rbm.weight)
        self.hidden_bias = _to_integers(rbm.hidden_bias)
        self.visible_bias = _to_integers(rbm.visible_bias)
        self.base = _to_integers(rbm.base)
        largest = max(
            (self.weight.abs().sum(0) + self.hidden_bias.abs()).max(),
            (self.weight.abs().sum(1) + self.visible_bias.abs()).max(),
            self.base.abs().max(),
        )
        if largest >= MAX_INPUT * 2**WEIGHT_BITS:
            raise UserError(
                "the weights of the RBM are too large for compression, because its training "
                "diverged: choose an earlier checkpoint, or train again with a lower trainer.lr"
            )

    @cached_property
    def probabilities(self) -> Tensor:
        """The logistic function from -LOGIT_RANGE to LOGIT_RANGE, as multiples of a small unit."""
        half = LOGIT_RANGE << LOGIT_BITS
        logits = torch.arange(-half, half + 1).double() / 2**LOGIT_BITS
        total = 1 << PROBABILITY_BITS
        return (logits.sigmoid() * total + OFFSET).floor().long().clamp(1, total - 1)

    def checksum(self) -> int:
        return zlib.crc32(self.probabilities.numpy().astype("<i8").tobytes())

    @torch.no_grad()
    def encode(self, images: Tensor, coder: Coder) -> Tensor:
        visible = self._anneal(images.flatten(1).double(), reversed(self._betas()), coder)
        self._push(coder, visible, self._base_logits(len(images)))
        log_z = float("nan") if self.rbm.log_z is None else self.rbm.log_z
        pixels = self.rbm.to_visible(images.to(self.rbm.device))
        nats = self.rbm.free_energy(pixels).double().cpu() + log_z
        return nats / np.log(2)

    @torch.no_grad()
    def decode(self, count: int, coder: Coder) -> Tensor:
        visible = self._pop(coder, self._base_logits(count))
        return self.rbm.to_images(self._anneal(visible, self._betas(), coder))

    def _betas(self) -> list[int]:
        """Return the inverse temperatures above 0 in units of 2^-BETA_BITS."""
        steps = self.annealing_steps
        return [(step << BETA_BITS) // steps for step in range(1, steps + 1)]

    def _base_logits(self, count: int) -> Tensor:
        return (self.base * 2**BETA_BITS).expand(count, -1)

    def _anneal(self, visible: Tensor, betas: Iterable[int], coder: Coder) -> Tensor:
        """Move visible units (batch, visible) through Gibbs steps, whose draws are popped.

        A step pops new units and pushes the old ones. The same step from the new units pops the
        old ones and pushes the new ones, so encoder and decoder differ in the order of the betas.
        """
        hidden_input = self._hidden_input(visible)
        for beta in betas:
            hidden = self._pop(coder, beta * hidden_input)
            visible_input = hidden @ self.weight.T + self.visible_bias
            logits = beta * visible_input + (2**BETA_BITS - beta) * self.base
            new = self._pop(coder, logits)
            self._push(coder, visible, logits)
            hidden_input = self._hidden_input(new)
            self._push(coder, hidden, beta * hidden_input)
            visible = new
        return visible

    def _hidden_input(self, visible: Tensor) -> Tensor:
        return visible @ self.weight + self.hidden_bias

    def _pop(self, coder: Coder, logits: Tensor) -> Tensor:
        values = coder.stack.pop_binary(self._probabilities(logits))
        return torch.from_numpy(values).double().view(logits.shape)

    def _push(self, coder: Coder, values: Tensor, logits: Tensor) -> None:
        coder.stack.push_binary(values.reshape(-1).numpy(), self._probabilities(logits))

    def _probabilities(self, logits: Tensor) -> NDArray[np.float32]:
        """Return P(unit = 1) of log-odds in units of 2^-(WEIGHT_BITS + BETA_BITS), flattened."""
        index = (logits * 2.0 ** (LOGIT_BITS - WEIGHT_BITS - BETA_BITS)).floor().long()
        half = LOGIT_RANGE << LOGIT_BITS
        numerators = self.probabilities[(index + half).clamp(0, 2 * half)]
        result: NDArray[np.float32] = (
            (numerators.float() * 2.0**-PROBABILITY_BITS).flatten().numpy()
        )
        return result


def _to_integers(values: Tensor) -> Tensor:
    """Return floats in units of 2^-WEIGHT_BITS, rounded; float64 holds these integers exactly."""
    return (values.detach().cpu().double() * 2.0**WEIGHT_BITS).round()
