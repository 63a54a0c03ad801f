"""PixelCNN: van den Oord et al. (1606.05328) and Salimans et al. (1701.05517)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowgen.bijections.networks import zero_init


class ShiftedConv2d(nn.Conv2d):
    """A convolution whose output at a pixel depends on no later pixel in raster order.

    Padding places the kernel above the pixel and, if `centered`, to both of its sides, else to its
    left. PixelCNN++ (1701.05517), section 2.4, and its code.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: (rows, columns) of the kernel.
        centered: Center the kernel on the column of the pixel. The output then depends on all
            pixels of its row within the kernel, so that it needs a row of its own above the pixel.
        dilation: Distance between rows of the kernel.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        centered: bool,
        dilation: int = 1,
    ):
        super().__init__(in_channels, out_channels, kernel_size, dilation=(dilation, 1))
        rows, columns = kernel_size
        right = columns // 2 if centered else 0
        self.pad = (columns - 1 - right, right, dilation * (rows - 1), 0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, self.pad))


def shift_down(x: Tensor) -> Tensor:
    """Move an image one row down; the first row becomes zero."""
    return F.pad(x, (0, 0, 1, -1))


def shift_right(x: Tensor) -> Tensor:
    """Move an image one column to the right; the first column becomes zero."""
    return F.pad(x, (1, -1))


def gate(x: Tensor) -> Tensor:
    """Return tanh(a) sigmoid(b) of the halves a and b of the channels."""
    a, b = x.chunk(2, dim=1)
    return a.tanh() * b.sigmoid()


class GatedLayer(nn.Module):
    """One layer of the two stacks, each with a gated residual branch that starts at zero.

    The vertical stack v sees the rows above a pixel, the horizontal stack h also the pixels to its
    left: van den Oord et al. (1606.05328), section 2.2 and figure 2.

    Args:
        width: Channels of each stack.
        dilation: Distance between rows of the kernel of the vertical stack.
        condition_size: Channels of the condition, 0 for no condition.
    """

    def __init__(self, width: int, dilation: int, condition_size: int):
        super().__init__()
        self.vertical = ShiftedConv2d(width, 2 * width, (2, 3), centered=True, dilation=dilation)
        self.horizontal = ShiftedConv2d(width, 2 * width, (1, 3), centered=False)
        self.link = nn.Conv2d(width, 2 * width, 1, bias=False)
        self.vertical_out = zero_init(nn.Conv2d(width, width, 1))
        self.horizontal_out = zero_init(nn.Conv2d(width, width, 1))
        self.condition = (
            nn.Conv2d(condition_size, 4 * width, 1, bias=False) if condition_size else None
        )

    def forward(self, v: Tensor, h: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the new stacks, each (batch, width, height, width of the image)."""
        vertical = self.vertical(F.elu(v))
        horizontal = self.horizontal(F.elu(h))
        if self.condition is not None:
            above, left = self.condition(condition).chunk(2, dim=1)
            vertical = vertical + above
            horizontal = horizontal + left
        v = v + self.vertical_out(gate(vertical))
        h = h + self.horizontal_out(gate(horizontal + self.link(F.elu(v))))
        return v, h


class PixelCNNNetwork(nn.Module):
    """Computes outputs for each pixel from the pixels before it in raster order.

    Shifted convolutions in two stacks see all earlier pixels within their reach, without the blind
    spot of masked convolutions: van den Oord et al. (1606.05328), section 2.2; Salimans et al.
    (1701.05517), section 2.4.

    Args:
        channels: Channels of the images.
        width: Channels of each stack.
        layers: Number of gated layers.
        outputs: Outputs per pixel.
        condition_size: Channels of the condition, 0 for no condition.

    Example:
        >>> network = PixelCNNNetwork(channels=1, width=8, layers=2, outputs=5, condition_size=3)
        >>> network(torch.randn(4, 1, 6, 6), torch.randn(4, 3)).shape
        torch.Size([4, 5, 6, 6])
    """

    def __init__(
        self, channels: int, width: int, layers: int, outputs: int, condition_size: int = 0
    ):
        super().__init__()
        # One more channel of ones shows the network where the image ends.
        self.above = ShiftedConv2d(channels + 1, width, (2, 5), centered=True)
        self.above_left = ShiftedConv2d(channels + 1, width, (2, 5), centered=True)
        self.left = ShiftedConv2d(channels + 1, width, (1, 5), centered=False)
        self.layers = nn.ModuleList(
            GatedLayer(width, 2 ** (index % 3), condition_size) for index in range(layers)
        )
        self.out = nn.Conv2d(width, outputs, 1)
        with torch.no_grad():
            self.out.weight.mul_(0.1)

    def forward(self, images_scaled: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return (batch, outputs, height, width).

        Args:
            images_scaled: Images with values from -1 to 1, (batch, channels, height, width).
            condition: (batch, condition_size), or (batch, condition_size, height, width).
        """
        if condition is not None and condition.dim() == 2:
            condition = condition[:, :, None, None]
        x = F.pad(images_scaled, (0, 0, 0, 0, 0, 1), value=1.0)
        v = shift_down(self.above(x))
        h = shift_down(self.above_left(x)) + shift_right(self.left(x))
        for layer in self.layers:
            v, h = layer(v, h, condition)
        return self.out(F.elu(h))
