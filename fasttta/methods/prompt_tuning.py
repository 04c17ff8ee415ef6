"""Tuning the words before the class name on confident views of one image."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from ..functional import entropy, marginal_entropy
from ..protocols import VisionLanguageModel
from .base import Objective
from .episodic import Episodic, Images, Prediction, Seen, unit
from .options import AtLeast, Finite, Flag, Positive, Share
from .view_ensemble import ensemble_logits, similarity_weights


@dataclass(frozen=True)
class PromptTuning(Episodic, abstract=True):
    """Base of methods that tune a prompt.

    Args:
        views: of an image, the anchor included.
        select: share of the views in the loss, those of the lowest entropy before any update;
            int(views * select) of them, of equal entropies the first.
        lr, weight_decay: of AdamW, whose state starts afresh with every image.
        augment: AugMix the views of images (off in official runs on ImageNet's variants).
    """

    group: ClassVar[str | None] = "prompt"
    strategy: ClassVar[str] = "prompt"

    views: Annotated[int, AtLeast(1)] = 64
    select: Annotated[float, Share(positive=True)] = 0.1
    lr: float = 5e-3
    weight_decay: Annotated[float, AtLeast(0)] = 0.01
    prompt: str = "a photo of a"
    prompt_length: int | None = None
    augment: Flag = field(default=True, kw_only=True)

    @property
    def view_count(self) -> int:
        """The views of an image, the original included."""
        return self.views

    @property
    def augmented(self) -> bool:
        """Whether views are made with AugMix."""
        return self.augment

    def selected_count(self, views: int) -> int:
        """Views in the loss: their share rounded down, as official code does, but at least one."""
        return max(1, int(views * self.select))

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        """AdamW, as in the official code; on a GPU in one kernel that can be captured."""
        parameters = list(parameters)
        cuda = parameters[0].is_cuda
        return torch.optim.AdamW(
            parameters, lr=self.lr, betas=(0.9, 0.999), eps=1e-8,
            weight_decay=self.weight_decay, fused=cuda, capturable=cuda,
        )  # fmt: skip

    def pixels(
        self, model: VisionLanguageModel, images: Images
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Views to learn from [B * N, 3, R, R]; their features [B * N, E] if they are computed
        already; statistics [B, ...] of how the views were made."""
        return images.joined("augmix"), None, {}

    def losses(self, logits: Tensor, text: Tensor, weights: Tensor | None) -> dict[str, Tensor]:
        """[B] each, with ``"total"``, of selected views.

        Args:
            logits: [B, n, C].
            text: [B, C, E], normalised.
            weights: [B, n] of ``loss_weights``.
        """
        raise TypeError(f"{type(self).__name__} defines no losses")

    def loss_weights(self, stats: dict[str, Tensor], selected: Tensor) -> Tensor | None:
        """[B, n] of the selected views in the loss; None: all alike."""
        return None

    def combine(
        self, logits: Tensor, features: Tensor, selected: Tensor, stats: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Prediction [B, C] and weights of the views [B, N].

        Args:
            logits: [B, N, C] of all views.
            features: [B, N, E], normalised.
            selected: [B, n] view indices.
        """
        weights = torch.zeros_like(logits[..., 0])
        weights[:, 0] = 1
        return logits[:, 0], weights

    def forward(self, model: VisionLanguageModel, images: Images) -> Seen:
        """The features of all views, their zero-shot entropies, and the views of least entropy."""
        pixels, features, stats = self.pixels(model, images)
        if features is None:
            features = model.encode_image(pixels)
        seen = self.seen(model, images, features)
        uncertain = entropy(seen.logits)
        count = self.selected_count(uncertain.shape[1])
        selected = uncertain.argsort(dim=1, stable=True)[:, :count]
        places = selected[..., None].expand(-1, -1, seen.features.shape[-1])
        seen.stats = {**stats, "selected": selected}
        seen.parts = {
            "chosen": seen.features.gather(1, places),
            "entropy": uncertain,
            "pixels": pixels.unflatten(0, uncertain.shape),
            "text": images.text.expand(len(uncertain), -1, -1),
        }
        weights = self.loss_weights(stats, selected)
        if weights is not None:
            seen.parts["loss_weights"] = weights
        return seen

    def objective(self, model, features, *, state, constants, valid) -> Objective:
        """The method's losses over the selected views, with the tuned prompt."""
        seen, text = features, unit(state["tuned"])  # [B, C, E]
        logits = model.logit_scale.exp() * seen.parts["chosen"] @ text.transpose(1, 2)
        losses = self.losses(logits, text, seen.parts.get("loss_weights"))
        return Objective(losses=losses, logits=logits, n_used=len(logits))

    def predict(self, model, seen, state) -> Prediction:
        """Logits of all views with the tuned prompt, combined as the method says."""
        text, selected = unit(state["tuned"]), seen.stats["selected"]
        after = model.logit_scale.exp() * seen.features @ text.transpose(1, 2)
        scored = after if self.score_at == "after" else seen.logits
        logits, weights = self.combine(scored, seen.features, selected, seen.stats)
        trace = {
            "features": seen.features, "logits": seen.logits, "logits_after": after,
            "text_after": text,
        }  # fmt: skip
        trace |= {name: seen.parts[name] for name in ("entropy", "pixels", "text")}
        return Prediction(logits, {**seen.stats, "weights": weights}, trace)


@dataclass(frozen=True)
class TPT(PromptTuning):
    """Test-time prompt tuning: sharpen the confident views' mean prediction.

    ``losses``: ``"entropy"`` (marginal), ``"total"``. ``stats``: ``"selected"`` [n] (indices by
    ascending entropy), ``"weights"`` [N] (1 at the anchor), ``"prompt"`` [n_ctx, D] after the
    step. The prediction is that of the anchor with the tuned prompt.

    Source: Shu et al., NeurIPS 2022, and its code (fp16 there; the master precision here).
    """

    name: ClassVar[str] = "tpt"
    captured_by_default: ClassVar[bool] = True
    PRESETS: ClassVar = {"code": {}, "paper": {}}

    def losses(self, logits, text, weights):
        """The marginal entropy of the selected views."""
        value = marginal_entropy(logits)
        return {"entropy": value, "total": value}


@dataclass(frozen=True)
class CTPT(PromptTuning):
    """Calibrated prompt tuning: TPT's loss, less the dispersion of the classes' text features.

    Args:
        dispersion_weight: of the mean distance of text features to their mean.

    ``losses``: ``"entropy"``, ``"dispersion"``, ``"total"`` = entropy - dispersion_weight *
    dispersion. Otherwise as TPT.

    Source: Yoon et al., ICLR 2024, and its code (one joint step).
    """

    name: ClassVar[str] = "c-tpt"
    captured_by_default: ClassVar[bool] = True
    PRESETS: ClassVar = {"code": {}, "paper": {}}

    dispersion_weight: Annotated[float, Finite()] = 50.0

    def losses(self, logits, text, weights):
        """The marginal entropy, less the spread of the classes' text features about their mean."""
        value = marginal_entropy(logits)
        spread = (text - text.mean(1, keepdim=True)).norm(dim=-1).mean(1)
        total = value - self.dispersion_weight * spread
        return {"entropy": value, "dispersion": spread, "total": total}


@dataclass(frozen=True)
class RTPT(PromptTuning):
    """Robust prompt tuning: sharpen every confident view by itself, trust views that agree.

    Args:
        neighbours: nearest views that a view is compared with, at most all others.
        temperature: of the weights, softmax(mean similarity / temperature).
        drop_self: pattern of a run of the official code; see ``similarity_weights``. None: a view
            is never a neighbour of itself.

    ``losses``: ``"entropy"`` (mean over the selected views), ``"total"``. ``stats``:
    ``"selected"``, ``"weights"`` [N] over all views, ``"prompt"``. The prediction is the weighted
    mean of all views' logits with the tuned prompt.

    Source: Sheng et al., CVPR 2025, and its code, whose self-similarities are excluded only where
    rounding makes them at least 1; here always.
    """

    name: ClassVar[str] = "r-tpt"
    captured_by_default: ClassVar[bool] = True
    PRESETS: ClassVar = {"code": {}, "paper": {}}

    neighbours: Annotated[int, AtLeast(1)] = 20
    temperature: Annotated[float, Positive()] = 0.01
    drop_self: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        settle_drop_self(self)

    def losses(self, logits, text, weights):
        """The mean entropy of the selected views, each by itself."""
        value = entropy(logits).mean(1)
        return {"entropy": value, "total": value}

    def combine(self, logits, features, selected, stats):
        """The views' logits, weighted by how much their features agree."""
        return agreement(self, logits, features, self.temperature)


def settle_drop_self(method: Any) -> None:
    """Makes the option ``drop_self`` of RTPT or ATPT a tuple of bools."""
    if method.drop_self is not None:
        object.__setattr__(method, "drop_self", tuple(bool(x) for x in method.drop_self))


def agreement(
    method: Any, logits: Tensor, features: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """R-TPT's ensemble: logits [B, C] and weights [B, N]."""
    n = features.shape[1]
    if method.drop_self is not None and len(method.drop_self) != n:
        raise ValueError(f"drop_self has {len(method.drop_self)} entries, the image {n} views")
    weights = similarity_weights(features, method.neighbours, temperature, method.drop_self)
    return ensemble_logits(logits, weights), weights
