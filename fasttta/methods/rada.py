"""RAda at test time: the rational head adapted without labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import functional as F
from ..protocols import FusionModel, Slot
from .base import Method, Objective, require, require_number, sample_weight


@dataclass(frozen=True)
class RAda(Method):
    """Tune the head of a ``fasttta.models.FeatureClassifier`` on features without labels.

    ``loss="views"``: a step's batch is the views of one image, the original first; the
    entropy of the mean prediction of the most certain ones is minimised, every image from the
    start again, and ``.logits`` [1, C] is the original's. ``loss="entropy"``: a step's batch
    are samples of a stream; their mean entropy is minimised. Encoders are never run: features are
    what it takes, and they can be kept.

    Args:
        loss: ``"views"`` or ``"entropy"``.
        select: part of the views that is used, those of lowest entropy (at least one), found with
            the weights an episode starts from. Only they take part in the backward pass.
        tune: ``"all"`` parameters of the head, or ``"out"``, its last projection: with a fresh head
            (projection 0) and one step no other gets a gradient.
        weight_decay: of AdamW, decoupled.
        lr: AdamW's learning rate.

    ``losses``: ``"entropy"``, ``"total"``; ``stats`` of views: ``"selected"``, indices by ascending
    entropy. Views are scored after the update, streams before it unless ``score_at`` says
    otherwise. ``load_tuned`` sets what episodes start from.

    Source: no code for test time was published; after the paper's comparison with TPT (Shu et al.,
    NeurIPS 2022), whose objective, selection and AdamW settings these are. Presets: ``"views"``
    (TPT's settings) and ``"stream"`` (entropy of batches, no published settings).
    """

    name: ClassVar[str] = "rada"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "views": {},
        "stream": {"loss": "entropy", "lr": 1e-4, "score_at": "before"},
    }
    families: ClassVar[tuple[str, ...]] = ("features",)
    group: ClassVar[str | None] = "head"
    frozen_encoder: ClassVar[bool] = True
    carries_state: ClassVar[bool] = True

    loss: str = "views"
    select: float = 0.1
    tune: str = "all"
    weight_decay: float = 0.01
    lr: float = 5e-3
    score_at: str = field(default="after", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.loss in ("views", "entropy"), "loss", self.loss, '"views" or "entropy"')
        require(self.tune in ("all", "out"), "tune", self.tune, '"all" or "out"')
        require_number("select", self.select, positive=True)
        require(self.select <= 1, "select", self.select, "at most 1")
        require_number("weight_decay", self.weight_decay)
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "at least 0")

    @property
    def episodic(self) -> bool:
        return self.loss == "views"

    def check_model(self, model: FusionModel) -> None:
        require(hasattr(model, "head"), "model", type(model).__name__,
                "fasttta.models.FeatureClassifier, a rational head over features")  # fmt: skip

    def tuned(self, model: FusionModel) -> dict[str, Slot]:
        return model.tunable("head" if self.tune == "all" else "head_out")

    def optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        parameters = list(parameters)
        return torch.optim.AdamW(
            parameters, lr=self.lr, weight_decay=self.weight_decay, fused=True,
            capturable=parameters[0].is_cuda,
        )  # fmt: skip

    def score(self, model: FusionModel, features: Tensor) -> Tensor:
        return model.fuse(features[:1] if self.episodic else features)

    def objective(self, model, features, *, state, constants, valid) -> Objective:
        weight = sample_weight(valid)
        if self.episodic:
            return self._views(model, features, state, weight)
        logits = model.fuse(features)
        entropy, used = F.entropy(logits), len(logits) if weight is None else weight.sum()
        if weight is not None:
            entropy = torch.where(weight > 0, entropy, 0)
        entropy = entropy.sum() / used
        return Objective(losses={"entropy": entropy, "total": entropy}, logits=logits, n_used=used)

    def _views(
        self, model: Any, views: Tensor, state: Mapping[str, Tensor], weight: Tensor | None
    ) -> Objective:
        """Views [V, D] of one image. Those chosen by the first step stay chosen in later ones."""
        count = len(views) if weight is None else weight.sum()
        most = max(1, int(self.select * len(views)))
        with torch.no_grad():
            original = model.fuse(views[:1])
            if "selected" in state:
                chosen = state["selected"]
            else:
                entropy = F.entropy(model.fuse(views))
                if weight is not None:
                    entropy = torch.where(weight > 0, entropy, torch.inf)
                chosen = entropy.argsort(stable=True)[:most]
        logits = model.fuse(views.index_select(0, chosen))
        log_p = logits.log_softmax(dim=-1)
        if weight is not None:  # fewer views than places: fewer are chosen
            present = torch.arange(most, device=views.device) < (self.select * count).floor().clamp(
                min=1
            )
            log_p = torch.where(present.unsqueeze(1), log_p, -torch.inf)
            number = present.sum()
        else:
            number = torch.full((), most, device=views.device)
        mean = log_p.logsumexp(dim=0) - number.log()
        entropy = -(mean.exp() * mean).sum()
        return Objective(
            losses={"entropy": entropy, "total": entropy},
            logits=original,
            n_used=number,
            stats={"selected": chosen},
            state={"selected": chosen},
        )
