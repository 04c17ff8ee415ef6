"""EATA: entropy minimisation on reliable, non-redundant samples, with a Fisher penalty."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as nnf
from torch import Tensor

from .. import functional as F
from ..protocols import FusionModel
from .base import Objective
from .fisher import fitted, read_official
from .options import AtLeast, Positive
from .saved_state import check_layout
from .special_bases import StatefulMethod


@dataclass(frozen=True)
class EATA(StatefulMethod):
    """Minimise the entropy of samples that are reliable and tell something new.

    A sample counts if its entropy is below a margin and its prediction differs from the moving
    average of those used before (|cosine| below ``d_margin``); it weighs exp(margin - entropy).
    With ``fisher=fasttta.collect_fisher(model, loader)`` tuned values that matter on clean data are
    held near their source values; without, this is ETA. ``EATA.fisher_from_official(path)`` reads
    what the official BriMPR code saves. Where no sample counts, nothing is updated.

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
    captured_by_default: ClassVar[bool] = True
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "read-benchmark": {"lr": 1e-4, "d_margin": 0.1, "fisher_weight": 1.0}
    }
    RESOURCES: ClassVar[tuple[str, ...]] = ("fisher",)
    group: ClassVar[str | None] = "norm"
    frozen_encoder: ClassVar[bool] = False

    # no entropy of C classes is above ln C; exp(margin) weighs the gradients
    e_margin: Annotated[float, Positive(most=20)] | None = None
    d_margin: Annotated[float, Positive()] = 0.1
    fisher_weight: Annotated[float, AtLeast(0)] = 1.0
    lr: float = 1e-4

    def constants(self, model: FusionModel, resources: Mapping[str, Any]) -> dict[str, Tensor]:
        """``"fisher.<name>"`` and ``"source.<name>"`` of every tuned tensor, given ``fisher``.

        Raises:
            TypeError, ValueError: ``fisher`` is of another model, not finite or negative.
        """
        fisher = resources.get("fisher")
        if fisher is None:
            return {}
        values = {
            name: model.get_parameter(slot.parameter).detach()
            for name, slot in self.tuned(model).items()
        }
        constants: dict[str, Tensor] = {}
        for name, weights in fitted(fisher, values).items():
            constants |= {f"fisher.{name}": weights, f"source.{name}": values[name]}
        return constants

    def check_saved(
        self, model: FusionModel, constants: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> None:
        """Checks Fisher weights and source values against the model, and the moving average."""
        if constants:
            self._check_fisher(model, constants)
        super().check_saved(model, constants, state)

    def _check_fisher(self, model: FusionModel, constants: Mapping[str, Tensor]) -> None:
        fisher = {
            name.removeprefix("fisher."): x
            for name, x in constants.items()
            if name.startswith("fisher.")
        }
        made = self.constants(model, {"fisher": fisher})
        check_layout("constant", constants, made)
        for name, x in constants.items():
            value = made[name].to("cpu", x.dtype)
            if name.startswith("source.") and not torch.equal(x.cpu(), value):
                raise ValueError(f"constant.{name} is not what this model's source values are")

    @staticmethod
    def fisher_from_official(path: str | os.PathLike) -> dict[str, tuple[Tensor, Tensor]]:
        """Reads a Fisher file of the official BriMPR code (``fisher_ks50.pkl``), for
        ``fasttta.adapt(model, "eata", fisher=...)``: a pickled dict of pairs [weights, source
        values] by parameter name. Nothing in it is run.

        Returns:
            The pairs by name, without ``module.``; norms that the model does not run have zeros.

        Raises:
            FileNotFoundError, TypeError, ValueError: there is no such file, or it holds something
                else.
        """
        return read_official(path)

    def blank_state(self, features: Tensor, num_classes: int) -> dict[str, Tensor]:
        """``"average"`` [C]: the moving average of predictions, zeros before the first."""
        return {"average": features.new_zeros(num_classes)}

    def objective(
        self,
        model: FusionModel,
        features: Any,
        *,
        state: Mapping[str, Tensor],
        constants: Mapping[str, Tensor],
        valid: Tensor,
    ) -> Objective:
        """Weighted entropy of the samples that count, and the Fisher penalty."""
        logits = self.logits(model, features)
        margin = 0.4 * math.log(logits.shape[1]) if self.e_margin is None else self.e_margin
        entropy = F.entropy(logits)
        with torch.no_grad():
            p = logits.softmax(dim=-1)
            average = state.get("average", torch.zeros_like(p[0]))  # zeros at first: cosine 0
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
