"""Base of methods of vision-language models, which adapt to each image separately."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from ..protocols import VisionLanguageModel
from ..views import Views
from .base import EpisodeMethod, Objective
from .class_check import check_episodes
from .options import AtLeast, check_option
from .prompt_text import prompt_words


@dataclass
class Images:
    """B images, whose episodes are computed together.

    Attributes:
        views: of each image, alike in number.
        text: [1, C, E], normalised features of the classes with the prompt at the start.
        seed: of random numbers, the same for every image.
        noise: [B or 1, 3, R, R], what ``Episodic.noise`` returned.
    """

    views: Sequence[Views]
    text: Tensor
    seed: int = 0
    noise: Tensor | None = None

    def joined(self, name: str) -> Tensor:
        """A part of all images' views ("base", "mix", "augmix"), [B * N, 3, R, R]."""
        return _joined([getattr(views, name) for views in self.views])

    def anchors(self) -> Tensor:
        """The images themselves, [B, 3, R, R]."""
        return _joined([views.base[:1] for views in self.views])


@dataclass
class Seen:
    """Results of the forward pass of B episodes, before any update and without gradient.

    Attributes:
        features: [B, N, E] of the views, normalised.
        logits: [B, N, C] of the views with the prompt at the start; view 0 is the image itself.
        stats: [B, ...] each, for ``StepResult.stats``.
        parts: further tensors [B, ...] that objective and prediction need, by name.
    """

    features: Tensor
    logits: Tensor
    stats: dict[str, Tensor] = field(default_factory=dict)
    parts: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Prediction:
    """Predictions of B episodes: logits [B, C], statistics and intermediates [B, ...] each."""

    logits: Tensor
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    trace: Mapping[str, Tensor] = field(default_factory=dict)


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def unit(x: Tensor) -> Tensor:
    """x [..., E] divided by its norms."""
    return x / x.norm(dim=-1, keepdim=True)


class _AsOptionsSay(abc.ABCMeta):
    """Lets ``isinstance(method, Episodic)`` mean ``method.episodic``."""

    def __instancecheck__(cls, instance: Any) -> bool:
        if cls.__dict__.get("_BY_OPTIONS") and isinstance(instance, EpisodeMethod):
            return instance.episodic
        return super().__instancecheck__(instance)


