"""Glow and TarFlow in plain PyTorch, with the operations of other programs, to compare speed."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PlainActNorm(nn.Module):
    """A scale and a shift of each channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = x[0, 0].numel() * self.scale.abs().log().sum()
        return self.scale * (x + self.shift), log_det


class PlainConv1x1(nn.Module):
    """An invertible 1x1 convolution with the LU decomposition of its weight."""

    def __init__(self, channels: int):
        super().__init__()
        orthogonal, _ = torch.linalg.qr(torch.randn(channels, channels))
        permutation, lower, upper = torch.linalg.lu(orthogonal)
        diagonal = upper.diagonal()
        self.permutation = nn.Buffer(permutation)
        self.sign = nn.Buffer(diagonal.sign())
        self.mask = nn.Buffer(torch.ones(channels, channels).tril(-1))
        self.eye = nn.Buffer(torch.eye(channels))
        self.lower = nn.Parameter(lower)
        self.upper = nn.Parameter(upper.triu(1))
        self.log_diagonal = nn.Parameter(diagonal.abs().log())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        lower = self.lower * self.mask + self.eye
        upper = self.upper * self.mask.T + torch.diag(self.sign * self.log_diagonal.exp())
        weight = self.permutation @ lower @ upper
        log_det = x[0, 0].numel() * self.log_diagonal.sum()
        return F.conv2d(x, weight[:, :, None, None]), log_det


class PlainZeroConv(nn.Module):
    """A convolution that starts at zero, with a border of ones and a learned scale."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3)
        nn.init.zeros_(self.conv.weight)
        self.log_scale = nn.Parameter(torch.zeros(1, out_channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, [1, 1, 1, 1], value=1)) * (3 * self.log_scale).exp()


class PlainCoupling(nn.Module):
    """An affine coupling."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(channels // 2, width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 1),
            nn.ReLU(inplace=True),
            PlainZeroConv(width, channels),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = x.chunk(2, 1)
        log_scale, shift = self.network(first).chunk(2, 1)
        scale = torch.sigmoid(log_scale + 2)
        second = (second + shift) * scale
        return torch.cat((first, second), 1), scale.log().flatten(1).sum(1)


