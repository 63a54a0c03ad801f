"""What is known of an image where it is no pixel by itself: its grey, or a smaller image."""

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F


class Linear(NamedTuple):
    """Weighted sums over groups of pixels, blocks of `side` x `side` and, with `colours`, all channels of them; weights add up to 1.

    Images are (batch, channels, height, width), and so are sums, each at every pixel of its group. `weights` is (channels, 1, 1).
    """

    weights: Tensor
    side: int = 1
    colours: bool = False

    def of(self, x: Tensor) -> Tensor:
        """What is known of x."""
        return self.pool(self.weights.to(x) * x)

    def pool(self, x: Tensor) -> Tensor:
        """The sum over each group."""
        if self.colours:
            x = x.sum(1, keepdim=True).expand_as(x)
        if self.side > 1:
            x = F.interpolate(self.side**2 * F.avg_pool2d(x, self.side), scale_factor=self.side)
        return x

    def once(self, x: Tensor) -> Tensor:
        """The sum over the groups of what each of them has at every pixel: (batch,)."""
        return x.flatten(1).sum(1) / (self.side**2 * (x.shape[1] if self.colours else 1))


Known = Tensor | Linear  # true where a pixel is known, (channels, height, width), or sums of pixels
