"""The bits/dim of a model, measured by the size of a file from which its images return."""

import torch
from torch import Tensor

from flowgen.coding.archive import compress, decompress, read_header
from flowgen.coding.flow_codec import FlowCodec, require_codec
from flowgen.models.base import GenerativeModel
from flowgen.utils.console import Progress, no_progress
from flowgen.utils.errors import UserError
from flowgen.utils.metrics import Metric, Metrics, MetricValue

FILE_BITS = Metric("file_bits_per_dim", "bits/dim", higher_is_better=False)
NET_BITS = Metric("net_bits_per_dim", "bits/dim", higher_is_better=False)
SAME_NOISE_BITS = Metric("same_noise_bits_per_dim", "bits/dim", higher_is_better=False)
GAP = Metric("net_gap", "standard errors of bits_per_dim")


def measure_compression(
    model: GenerativeModel,
    images: Tensor,
    evaluated: MetricValue,
    progress: Progress = no_progress,
) -> Metrics:
    """Compress images, decompress them again, and compare the length with an evaluation.

    Args:
        model: A flow that can compress images.
        images: The images of the evaluation, uint8 (N, channels, height, width).
        evaluated: Bits/dim of the same images by `model.evaluate`.
        progress: Wrapper of the loops over the images.

    Returns:
        Bits/dim of the whole file, without its fixed cost, and by the model for the noise of the
        file. The last metric is the difference of the second one from `evaluated`, in its standard
        errors.

    Raises:
        UserError: If the model cannot compress images, or they do not return.
    """
    codec = FlowCodec(require_codec(model))
    result = compress(codec, images, "", verify=False, progress=progress)
    header, payload = read_header(result.data)
    if not torch.equal(decompress(codec, header, payload, progress), images.cpu()):
        raise UserError("decompression gives other images: the model or its code is wrong")
    values = {FILE_BITS: result.bits_per_dim, NET_BITS: result.net_bits_per_dim}
    if evaluated.error:
        values[GAP] = (result.net_bits_per_dim - evaluated.value) / evaluated.error
    return Metrics.of(
        *(MetricValue(metric, value) for metric, value in values.items()),
        MetricValue(SAME_NOISE_BITS, result.model_bits_per_dim, likelihood=model.likelihood),
        file_bytes=len(result.data),
        decompressed="equal",
    )
