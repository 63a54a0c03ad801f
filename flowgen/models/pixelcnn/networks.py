"""Networks of PixelCNN: van den Oord et al. (1606.05328) and Salimans et al. (1701.05517)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowgen.bijections.networks import zero_init
from flowgen.models.logistic_mixture import (
    initial_parameters,
    num_parameters,
    scale_values,
    shift_means,
)

PREDICTION_SIZE = (3, 5)  # rows and columns of the kernel of the linear prediction
FIT_BATCH_SIZE = 32  # images per step of the least-squares fit, to save memory
RIDGE = 1e-3  # penalty of squared weights, because some pixels are equal in all images
RELATIVE_SCALE = 1.3  # initial scale of a component, in distances between the components


class ShiftedConv2d(nn.Conv2d):
    """A convolution whose output at a pixel depends on its row and the rows above it.

    Padding places the kernel above the pixel and, if `centered`, to both of its sides, else to its
    left, where it reaches no later pixel. PixelCNN++ (1701.05517), figure 2, and its code.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: (rows, columns) of the kernel.
        centered: Center the kernel on the column of the pixel. The output then also depends on
            later pixels of its row; `shift_down` makes it causal.
        stride: Distance between the pixels of the output, in rows and columns of the input.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        centered: bool,
        stride: int = 1,
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride=stride)
        rows, columns = kernel_size
        right = columns // 2 if centered else 0
        self.pad = (columns - 1 - right, right, rows - 1, 0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, self.pad))


def shift_down(x: Tensor) -> Tensor:
    """Move an image one row down; the first row becomes zero."""
    return F.pad(x, (0, 0, 1, -1))


def shift_right(x: Tensor) -> Tensor:
    """Move an image one column to the right; the first column becomes zero."""
    return F.pad(x, (1, -1))


def gate(x: Tensor) -> Tensor:
    """Return a hard_sigmoid(b) of the halves a and b of the channels.

    The papers have tanh(a) sigmoid(b) and a sigmoid(b). This gate needs cheaper operations.
    """
    a, b = x.chunk(2, dim=1)
    return a * F.hardsigmoid(b)


