"""ABPEM: attention bootstrapping with principal entropy minimisation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Self

import torch
from torch import Tensor

from .. import functional as F
from ..protocols import FusionModel, Promptable
from ..source_stats import SourceStats
from .base import Objective, WeightedMethod, balance_warning, joined, weighted_mean
from .options import AtLeast, DefaultInt, Finite, OneOf, require
from .queue import WindowedMethod, check_queue
from .special_bases import StatefulMethod


@dataclass(frozen=True)
class ABPEM(WindowedMethod, StatefulMethod, WeightedMethod):
    """Tune the fusion block's q, k, v so that cross-modal attention scores are distributed like
    self-attention ones, and the k most probable classes are sharpened.

    total = entropy_weight * entropy - balance_weight * balance + attention_weight * attention,
    over the current batch and the encoder outputs of the last ``window - 1`` batches.

    Args:
        k: classes in the principal entropy. Left out: 8, or all of a model that has fewer.
        window: batches in the loss, the current one included; 1 = no queue of past batches.
        entropy_weight, balance_weight, attention_weight: weights of the three terms.
        balance: ``"mean"``: entropy of the mean prediction; ``"softmax-sum"``: READ's form.
        heads: statistics of the head-mean of the scores (``"mean"``), or of each head.
        pair: self block that a cross block is matched with: that of its ``"key"`` modality (the
            official code) or of its ``"query"`` modality (figure 2 of the paper).
        anchor: ``"self"``: statistics of the batch's self-attention blocks; ``"source"``:
            fixed ones of source data, ``adapt(..., source_stats=fasttta.collect_stats(...))``.
        lr: Adam's learning rate.

    ``losses``: ``"entropy"``, ``"balance"`` (the positive entropy), ``"attention"``, ``"total"``.
    ``stats``, over the whole window, oldest sample first: ``"score_mean"`` and ``"score_std"``
    [n, M, M] ([n, H, M, M] for heads="each"; row = query, column = key modality) and
    ``"attention_gap"`` [n], the attention loss of each sample, KL(va, aa) + KL(av, vv).
    The prediction is the one after the update.

    Source: ABPEM and its official code (golden vectors follow the code). Presets are its four
    scripts; run them with these batch sizes: ``"ks50-video"`` and ``"ks50-audio"`` 8,
    ``"vgg-video"`` and ``"vgg-audio"`` 32.
    """

    name: ClassVar[str] = "abpem"
    captured_by_default: ClassVar[bool] = True
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "ks50-video": {"k": 8, "window": 4},
        "ks50-audio": {"k": 7, "window": 4, "attention_weight": 5.0},
        "vgg-video": {"k": 28, "window": 4},
        "vgg-audio": {"k": 30, "window": 2},
    }
    RESOURCES: ClassVar[tuple[str, ...]] = ("source_stats",)
    group: ClassVar[str | None] = "fusion_qkv"
    frozen_encoder: ClassVar[bool] = True

    k: Annotated[int, AtLeast(1)] = DefaultInt(8)
    window: Annotated[int, AtLeast(1)] = 4
    entropy_weight: Annotated[float, Finite()] = 1.0
    balance_weight: Annotated[float, Finite()] = 1.0
    attention_weight: Annotated[float, Finite()] = 1.0
    balance: Annotated[str, OneOf("mean", "softmax-sum")] = "mean"
    heads: Annotated[str, OneOf("mean", "each")] = "mean"
    pair: Annotated[str, OneOf("key", "query")] = "key"
    anchor: Annotated[str, OneOf("self", "source")] = "self"
    lr: float = 1e-4
    score_at: str = field(default="after", kw_only=True)

    def weights(self) -> tuple[float, ...]:
        """Of the three terms."""
        return self.entropy_weight, self.balance_weight, self.attention_weight

    def single_sample(self) -> str:
        """A warning, if the class-balance term has a weight."""
        return balance_warning(self, self.window) if self.balance_weight != 0 else ""

    def fitted(self, model: FusionModel) -> Self:
        """Settles the default of ``k``.

        Raises:
            ValueError: the model has fewer than two spans, or fewer than ``k`` classes.
        """
        super().fitted(model)
        if len(model.spans) < 2 and self.attention_weight != 0:
            raise ValueError(
                "ABPEM compares attention between modalities, and this model has one "
                f"({len(model.spans)} span): needed at least 2 spans, or attention_weight=0, or "
                "a method without attention (read, tent)"
            )
        classes = model.num_classes
        if classes is None:  # the first batch shows it
            return self
        if isinstance(self.k, DefaultInt):
            return replace(self, k=min(int(self.k), classes))
        require(self.k <= classes, "k", self.k, f"at most the model's {classes} classes")
        return self

    def constants(self, model: FusionModel, resources: Mapping[str, Any]) -> dict[str, Tensor]:
        """``"anchor_mean"`` and ``"anchor_std"``, [M] or [H, M] each, with ``anchor="source"``.

        Raises:
            TypeError, ValueError: ``source_stats`` is missing, not needed, or of another model.
        """
        source_stats = resources.get("source_stats")
        if self.anchor == "self":
            if source_stats is not None:
                raise ValueError('source_stats: used only with anchor="source", found "self"')
            return {}
        if source_stats is None:
            raise ValueError(
                'anchor="source" needs source_stats, found None; make them from a few clean '
                "batches: source_stats=fasttta.collect_stats(model, loader)"
            )
        if not isinstance(source_stats, SourceStats):
            kind = type(source_stats).__name__
            raise TypeError(f"source_stats must be fasttta.SourceStats, found {kind}")
        std, mean = source_stats.self_scores(self.heads)
        shape = (model.num_heads, len(model.spans))[0 if self.heads == "each" else 1 :]
        if mean.shape != shape:
            raise ValueError(
                f"source_stats are of another model: {list(mean.shape)}, needed {list(shape)} "
                "(heads, modalities)"
            )
        return {"anchor_mean": mean, "anchor_std": std}

    def check_saved(
        self, model: FusionModel, constants: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> None:
        """Checks the anchors and the queue of batches."""
        needed = set() if self.anchor == "self" else {"anchor_mean", "anchor_std"}
        if constants.keys() != needed:
            odd = sorted(constants.keys() ^ needed)[0]
            raise ValueError(f"constant.{odd} is missing, or of another method or model")
        if needed:
            pair = constants["anchor_std"], constants["anchor_mean"]
            each = self.heads == "each"
            stats = SourceStats(scores_per_head=pair) if each else SourceStats(scores=pair)
            self.constants(model, {"source_stats": stats})
        sample = None
        if isinstance(model, Promptable):  # for other models the first batch shows the width
            sample = sum(model.spans), model.feature_shapes()["joint"][1]
        check_queue(state, self.window, sample)

    def objective(
        self,
        model: FusionModel,
        features: Any,
        *,
        state: Mapping[str, Tensor],
        constants: Mapping[str, Tensor],
        valid: Tensor,
    ) -> Objective:
        """The three terms over the batches of the window."""
        window = self.batches(model, features, valid, state)
        valid = window.valid
        anchor = None
        if self.anchor == "source":
            anchor = F.Moments(constants["anchor_mean"], constants["anchor_std"])
        spans = model.spans
        passes: list[tuple[Tensor, ...]] = [()] * len(window.portions)
        for i in window.order:
            logits, (q, k, scale) = model.fuse_attention(window.portions[i])
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.attention_weight != 0):
                gap, moments = F.attention_bootstrap(
                    q, k, spans, scale, self.heads, self.pair, anchor=anchor,
                    return_moments=True,
                )  # fmt: skip
            passes[i] = logits, gap, *moments, q, k
        *results, queries, keys = zip(*passes, strict=True)
        logits, gap, mean, std = map(joined, results)
        weight = window.weight
        total, entropy, balance = F.adaptation_head(
            logits, self.k, self.entropy_weight, self.balance_weight, self.balance, weight=weight
        )
        attention = weighted_mean(gap, weight.to(gap.dtype))
        if self.attention_weight != 0:
            total = total + self.attention_weight * attention
        # without this, a batch that does not count would give the loss of the past batches
        counts, nan = (valid.amax() if valid.ndim else valid) > 0, weight.new_full((), torch.nan)
        total = torch.where(counts, total, nan.to(total))
        current = window.current(logits)
        # if other tokens replaced the batch's, these logits are not of the batch
        current = torch.where(counts, current, nan)
        return Objective(
            losses={
                "entropy": entropy, "balance": balance, "attention": attention, "total": total
            },
            logits=current,
            n_used=weight.sum(),
            stats={"score_mean": mean, "score_std": std, "attention_gap": gap},
            state=window.after(valid),
            trace={
                "tokens": features,
                "window_logits": logits,
                "q": lambda: joined(queries),
                "k": lambda: joined(keys),
            },
        )  # fmt: skip
