"""How well an image can be compressed without any model."""

import zlib

import torch
from torch import Tensor
from torch.nn import functional as F


def complexity(levels: Tensor) -> Tensor:
    """Bits of the shortest lossless code of each image, (batch,): deflate behind the best of PNG's five filters, without headers.

    Serra et al., Input complexity (1909.11480), section 3. PNG specification (ISO 15948), section 9.
    """
    left, above, corner = (F.pad(levels, pad)[..., : -1 or None, : -1 or None] for pad in ((1, 0, 0, 1), (0, 1, 1, 0), (1, 0, 1, 0)))
    a, b, c = left.int(), above.int(), corner.int()
    from_a, from_b, from_c = (b - c).abs(), (a - c).abs(), (a + b - 2 * c).abs()
    nearest = torch.where((from_a <= from_b) & (from_a <= from_c), left, torch.where(from_b <= from_c, above, corner))
    filtered = [levels, levels - left, levels - above, levels - ((a + b) // 2).to(torch.uint8), levels - nearest]
    codes = [[_deflated(each) for each in images.cpu()] for images in filtered]
    return 8.0 * torch.tensor(codes).amin(0)


def _deflated(numbers: Tensor) -> int:
    """Bytes; the negative window leaves zlib's header and checksum out."""
    code = zlib.compressobj(9, zlib.DEFLATED, -15)
    return len(code.compress(numbers.contiguous().numpy().tobytes()) + code.flush())
