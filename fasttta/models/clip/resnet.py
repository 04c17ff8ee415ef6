"""CLIP's modified ResNet: a three-convolution stem, anti-aliased strides, attention pooling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks.layers import Linear
from .vision_transformer import AttentionMaps, top_score


class Conv(nn.Conv2d):
    """A convolution without bias in ``compute_dtype`` (None: in the weight's own)."""

    compute_dtype: torch.dtype | None = None

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1) -> None:
        super().__init__(channels, out, kernel, stride, kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, h, w] -> [N, out, h', w'], in the type of ``x``."""
        dtype = self.compute_dtype or self.weight.dtype
        y = F.conv2d(x.to(dtype), self.weight.to(dtype), None, self.stride, self.padding)
        return y.to(x.dtype)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1; a stride is an average pool before the last (and before the shortcut)."""

    def __init__(self, channels: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = Conv(channels, planes, 1), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = Conv(planes, planes, 3), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = Conv(planes, planes * 4, 1), nn.BatchNorm2d(planes * 4)
        self.stride = stride
        self.downsample: nn.Sequential | None = None
        if stride > 1 or channels != planes * 4:
            conv, norm = Conv(channels, planes * 4, 1), nn.BatchNorm2d(planes * 4)
            self.downsample = nn.Sequential()
            self.downsample.add_module("0", conv)
            self.downsample.add_module("1", norm)

    def _pool(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.stride) if self.stride > 1 else x

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, h, w] -> [N, 4 planes, h / stride, w / stride]."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(self._pool(y)))
        return F.relu(y + (x if self.downsample is None else self.downsample(self._pool(x))))


class AttentionPool(nn.Module):
    """One query, the mean position, attends to itself and all positions."""

    def __init__(self, grid: int, dim: int, heads: int, embed_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.zeros(grid**2 + 1, dim))
        self.q_proj, self.k_proj, self.v_proj = (Linear(dim, dim) for _ in range(3))
        self.c_proj = Linear(dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, G, G] -> [N, E]."""
        x = x.flatten(2).transpose(1, 2)  # [N, G*G, C]
        x = torch.cat((x.mean(1, keepdim=True), x), 1) + self.positional_embedding
        q, k, v = (
            f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for f, y in ((self.q_proj, x[:, :1]), (self.k_proj, x), (self.v_proj, x))
        )
        y = F.scaled_dot_product_attention(q, k, v)
        return self.c_proj(y.transpose(1, 2).flatten(1)).to(x.dtype)


class ModifiedResNet(nn.Module):
    """CLIP's ResNet: a stem of three convolutions, anti-aliased strides, an attention pool.

    The image's feature is read off an attention pool over the last feature map.

    Args:
        resolution: R, pixels a side, a multiple of 32.
        width: channels of the stem's output.
        layers: bottlenecks of each of the four stages.
        embed_dim: E, of the joint space.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self, resolution: int, width: int, layers: Sequence[int], heads: int, embed_dim: int
    ) -> None:
        super().__init__()
        self.resolution, self.grid = resolution, resolution // 32
        half = width // 2
        self.conv1, self.bn1 = Conv(3, half, 3, stride=2), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = Conv(half, half, 3), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = Conv(half, width, 3), nn.BatchNorm2d(width)
        channels = width
        for i, count in enumerate(layers):
            planes, blocks = width * 2**i, []
            for j in range(count):
                blocks.append(Bottleneck(channels, planes, 2 if i and not j else 1))
                channels = planes * 4
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.attnpool = AttentionPool(self.grid, channels, heads, embed_dim)

    def features(self, x: Tensor) -> Tensor:
        """Normalised pixels [N, 3, R, R] -> the last feature map [N, C, G, G]."""
        for i in (1, 2, 3):
            x = F.relu(getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x)))
        x = F.avg_pool2d(x, 2)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Normalised pixels [N, 3, R, R] -> features [N, E], not normalised."""
        return self.attnpool(self.features(x))

    def attention_maps(self, x: Tensor, text: Tensor, scale: Tensor, rollout: str) -> AttentionMaps:
        """Grad-CAM of normalised pixels [N, 3, R, R], whatever ``rollout`` is: relu(sum over
        channels of weight * map), weight = spatial mean of dS / d(map).

        Args:
            text: [C, E], or one list of classes a view [N, C, E]; normalised.
            scale: factor of the cosines, 0-d.
        """
        with torch.no_grad():
            maps = self.features(x)
        with torch.enable_grad():
            maps = maps.detach().requires_grad_()
            features = self.attnpool(maps)
            score, logits = top_score(features, text, scale)
            (gradient,) = torch.autograd.grad(score, maps)
        with torch.no_grad():
            weight = gradient.mean((2, 3), keepdim=True)
            rows = (weight * maps).sum(1).clamp_min(0).flatten(1)
        return AttentionMaps(rows, features.detach(), logits.detach())