class PlainGlow(nn.Module):
    """Glow for images of three channels, with the operations of rosinality/glow-pytorch.

    Args:
        levels: Number of levels.
        steps: Steps of flow of each level.
        width: Channels of the coupling networks.
    """

    def __init__(self, levels: int, steps: int, width: int):
        super().__init__()
        self.levels: Any = nn.ModuleList()
        self.priors = nn.ModuleList()
        for level in range(levels):
            channels = 3 * 2 ** (level + 2)
            self.levels.append(
                nn.ModuleList(
                    layer
                    for _ in range(steps)
                    for layer in (
                        PlainActNorm(channels),
                        PlainConv1x1(channels),
                        PlainCoupling(channels, width),
                    )
                )
            )
            is_last = level == levels - 1
            self.priors.append(
                PlainZeroConv(channels, 2 * channels)
                if is_last
                else PlainZeroConv(channels // 2, channels)
            )

    def forward(self, images: Tensor) -> Tensor:
        """Return the loss: the negative log-density per value, in nats."""
        x = (images + torch.rand(images.shape)) / 32 - 0.5
        log_density = torch.zeros(len(x))
        for level, (layers, prior) in enumerate(zip(self.levels, self.priors, strict=True)):
            batch, channels, height, width = x.shape
            x = x.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
            x = x.reshape(batch, 4 * channels, height // 2, width // 2)
            for layer in layers:
                x, log_det = layer(x)
                log_density = log_density + log_det
            if level == len(self.levels) - 1:
                z, condition = x, torch.zeros_like(x)
            else:
                x, z = x.chunk(2, 1)
                condition = x
            mean, log_std = prior(condition).chunk(2, 1)
            log_p = -0.5 * math.log(2 * math.pi) - log_std
            log_p = log_p - 0.5 * (z - mean) ** 2 / (2 * log_std).exp()
            log_density = log_density + log_p.flatten(1).sum(1)
        return -log_density.mean() / images[0].numel()


class PlainLayer(nn.Module):
    """A transformer layer with a mask in training, or with cached keys and values in sampling."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.project = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, h: Tensor, mask: Tensor | None, cache: list[tuple[Tensor, ...]]) -> Tensor:
        heads = self.project(self.norms[0](h)).unflatten(2, (3 * self.num_heads, -1))
        queries, keys, values = heads.transpose(1, 2).chunk(3, 1)
        if mask is None:
            cache.append((keys, values))
            keys, values = (torch.cat(parts, 2) for parts in zip(*cache, strict=True))
        attended = F.scaled_dot_product_attention(queries, keys, values, mask)
        h = h + self.merge(attended.transpose(1, 2).flatten(2))
        return h + self.mlp(self.norms[1](h))


class PlainTarFlow(nn.Module):
    """TarFlow for images of three channels, with the operations of apple/ml-tarflow.

    Args:
        size: Height and width of the images.
        patch: Height and width of a patch.
        num_layers: Layers of each block.
        width: Width of a token.
        num_heads: Attention heads.
    """

    def __init__(self, size: int, patch: int, num_layers: list[int], width: int, num_heads: int):
        super().__init__()
        self.patch = patch
        self.num_tokens = (size // patch) ** 2
        self.dim = 3 * patch**2
        self.embed = nn.ModuleList(nn.Linear(self.dim, width) for _ in num_layers)
        self.positions = nn.ParameterList(
            0.01 * torch.randn(self.num_tokens, width) for _ in num_layers
        )
        self.blocks: Any = nn.ModuleList(
            nn.ModuleList(PlainLayer(width, num_heads) for _ in range(depth))
            for depth in num_layers
        )
        self.last = nn.ModuleList(nn.Linear(width, 2 * self.dim) for _ in num_layers)
        self.mask = nn.Buffer(torch.ones(self.num_tokens, self.num_tokens).tril())

    def forward(self, images: Tensor) -> Tensor:
        """Return the loss: the negative log-density per value, up to a constant."""
        x = (images + torch.rand(images.shape)) / 16 - 1
        z = F.unfold(x, self.patch, stride=self.patch).transpose(1, 2)
        log_det = torch.zeros(())
        for index, block in enumerate(self.blocks):
            z = z.flip(1) if index % 2 else z
            h = self.embed[index](z) + self.positions[index]
            for layer in block:
                h = layer(h, self.mask.bool(), [])
            params = F.pad(self.last[index](h)[:, :-1], (0, 0, 1, 0))
            log_scale, shift = params.chunk(2, 2)
            z = (z - shift) * (-log_scale.float()).exp().to(log_scale.dtype)
            z = z.flip(1) if index % 2 else z
            log_det = log_det - log_scale.mean((1, 2))
        return 0.5 * z.square().mean() - log_det.mean()

    @torch.no_grad()
    def sample(self, count: int) -> Tensor:
        """Draw patches token by token, (count, tokens, values)."""
        x = torch.randn(count, self.num_tokens, self.dim)
        for index, block in reversed(list(enumerate(self.blocks))):
            x = x.flip(1) if index % 2 else x
            caches: list[list[tuple[Tensor, ...]]] = [[] for _ in block]
            for token in range(self.num_tokens - 1):
                h = self.embed[index](x[:, token : token + 1]) + self.positions[index][token]
                for layer, cache in zip(block, caches, strict=True):
                    h = layer(h, None, cache)
                log_scale, shift = self.last[index](h)[:, 0].chunk(2, 1)
                x[:, token + 1] = x[:, token + 1] * log_scale.exp() + shift
            x = x.flip(1) if index % 2 else x
        return x
