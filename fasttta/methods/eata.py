"""EATA: entropy minimisation on reliable, non-redundant samples, with a Fisher penalty."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as nnf
from torch import Tensor

from .. import functional as F
from .base import Method, Objective, require, require_number
from .contract import check_layout


@dataclass(frozen=True)
class EATA(Method):
    """Minimise the entropy of samples that are reliable and tell something new.

    A sample counts if its entropy is below a margin and its prediction differs from the moving
    average of those used before (|cosine| below ``d_margin``); it weighs exp(margin - entropy).
    With ``fisher=fasttta.collect_fisher(model, loader)`` tuned values that matter on clean data are
    held near their source values; without, this is ETA. Where no sample counts, nothing is updated.

    Args:
        e_margin: entropy margin in nats; None: 0.4 ln C.
        d_margin: bound on the cosine similarity with the moving average, which takes 0.1 of the
            mean of the newly used predictions.
        fisher_weight: weight of the penalty sum F (w - w_source)².
        lr: Adam's learning rate.

    ``losses``: ``"entropy"`` (weighted), ``"fisher"`` (with Fisher weights), ``"total"``.
    ``stats``: ``"used"`` [B] bool. The prediction is the one before the update.

    Source: Niu et al., "Efficient Test-Time Model Adaptation without Forgetting", ICML 2022, as
    re-implemented for the audio-visual benchmark by the BriMPR code. Preset ``"read-benchmark"``
    is those settings. The original repository's reset leaves the moving average behind; ours
    restores everything.
    """

    name: ClassVar[str] = "eata"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "read-benchmark": {"lr": 1e-4, "d_margin": 0.1, "fisher_weight": 1.0}
    }
    RESOURCES: ClassVar[tuple[str, ...]] = ("fisher",)
    group: ClassVar[str | None] = "norm"
    frozen_encoder: ClassVar[bool] = False
    carries_state: ClassVar[bool] = True

    e_margin: float | None = None
    d_margin: float = 0.1
    fisher_weight: float = 1.0
    lr: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.e_margin is not None:
            # no entropy of C classes is above ln C; exp(margin) weighs the gradients
            require_number("e_margin", self.e_margin, positive=True, most=20)
        require_number("d_margin", self.d_margin, positive=True)
        require_number("fisher_weight", self.fisher_weight)
        require(self.fisher_weight >= 0, "fisher_weight", self.fisher_weight, "at least 0")

    def constants(self, model, resources: Mapping[str, Any]) -> dict[str, Tensor]:
        fisher = resources.get("fisher")
        if fisher is None:
            return {}
        if not isinstance(fisher, Mapping) or not all(
            isinstance(x, Tensor) for x in fisher.values()
        ):
            raise TypeError(
                f"fisher must be a dict of tensors by tuned name, as fasttta.collect_fisher makes "
                f"it, found {type(fisher).__name__}"
            )
        tuned = self.tuned(model)
        odd = sorted(tuned.keys() ^ fisher.keys())
        if odd:
            raise ValueError(
                f"fisher is of another model: {', '.join(odd[:3])} in one of them only; make it "
                "with fasttta.collect_fisher(model, loader)"
            )
        constants: dict[str, Tensor] = {}
        for name, weights in fisher.items():
            value = model.get_parameter(tuned[name].parameter).detach()
            if weights.shape != value.shape:
                raise ValueError(
                    f"fisher[{name!r}] has shape {tuple(weights.shape)}, needed "
                    f"{tuple(value.shape)}"
                )
            if not (torch.isfinite(weights).all() and (weights >= 0).all()):
                raise ValueError(f"fisher[{name!r}] must be finite and not negative")
            constants |= {f"fisher.{name}": weights, f"source.{name}": value}
        return constants

    def check_constants(self, model, constants: Mapping[str, Tensor]) -> None:
        if not constants:
            return
        fisher = {
            name.removeprefix("fisher."): x
            for name, x in constants.items()
            if name.startswith("fisher.")
        }
        made = self.constants(model, {"fisher": fisher})
        check_layout("constant", constants, made)
        for name, x in constants.items():
            own = made[name].to("cpu", x.dtype)
            if name.startswith("source.") and not torch.equal(x.cpu(), own):
                raise ValueError(f"constant.{name} is not what this model's source values are")

    def blank_state(self, features, num_classes) -> dict[str, Tensor]:
        return {"average": features.new_zeros(num_classes)}

    def objective(self, model, features, *, state, constants, valid) -> Objective:
        logits = self.logits(model, features)
        margin = 0.4 * math.log(logits.shape[1]) if self.e_margin is None else self.e_margin
        entropy = F.entropy(logits)
        with torch.no_grad():
            p = logits.softmax(dim=-1)
            average = state.get("average", torch.zeros_like(p[0]))  # zeros: none yet, nothing alike
            similar = nnf.cosine_similarity(average.unsqueeze(0), p, dim=1).abs()
            used = (entropy < margin) & (similar < self.d_margin) & (valid > 0)
            share = used.to(p.dtype)
            count = share.sum()
            mean = torch.where(used.unsqueeze(-1), p, 0).sum(dim=0) / count.clamp_min(1)
            moved = torch.where(average.sum() == 0, mean, 0.9 * average + 0.1 * mean)
            weight = share * torch.exp(margin - entropy) / count.clamp_min(1)
            weight = torch.where(used, weight, 0)
        loss = torch.where(used, entropy * weight, 0).sum()
        losses = {"entropy": loss, "total": loss}
        tuned = self.tuned(model)
        held = {n: slot.parameter for n, slot in tuned.items() if f"fisher.{n}" in constants}
        if held:
            moves = {n: model.get_parameter(p) - constants[f"source.{n}"] for n, p in held.items()}
            losses["fisher"] = torch.stack(
                [(constants[f"fisher.{x}"] * moves[x].square()).sum() for x in held]
            ).sum()
            losses["total"] = loss + self.fisher_weight * losses["fisher"]
        return Objective(
            losses=losses,
            logits=logits,
            n_used=count,
            apply=(count > 0).to(p.dtype),
            stats={"used": used},
            state={"average": torch.where(count > 0, moved, average)},
        )
