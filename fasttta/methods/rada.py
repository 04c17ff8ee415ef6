"""RAda at test time: the rational head adapted without labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Self

import torch
from torch import Tensor

from .. import functional as F
from ..protocols import FusionModel, RationalModel, Slot, VisionLanguageModel
from .base import EpisodeMethod, Objective, sample_weight, samples_used, weighted_mean
from .options import AtLeast, Flag, OneOf, Positive, Share
from .prompt_text import split_prompt
from .special_bases import ExtendingMethod

_BY_LOSS = {
    "views": {"lr": 5e-3, "score_at": "after"},
    "entropy": {"lr": 1e-4, "score_at": "before"},
}


@dataclass(frozen=True)
class RAda(EpisodeMethod, ExtendingMethod):
    """Tune a rational head over frozen features, without labels.

    The head is that of a ``fasttta.models.FeatureClassifier`` (features), or a fresh one on a CLIP
    (its class texts) or on the linear classifier of a CAV-MAE (its rows): until the first update
    predictions are the source model's.

    ``loss="views"``: a batch holds the views of one image, the original first. The entropy of the
    mean prediction of the most certain views is minimised, starting afresh with every image;
    ``.logits`` [1, C] are those of the original. Features come as the views of one image; CLIP
    takes images and makes the views.
    ``loss="entropy"``: a batch holds samples of a stream, whose mean entropy is minimised.

    Args:
        loss: ``"views"`` or ``"entropy"``; None: entropy on audio-visual models, views on others.
        select: share of the views that is used: those of lowest entropy (at least one) under the
            weights from which an episode starts. Only they take part in the backward pass.
        tune: ``"all"`` parameters of the head, or ``"out"``, its last projection: with a fresh head
            (projection 0) and one step, no other parameter gets a gradient.
        weight_decay: of AdamW, decoupled.
        lr: AdamW's learning rate; None: 5e-3 for views, 1e-4 for a stream.
        heads, temperature, scale_multiplier: of a fresh head, as ``RationalHead`` takes them.
        views, augment: for images: how many views of each, the original included, and whether with
            AugMix. prompt: for class names: the words before the name.
        score_at: None: views are scored after the update, streams before it.

    ``losses``: ``"entropy"``, ``"total"``; ``stats`` of views: ``"selected"``, indices by ascending
    entropy. ``load_tuned`` sets what episodes start from (a head fine-tuned elsewhere).

    Source: no code for test time was published; after the paper's comparison with TPT (Shu et al.,
    NeurIPS 2022), whose objective, selection and AdamW settings these are. Presets: ``"views"``
    (TPT's settings) and ``"stream"`` (entropy of batches, no published settings).
    """

    name: ClassVar[str] = "rada"
    captured_by_default: ClassVar[bool] = True
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "views": {"loss": "views"},
        "stream": {"loss": "entropy"},
    }
    RESOURCES: ClassVar[tuple[str, ...]] = ("tokenizer",)
    families: ClassVar[tuple[str, ...]] = ("features", "fusion", "vision-language")
    group: ClassVar[str | None] = "head"
    frozen_encoder: ClassVar[bool] = True
    #: how the first view of an image is cut, as ``fasttta.data.make_views`` takes it
    base_view: ClassVar[str] = "crop"

    loss: Annotated[str, OneOf("views", "entropy")] | None = None
    select: Annotated[float, Share(positive=True)] = 0.1
    tune: Annotated[str, OneOf("all", "out")] = "all"
    weight_decay: Annotated[float, AtLeast(0)] = 0.01
    lr: Annotated[float, Positive(most=1e6)] | None = None
    heads: Annotated[int, AtLeast(1)] = field(default=8, kw_only=True)
    temperature: Annotated[float, Positive()] = field(default=1.0, kw_only=True)
    scale_multiplier: Annotated[float, Positive()] = field(default=1.0, kw_only=True)
    views: Annotated[int, AtLeast(1)] = field(default=64, kw_only=True)
    augment: Flag = field(default=True, kw_only=True)
    prompt: str = field(default="a photo of a", kw_only=True)
    score_at: Annotated[str, OneOf("before", "after")] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss is not None:
            for name, value in _BY_LOSS[self.loss].items():
                if getattr(self, name) is None:
                    object.__setattr__(self, name, value)
        split_prompt(self.prompt)

    def fitted(self, model: Any) -> Self:
        """The method with the loss, head and learning rate that fit the model.

        Raises:
            ValueError: the model has no class vectors to put a head on, or a head of other options.
        """
        streams = not isinstance(model, VisionLanguageModel) and bool(model.spans)
        if not isinstance(model, RationalModel):
            raise ValueError(
                "RAda needs class vectors to put its head on: a fasttta.models.FeatureClassifier, "
                f"a CLIP with classes or a CAV-MAE; found {type(model).__name__}"
            )
        settled: dict[str, Any] = {"loss": self.loss or ("entropy" if streams else "views")}
        settled |= model.head_options()
        for name in settled.keys() - {"loss"}:
            asked = getattr(self, name)
            if asked not in (settled[name], type(self).__dataclass_fields__[name].default):
                raise ValueError(f"{name}={asked!r}: the model's own head has {settled[name]!r}")
        return replace(self, **settled)

    @property
    def episodic(self) -> bool:
        """Whether every image is an episode: with the loss over views."""
        return self.loss == "views"

    @property
    def view_count(self) -> int:
        """Views made of an image, the original included."""
        return self.views if self.episodic else 1

    @property
    def augmented(self) -> bool:
        """Whether views are made with AugMix."""
        return self.augment

    def extend(self, model: Any, seed: int) -> FusionModel:
        """The model with a head: the one that it has, or a fresh one."""
        return model.rational(
            seed=seed, heads=self.heads, temperature=self.temperature,
            scale_multiplier=self.scale_multiplier,
        )  # fmt: skip

    def tuned(self, model: FusionModel) -> dict[str, Slot]:
        """The head, or only its last projection (``tune``)."""
        return model.tunable("head" if self.tune == "all" else "head_out")

    def optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        """AdamW."""
        parameters = list(parameters)
        assert self.lr is not None  # ``fitted`` has set it
        return torch.optim.AdamW(
            parameters, lr=self.lr, weight_decay=self.weight_decay, fused=True,
            capturable=parameters[0].is_cuda,
        )  # fmt: skip

    def score(self, model: FusionModel, features: Tensor) -> Tensor:
        """Logits of the image itself, or of every sample of a stream."""
        return model.fuse(features[:1] if self.episodic else features)

    def objective(self, model, features, *, state, constants, valid) -> Objective:
        """The entropy of the batch, or the marginal entropy of selected views."""
        weight = sample_weight(valid)
        if self.episodic:
            return self._views(model, features, state, weight)
        logits = model.fuse(features)
        entropy = weighted_mean(F.entropy(logits), weight)
        return Objective(
            losses={"entropy": entropy, "total": entropy},
            logits=logits,
            n_used=samples_used(valid, logits),
        )

    def _views(
        self, model: Any, views: Tensor, state: Mapping[str, Tensor], weight: Tensor | None
    ) -> Objective:
        """Selected views [V, D] of one image. Later steps keep the selection of the first."""
        most = max(1, int(self.select * len(views)))
        with torch.no_grad():
            if "selected" in state:
                original, chosen = model.fuse(views[:1]), state["selected"]
            else:
                before = model.fuse(views)
                original, entropy = before[:1], F.entropy(before)
                if weight is not None:
                    entropy = torch.where(weight > 0, entropy, torch.inf)
                chosen = entropy.argsort(stable=True)[:most]
        logits = model.fuse(views.index_select(0, chosen))
        log_p = logits.log_softmax(dim=-1)
        if weight is not None:  # with fewer views than places fewer are selected
            places = (self.select * weight.sum()).floor().clamp(min=1)
            present = torch.arange(most, device=views.device) < places
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
