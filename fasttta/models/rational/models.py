"""RAda's head on whole models: CLIP, and the linear classifier of a CAV-MAE."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cavmae.model import CAVMAE
from ..clip.model import CLIP
from ..clip.pixels import check_pixels
from .head import FeatureClassifier, RationalHead


def fresh_head(
    dim: int,
    like: Tensor,
    *,
    seed: int = 0,
    heads: int = 8,
    temperature: float = 1.0,
    scale_multiplier: float = 1.0,
) -> RationalHead:
    """A head that changes no prediction yet, on a tensor's device, in float32 or wider.

    Args:
        dim: D. like: says device and type. seed: of its other projections' start.
        heads, temperature, scale_multiplier: as ``RationalHead`` takes them.
    """
    cpu = torch.device("cpu")  # the same start on every device
    with cpu, torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = RationalHead(dim, heads, temperature, scale_multiplier, dtype=torch.float32)
    dtype = torch.promote_types(like.dtype, torch.float32)
    return head.to(like.device, dtype).requires_grad_(False)


class RationalCLIP(FeatureClassifier):
    """CLIP whose scores over a list of classes a rational head weighs: pixels in, logits out.

    Args:
        model: with classes set (``set_classes``).
        head: fresh, it leaves CLIP's scores as they are.

    Source: Chen et al., ICCV 2025 (``RationalHead``).
    """

    input_names = ("images",)

    def __init__(self, model: CLIP, head: RationalHead) -> None:
        text = model._classes()
        scale = model.logit_scale.detach().double().exp().item()
        super().__init__(head, text.to(head.out_proj.weight), scale)
        self.model = model

    def check_inputs(self, images: Tensor) -> None:
        """images: [N, 3, R, R] in [0, 1]."""
        check_pixels(images, self.model.resolution, self.text.device)

    def set_compute_dtype(self, dtype: torch.dtype | None) -> None:
        """Multiply in this precision in the encoder; the head keeps that of its weights."""
        self.model.set_compute_dtype(dtype)

    def encode(self, images: Tensor) -> Tensor:
        """Pixels [N, 3, R, R] -> features [N, E]."""
        return self.model.encode_image(images).to(self.text.dtype)

    def forward(self, images: Tensor) -> Tensor:
        """Pixels [N, 3, R, R] in [0, 1] -> logits [N, K]."""
        return self.fuse(self.encode(images))


class RationalCAVMAE(FeatureClassifier):
    """CAV-MAE whose linear classifier a rational head weighs: audio and video in, logits out.

    A linear classifier's logit is |x| |w_k| cos(x, w_k) + b_k: the mask weighs the terms of the
    cosine, lengths and bias stay, so that a fresh head changes no bit of a prediction. Inside the
    attention the scale is the usual length of x (from the LayerNorm before it) times the mean
    |w_k|.

    Args:
        model: frozen up to and with the LayerNorm of its classifier.
        head: of the model's width.

    Source: the head is that of Chen et al., ICCV 2025, who have it on cosine scores only.
    """

    def __init__(self, model: CAVMAE, head: RationalHead) -> None:
        norm, linear = model.mlp_head
        weight = linear.weight.detach()
        length = norm.weight.detach().double().square() + norm.bias.detach().double().square()
        scale = length.sum().sqrt() * weight.double().norm(dim=-1).mean()
        super().__init__(head, weight.to(head.out_proj.weight), scale.item())
        self.model = model

    @property
    def spans(self) -> tuple[int, int]:
        return self.model.spans

    @property
    def num_heads(self) -> int:
        return self.model.num_heads

    @property
    def input_names(self) -> tuple[str, str]:
        return self.model.input_names

    def check_inputs(self, audio: Tensor, video: Tensor) -> None:
        self.model.check_inputs(audio, video)

    def set_compute_dtype(self, dtype: torch.dtype | None) -> None:
        """Multiply in this precision up to the head, which keeps that of its weights."""
        self.model.set_compute_dtype(dtype)

    def encode(self, audio: Tensor, video: Tensor) -> Tensor:
        """Audio and video -> what the classifier reads, [B, D]."""
        pooled, _ = self.model.pool(self.model.encode(audio, video))
        return self.model.mlp_head[0](pooled).to(self.text.dtype)

    def scored(self, features: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, D] -> logits [B, C] and mask [B, C, D]; text: the classifier's rows."""
        linear = self.model.mlp_head[1]
        lengths = features.norm(dim=-1, keepdim=True) * text.norm(dim=-1)
        added, mask = self.head.deviation(features, text, self.scale)
        return linear(features.to(linear.weight.dtype)) + lengths * added, mask

    def forward(self, audio: Tensor, video: Tensor) -> Tensor:
        """Audio [B, frames, mel bins], video [B, 3, rows, columns] -> logits [B, C]."""
        self.check_inputs(audio, video)
        return self.fuse(self.encode(audio, video))
