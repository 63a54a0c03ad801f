"""The bits/dim of a model, measured by the size of a file from which its images return."""

import math

import torch
from torch import Tensor

from flowgen.coding.archive import compress, decompress, read_header
from flowgen.coding.codec import Codec
from flowgen.utils.console import Progress, no_progress
from flowgen.utils.errors import UserError
from flowgen.utils.metrics import BITS_PER_DIM, Metric, Metrics, MetricValue

FILE_BITS = Metric("file_bits_per_dim", "bits/dim", higher_is_better=False)
NET_BITS = Metric("net_bits_per_dim", "bits/dim", higher_is_better=False)
SAME_NOISE_BITS = Metric("same_noise_bits_per_dim", "bits/dim", higher_is_better=False)
GAP = Metric("net_gap", "standard errors of bits_per_dim")
# The negative length of the code of an RBM, which contains no estimate of log Z
CODE_LOG_LIKELIHOOD = Metric("code_log_likelihood", "nats", higher_is_better=True)


def measure_compression(
    codec: Codec, images: Tensor, evaluated: MetricValue, progress: Progress = no_progress
) -> Metrics:
    """Compress images, decompress them again, and compare the length with an evaluation.

    Args:
        codec: The codec of the model.
        images: The images of the evaluation, uint8 (N, channels, height, width).
        evaluated: Likelihood of the same images by `model.evaluate`.
        progress: Wrapper of the loops over the images.

    Returns:
        Bits/dim of the whole file and without its fixed cost. If `evaluated` is in bits/dim, also
        bits/dim by the model for the noise of the file, and the difference of the length without
        the fixed cost from `evaluated`, in its standard errors. For an RBM also the mean length in
        nats, as a log-likelihood.

    Raises:
        UserError: If the images do not return.
    """
    result = compress(codec, images, "", verify=False, progress=progress)
    header, payload = read_header(result.data)
    if not torch.equal(decompress(codec, header, payload, progress), images.cpu()):
        raise UserError("decompression gives other images: the model or its code is wrong")
    values = [
        MetricValue(FILE_BITS, result.bits_per_dim),
        MetricValue(NET_BITS, result.net_bits_per_dim),
    ]
    if evaluated.metric == BITS_PER_DIM:
        if evaluated.error and math.isfinite(evaluated.error):
            gap = (result.net_bits_per_dim - evaluated.value) / evaluated.error
            values.append(MetricValue(GAP, gap))
        likelihood = codec.model.likelihood
        values.append(
            MetricValue(SAME_NOISE_BITS, result.model_bits_per_dim, likelihood=likelihood)
        )
    else:
        nats = -result.net_bits * math.log(2) / len(images)
        values.append(MetricValue(CODE_LOG_LIKELIHOOD, nats))
    return Metrics.of(
        *values,
        file_bytes=len(result.data),
        decompressed="equal",
    )
