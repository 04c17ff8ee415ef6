"""MTA: a robust mean of the views' features, without any training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from .episodic import Episodic, Prediction, unit
from .options import AtLeast, Finite, Flag, Positive, Share


@dataclass(frozen=True)
class MTA(Episodic):
    """MeanShift for test-time augmentation: the mode of the views' features, with a learnt
    inlierness of every view, is classified.

    Args:
        views: of an image, the anchor included; without AugMix, as published.
        prompt, prompt_length: as in ``TPT``; nothing of it is tuned.
        nearest: share of the other views that a view's bandwidth is measured on.
        affinity: weight of the inlierness of views with similar predictions in that of a view.
        temperature: of the inlierness.
        iterations: of each fixed point, and of their alternation.
        tolerance: of each fixed point.

    ``stats``: ``"weights"`` [N], the inlierness; ``"bandwidth"`` [N]. ``.logits`` are
    those of the mode. lr and steps have no effect.

    Source: Zanella and Ben Ayed, CVPR 2024, and its code.
    """

    name: ClassVar[str] = "mta"
    captured_by_default: ClassVar[bool] = True
    PRESETS: ClassVar = {"code": {}, "paper": {}}

    views: Annotated[int, AtLeast(1)] = 64
    prompt: str = "a photo of a"
    prompt_length: int | None = None
    nearest: Annotated[float, Share(positive=True)] = 0.3
    affinity: Annotated[float, Finite()] = 4.0
    temperature: Annotated[float, Positive()] = 0.2
    iterations: Annotated[int, AtLeast(1)] = 5
    tolerance: Annotated[float, Positive()] = 1e-6
    augment: Flag = field(default=False, kw_only=True)
    lr: float = field(default=0.0, kw_only=True)

    @property
    def view_count(self) -> int:
        """The views of an image, the original included."""
        return self.views

    @property
    def augmented(self) -> bool:
        """Whether views are made with AugMix."""
        return self.augment

    def predict(self, model, seen, state) -> Prediction:
        """Logits of the mode of the views' features (before: of the anchor's feature); weights and
        bandwidths of the views as ``stats``."""
        features, (text,) = seen.features, seen.parts["text"]
        bandwidth = self._bandwidth(features)
        mode, weights = self._mode(features, seen.logits.softmax(-1), bandwidth)
        scored = mode if self.score_at == "after" else features[:, 0]
        return Prediction(
            logits=model.logit_scale.exp() * torch.einsum("be,ce->bc", scored, text),
            stats={"weights": weights, "bandwidth": bandwidth.sqrt()},
            trace={"features": features, "logits": seen.logits, "mode": mode},
        )

    def _bandwidth(self, features: Tensor) -> Tensor:
        """Squared, [B, N]: half the mean squared distance to the nearest other views."""
        n = features.shape[1]
        count = int(self.nearest * (n - 1))
        if not count:  # too few views for this share: all of them are used
            count = n - 1
        if not count:
            return features.new_ones(features.shape[:2])
        squared = torch.cdist(features, features, compute_mode=_EXACT).square()
        squared = squared + torch.diag(squared.new_full((n,), torch.inf))
        return 0.5 * squared.topk(count, dim=-1, largest=False).values.mean(-1)

    def _mode(self, features: Tensor, p: Tensor, bandwidth: Tensor) -> tuple[Tensor, Tensor]:
        """Mode [B, E] and inlierness [B, N]."""
        affinity = p @ p.transpose(1, 2)  # [B, N, N]
        mode = features[:, 0]
        y = torch.full_like(bandwidth, 1 / features.shape[1])
        # distances between equal views, and to their mean, are rounding errors
        width = 2 * bandwidth.clamp_min((16 * torch.finfo(bandwidth.dtype).eps) ** 2)

        def exponent(mode: Tensor) -> Tensor:
            return -(features - mode[:, None]).square().sum(-1) / width

        def kernel(mode: Tensor) -> Tensor:
            return exponent(mode).exp()

        def fixed_point(start: Tensor, update) -> Tensor:
            """Iterates until the values of an image no longer move; decided on the device."""
            value, going = start, torch.ones_like(start[:, 0], dtype=torch.bool)
            for _ in range(self.iterations):
                new = torch.where(going[:, None], update(value), value)
                going = going & ((new - value).norm(dim=1) >= self.tolerance)
                value = new
            return value

        def inlierness(k: Tensor):
            return lambda y: (
                (k + self.affinity * (affinity @ y[..., None])[..., 0]) / self.temperature
            ).softmax(-1)

        def shifted(y: Tensor):
            def update(mode: Tensor) -> Tensor:
                e = exponent(mode)  # 0 for the nearest view: a common factor cancels
                w = (e - e.amax(1, keepdim=True)).exp() * y
                return unit((w[..., None] * features).sum(1) / w.sum(1, keepdim=True))

            return update

        for _ in range(self.iterations):
            y = fixed_point(y, inlierness(kernel(mode)))
            mode = fixed_point(mode, shifted(y))
        return mode, y


_EXACT = "donot_use_mm_for_euclid_dist"