class GatedLayer(nn.Module):
    """One layer of the two stacks, each with a gated residual branch that starts at zero.

    The vertical stack v sees the rows above a pixel, the horizontal stack h also the pixels to its
    left: van den Oord et al. (1606.05328), section 2.2 and figure 2.

    Args:
        width: Channels of each stack.
        cond_channels: Channels of the condition, 0 for no condition.
    """

    def __init__(self, width: int, cond_channels: int):
        super().__init__()
        self.vertical = ShiftedConv2d(width, 2 * width, (2, 3), centered=True)
        self.horizontal = ShiftedConv2d(width, 2 * width, (1, 3), centered=False)
        self.link = nn.Conv2d(width, 2 * width, 1, bias=False)
        self.vertical_out = zero_init(nn.Conv2d(width, width, 1))
        self.horizontal_out = zero_init(nn.Conv2d(width, width, 1))
        self.condition = (
            nn.Conv2d(cond_channels, 4 * width, 1, bias=False) if cond_channels else None
        )

    def forward(self, v: Tensor, h: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the new stacks, each (batch, width, height, width of the image)."""
        vertical = self.vertical(v.relu())
        horizontal = self.horizontal(h.relu())
        if self.condition is not None:
            above, left = self.condition(condition).chunk(2, dim=1)
            vertical = vertical + above
            horizontal = horizontal + left
        v = v + self.vertical_out(gate(vertical))
        h = h + self.horizontal_out(gate(horizontal + self.link(v.relu())))
        return v, h


class HalfResolution(nn.Module):
    """Residual branch of gated layers at half the resolution.

    Pixel (i, j) of this resolution depends on the vertical stack in the rows up to 2i, and on the
    horizontal stack also up to column 2j. It changes the stacks in the rows 2i, 2i + 1 and the
    columns 2j, 2j + 1. None of these pixels comes before (2i, 2j), so all of them may see what
    (2i, 2j) sees. PixelCNN++ (1701.05517), section 2.3.

    Args:
        width: Channels of each stack; the layers inside have twice as many.
        num_layers: Number of gated layers.
        cond_channels: Channels of the condition, 0 for no condition.
    """

    def __init__(self, width: int, num_layers: int, cond_channels: int):
        super().__init__()
        self.vertical_in = ShiftedConv2d(width, 2 * width, (2, 3), centered=True, stride=2)
        self.horizontal_in = ShiftedConv2d(width, 2 * width, (2, 2), centered=False, stride=2)
        self.layers = nn.ModuleList(GatedLayer(2 * width, cond_channels) for _ in range(num_layers))
        self.vertical_out = nn.Conv2d(2 * width, 4 * width, 1)
        self.horizontal_out = nn.Conv2d(2 * width, 4 * width, 1)

    def forward(self, v: Tensor, h: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the new stacks, each (batch, width, height, width of the image)."""
        half_v = self.vertical_in(v.relu())
        half_h = self.horizontal_in(h.relu())
        if condition is not None:
            condition = F.avg_pool2d(condition, 2, ceil_mode=True)
        for layer in self.layers:
            half_v, half_h = layer(half_v, half_h, condition)
        height, width = v.shape[2:]
        branch_v = F.pixel_shuffle(self.vertical_out(half_v.relu()), 2)
        branch_h = F.pixel_shuffle(self.horizontal_out(half_h.relu()), 2)
        return v + branch_v[:, :, :height, :width], h + branch_h[:, :, :height, :width]


class PixelCNNNetwork(nn.Module):
    """Computes outputs for each pixel from the pixels before it in raster order.

    Shifted convolutions in two stacks see all earlier pixels within their reach, without the blind
    spot of masked convolutions: van den Oord et al. (1606.05328), section 2.2; Salimans et al.
    (1701.05517), figure 2. Half of the layers work at half the resolution.

    Args:
        channels: Channels of the images.
        bits: Bits per pixel value.
        width: Channels of each stack and of the embedding of a pixel value.
        num_layers: Number of gated layers.
        outputs: Outputs per pixel.
        cond_channels: Channels of the condition, 0 for no condition.
        groups: Groups of outputs, 1 or `channels`. Group g also sees the first g channels of its
            pixel.

    Example:
        >>> network = PixelCNNNetwork(1, bits=8, width=8, num_layers=4, outputs=5, cond_channels=3)
        >>> images = torch.zeros(4, 1, 6, 6, dtype=torch.uint8)
        >>> network(images, torch.randn(4, 3)).shape
        torch.Size([4, 5, 6, 6])
    """

    def __init__(
        self,
        channels: int,
        bits: int,
        width: int,
        num_layers: int,
        outputs: int,
        cond_channels: int = 0,
        groups: int = 1,
    ):
        super().__init__()
        self.embedding = nn.Embedding(2**bits, width)
        # One more channel of ones shows the network where the image ends.
        size = channels * width + 1
        self.above = ShiftedConv2d(size, width, (2, 5), centered=True)
        self.above_left = ShiftedConv2d(size, width, (2, 5), centered=True)
        self.left = ShiftedConv2d(size, width, (1, 5), centered=False)
        half = num_layers // 2
        before = (num_layers - half) // 2
        after = num_layers - half - before  # at least 1
        self.layers = nn.ModuleList(
            [
                *(GatedLayer(width, cond_channels) for _ in range(before)),
                HalfResolution(width, half, cond_channels),
                *(GatedLayer(width, cond_channels) for _ in range(after)),
            ]
        )
        self.same_pixel = nn.ModuleList(
            nn.Conv2d(group * width, width, 1, bias=False) for group in range(1, groups)
        )
        self.out = nn.Conv2d(groups * width, outputs, 1, groups=groups)
        with torch.no_grad():
            self.out.weight.mul_(0.1)

    def forward(self, images: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return (batch, outputs, height, width).

        Args:
            images: Pixel values, (batch, channels, height, width).
            condition: (batch, cond_channels), or (batch, cond_channels, height, width).
        """
        if condition is not None and condition.dim() == 2:
            condition = condition[:, :, None, None]
        values = self.embedding(images.permute(0, 2, 3, 1).long()).flatten(3).permute(0, 3, 1, 2)
        x = F.pad(values, (0, 0, 0, 0, 0, 1), value=1.0)
        v = shift_down(self.above(x))
        h = shift_down(self.above_left(x)) + shift_right(self.left(x))
        for layer in self.layers:
            v, h = layer(v, h, condition)
        groups = [h]
        for layer in self.same_pixel:
            groups.append(h + layer(values[:, : layer.in_channels]))
        return self.out(torch.cat(groups, 1).relu())


class LinearPrediction(nn.Module):
    """Linear prediction x_i = b + sum_j w_j x_j of each value x_i from earlier values x_j.

    The values x_j are those of the five nearest pixels in each of the two rows above, of the two
    pixels to the left, and of the channels before x_i in its pixel. All weights start at zero.

    Args:
        channels: Channels of the images.
        bits: Bits per pixel value.

    Example:
        >>> images = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4)
        >>> prediction = LinearPrediction(channels=1, bits=4)
        >>> prediction.fit(images)
        >>> prediction(images).shape
        torch.Size([1, 1, 4, 4])
    """

    def __init__(self, channels: int, bits: int):
        super().__init__()
        self.bins = 2**bits
        self.weight = nn.Parameter(torch.zeros(channels, channels, *PREDICTION_SIZE))
        self.bias = nn.Parameter(torch.zeros(channels))
        mask = torch.zeros(self.weight.shape)
        mask[:, :, :-1] = 1
        mask[:, :, -1, : PREDICTION_SIZE[1] // 2] = 1
        mask[:, :, -1, PREDICTION_SIZE[1] // 2] = torch.ones(channels, channels).tril(-1)
        self.mask = nn.Buffer(mask, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the predicted values in [-1, 1], as in `scale_values`, of the images' shape.

        Args:
            images: Pixel values, (batch, channels, height, width).
        """
        with torch.autocast(images.device.type, enabled=False):
            x = scale_values(images, self.bins, self.bias.dtype)
            return F.conv2d(self._pad(x), self.weight * self.mask, self.bias)

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        """Set the weights and the bias to the least-squares solution for some images.

        Args:
            images: Pixel values, (batch, channels, height, width).
        """
        channels = images.shape[1]
        num_inputs = self.mask[0].numel() + 1  # with the bias
        covariance = RIDGE * torch.eye(num_inputs, dtype=torch.float64, device=images.device)
        products = covariance.new_zeros(num_inputs, channels)
        for part in images.split(FIT_BATCH_SIZE):
            x = scale_values(part, self.bins, torch.float64)
            inputs = F.unfold(self._pad(x), PREDICTION_SIZE).transpose(0, 1).flatten(1)
            inputs = torch.cat((inputs, torch.ones_like(inputs[:1])))
            covariance += inputs @ inputs.T
            products += inputs @ x.transpose(0, 1).flatten(1).T
        for channel, mask in enumerate(self.mask.bool()):
            used = torch.cat((mask.flatten(), mask.new_ones(1)))
            solution = torch.linalg.solve(covariance[used][:, used], products[used, channel])
            self.weight[channel, mask] = solution[:-1].to(self.weight.dtype)
            self.bias[channel] = solution[-1]

    def _pad(self, x: Tensor) -> Tensor:
        rows, columns = PREDICTION_SIZE
        return F.pad(x, (columns // 2, columns // 2, rows - 1, 0))


class MixtureNetwork(PixelCNNNetwork):
    """Computes the parameters of a `LogisticMixture` for each pixel.

    The means of the components are the sum of a linear prediction and the outputs of a
    `PixelCNNNetwork`. Similar values have similar embeddings at the start of training: channel k of
    the embedding of a value v in [0, 1] is sqrt(2) (3 / (2 + k))^2 cos(pi k v), k = 1, 2, ... Both
    lower the bits/dim of color images early in training, see docs/models/pixelcnn.md, "Choices".

    Args:
        channels: Channels of the images.
        bits: Bits per pixel value.
        num_components: Components of the mixture.
        **settings: Other arguments of `PixelCNNNetwork`, except `outputs` and `groups`.
    """

    def __init__(self, channels: int, bits: int, num_components: int, **settings: int):
        outputs = num_parameters(channels, num_components)
        super().__init__(channels, bits, outputs=outputs, **settings)
        self.prediction = LinearPrediction(channels, bits)
        self.bits = bits
        self.num_components = num_components
        values = (torch.arange(2**bits) + 0.5)[:, None] / 2**bits
        index = torch.arange(1, self.embedding.embedding_dim + 1)
        with torch.no_grad():
            waves = math.sqrt(2) * torch.cos(math.pi * index * values)
            self.embedding.weight.copy_((3 / (2 + index)) ** 2 * waves)
            # Outputs are small, so that the linear prediction dominates, and random, so that
            # components with equal means become different.
            self.out.weight.mul_(0.1)

    @torch.no_grad()
    def initialize(self, images: Tensor) -> None:
        """Fit the linear prediction, and the marginal mixture of its errors, to some images.

        Args:
            images: Pixel values, (batch, channels, height, width).
        """
        self.prediction.fit(images)
        prediction = self.prediction(images)
        errors = scale_values(images, 2**self.bits, prediction.dtype) - prediction
        bias = initial_parameters(errors, self.num_components, self.bits, RELATIVE_SCALE)
        self.out.bias.copy_(bias)  # type: ignore[union-attr]

    def forward(self, images: Tensor, condition: Tensor | None = None) -> Tensor:
        return shift_means(super().forward(images, condition), self.prediction(images))