@dataclass(frozen=True)
class Episodic(EpisodeMethod, abstract=True, metaclass=_AsOptionsSay):
    """Base of methods that treat every image as an episode: all start from the same state, and
    nothing of one is kept for the next.

    ``isinstance(method, Episodic)`` returns ``method.episodic``, so that it is also true of
    ``RAda`` with ``loss="views"``. Subclasses are methods of vision-language models.
    The engine runs an episode (``engine/episode.py``): ``forward`` once, then ``steps`` times
    ``objective``, its gradient and an update, then ``predict``. A subclass says ``strategy``, what
    is updated, and declares the options ``prompt`` and ``prompt_length`` itself, to control their
    positions:

    * ``"none"``: nothing. It needs ``predict`` alone.
    * ``"prompt"``: the words before the class name, by the method's optimiser. It needs
      ``objective``, a function of ``state["tuned"]``, the text features [B, C, E] (not normalised).
    * ``"pixels"``: what is added to each image. It needs ``start``, ``move`` and ``objective``, a
      function of ``state["tuned"]`` [B, 3, R, R].

    Args:
        prompt: what precedes the class name and a full stop, where classes are names; or a template
            such as ``"a photo of a {}, a type of pet."``, whose words after the name stay fixed.
        prompt_length: tuned tokens after SOT. None: the space-separated words of ``prompt`` before
            the name, as official code counts them (a hyphenated word is several tokens, the last of
            which then stay fixed).
    """

    _BY_OPTIONS: ClassVar[bool] = True
    #: what the updates of an episode change: "prompt", "pixels" or "none"
    strategy: ClassVar[str] = "none"
    RESOURCES: ClassVar[tuple[str, ...]] = ("tokenizer",)
    families: ClassVar[tuple[str, ...]] = ("vision-language",)
    frozen_encoder: ClassVar[bool] = True
    group: ClassVar[str | None] = None

    score_at: str = field(default="after", kw_only=True)

    if TYPE_CHECKING:  # fields that every subclass declares

        @property
        def prompt(self) -> str:
            """The words that the prompt begins with, or a template."""

        @property
        def prompt_length(self) -> int | None:
            """Tuned tokens after SOT, if classes are token ids; None: those of ``prompt``."""

    def __init_subclass__(cls, abstract: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(abstract=abstract, **kwargs)
        check_episodes(cls, Episodic)

    def __post_init__(self) -> None:
        super().__post_init__()
        words = prompt_words(self.prompt)
        if self.prompt_length is not None:
            check_option("prompt_length", self.prompt_length, AtLeast(1), int)
        elif self.group and not words:
            raise ValueError(
                f"prompt={self.prompt!r}: {self.name!r} tunes the words before the class name, and "
                'there are none; needed a template such as "a photo of a {}."'
            )

    @property
    def tuned_length(self) -> int:
        """Number of tokens after SOT that the method tunes, or would tune."""
        if self.prompt_length is not None:
            return self.prompt_length
        return prompt_words(self.prompt)

    @property
    def view_count(self) -> int:
        """Views made of an image, the anchor included."""
        return 1

    @property
    def base_view(self) -> str:
        """How views are cut, ``"crop"`` or ``"flip"``, as ``fasttta.data.make_views`` takes it."""
        return "crop"

    @property
    def augmented(self) -> bool:
        """Whether views are made with AugMix."""
        return False

    @property
    def differentiated_blocks(self) -> int | None:
        """How many of the image tower's last blocks gradients run through, None: all of them. The
        others may multiply in float8, which has no gradients."""
        return None if self.strategy == "pixels" else 0

    def tuned(self, model: Any) -> dict:
        """Empty: an episode tunes prompts or pixels, which the engine holds."""
        return {}

    def fitted(self, model: Any) -> Self:
        """The method; raises ValueError for a model that is no vision-language model."""
        if not isinstance(model, VisionLanguageModel):
            raise ValueError(
                f"{self.name!r} adapts vision-language models such as fasttta.models.CLIP, found "
                f"{type(model).__name__}"
            )
        return self

    def forward(self, model: VisionLanguageModel, images: Images) -> Seen:
        """Computes once what updates and prediction need, without gradient; by default the
        features and logits of all views."""
        features = model.encode_image(images.joined("augmix"))
        return self.seen(model, images, features)

    def seen(self, model: VisionLanguageModel, images: Images, features: Tensor) -> Seen:
        """The results of a forward pass from the views' features [B * N, E], not normalised."""
        features = unit(features).unflatten(0, (len(images.views), -1))
        logits = model.logit_scale.exp() * features @ images.text.transpose(1, 2)
        return Seen(features, logits, parts={"text": images.text})

    def objective(
        self,
        model: Any,
        features: Any,
        *,
        state: Mapping[str, Tensor],
        constants: Mapping[str, Tensor],
        valid: Tensor,
    ) -> Objective:
        """Losses [B] of B episodes.

        Args:
            features: what ``forward`` returned.
            state: ``"tuned"``, the tensor that is updated, and the state that the last call
                returned.
        """
        raise TypeError(f"{type(self).__name__} defines no objective")

    def noise(self, views: Sequence[Views], seed: int, given: Tensor | None) -> Tensor | None:
        """The random start [B or 1, 3, R, R] of a method that moves pixels, on the device of the
        views. Called before the episodes, which read nothing of the host and can be captured.

        Args:
            views: of each of B images.
            seed: of random numbers, the same for every image.
            given: what the caller wants in its place, or None.
        """
        return given

    def start(self, images: Images, seen: Seen) -> Tensor:
        """What is added to the images [B, 3, R, R] before the first update of pixels."""
        raise TypeError(f"{type(self).__name__} moves no pixels")

    def move(self, seen: Seen, added: Tensor, grad: Tensor) -> Tensor:
        """What is added to the images [B, 3, R, R] after an update of pixels.

        Args:
            grad: of the objective's total by ``added``.
        """
        raise TypeError(f"{type(self).__name__} moves no pixels")

    def predict(
        self, model: VisionLanguageModel, seen: Seen, state: Mapping[str, Tensor]
    ) -> Prediction:
        """The prediction after the updates, without gradient.

        Args:
            seen: what ``forward`` returned.
            state: as of ``objective``, after the last update; empty where nothing is updated.
        """
        raise TypeError(f"{type(self).__name__} defines no prediction")


def zero_shot(model: VisionLanguageModel, prompts: Any, anchors: Tensor) -> Tensor:
    """Logits [B, C] of anchors [B, 3, R, R] with the initial prompt."""
    text = unit(prompts.linearise().features[0])
    return model.logit_scale.exp() * unit(model.encode_image(anchors)) @ text.T
