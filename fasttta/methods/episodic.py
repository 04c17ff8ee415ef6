"""Methods of vision-language models: every image is an episode of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from ..protocols import VisionLanguageModel
from ..views import Views
from .base import Method
from .class_check import check_episodes
from .options import AtLeast, check_option
from .prompt_text import prompt_words


@dataclass
class Episode:
    """What B episodes, computed together, leave behind.

    Attributes:
        logits, logits_before: [B, C]; before any update: zero-shot, of the anchor.
        losses: [B] each, of the first step.
        stats: [B, ...] each.
        used: [B] bool, whether something was learnt from the image.
        grads: [B, ...] each, of the first step, by tuned name.
        trace: [B, ...] each, intermediates.
    """

    logits: Tensor
    logits_before: Tensor
    used: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    stats: dict[str, Tensor] = field(default_factory=dict)
    grads: dict[str, Tensor] = field(default_factory=dict)
    trace: dict[str, Tensor] = field(default_factory=dict)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


@dataclass(frozen=True)
class Episodic(Method, abstract=True):
    """Options that every method of vision-language models has, ``prompt`` and ``prompt_length``
    besides those of ``Method``; subclasses place them.

    Args:
        prompt: what precedes the class name and a full stop, where classes are names; or a template
            such as ``"a photo of a {}, a type of pet."``, whose words behind the name stay fixed.
        prompt_length: tuned tokens after SOT. None: the space-separated words of ``prompt`` before
            the name, as official code counts them (a hyphenated word is several tokens, the last of
            which then stay fixed).
    """

    RESOURCES: ClassVar[tuple[str, ...]] = ("tokenizer",)
    families: ClassVar[tuple[str, ...]] = ("vision-language",)
    frozen_encoder: ClassVar[bool] = True
    group: ClassVar[str | None] = None

    score_at: str = field(default="after", kw_only=True)

    if TYPE_CHECKING:  # fields of every subclass, which places them

        @property
        def prompt(self) -> str: ...
        @property
        def prompt_length(self) -> int | None: ...

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
        """Tokens after SOT that are tuned (or could be)."""
        if self.prompt_length is not None:
            return self.prompt_length
        return prompt_words(self.prompt)

    @property
    def view_count(self) -> int:
        """Views made of an image, the anchor included."""
        return 1

    @property
    def augmented(self) -> bool:
        """Whether views are made with AugMix."""
        return False

    def tuned(self, model: Any) -> dict:
        return {}

    def fitted(self, model: Any) -> Self:
        if not isinstance(model, VisionLanguageModel):
            raise ValueError(
                f"{self.name!r} adapts vision-language models such as fasttta.models.CLIP, found "
                f"{type(model).__name__}"
            )
        return self

    def run(
        self,
        model: VisionLanguageModel,
        prompts: Any,
        views: Sequence[Views],
        *,
        trace: bool = False,
        resources: Mapping[str, Any] | None = None,
    ) -> Episode:
        """B episodes; each starts at ``prompts.initial``.

        Args:
            prompts: of ``model.prompts(ids, tuned_length)``.
            views: of each image, alike in number.
            resources: of this call: "seed" of random numbers, the same for every image; "noise".
        """
        raise TypeError(f"{type(self).__name__} defines no episode")


def zero_shot(model: VisionLanguageModel, prompts: Any, anchors: Tensor) -> Tensor:
    """Logits [B, C] of anchors [B, 3, R, R] with the initial prompt."""
    text = unit(prompts.linearise().features[0])
    return model.logit_scale.exp() * unit(model.encode_image(anchors)) @ text.T


def joined(views: Sequence[Views], name: str) -> Tensor:
    """A part of all images' views, [B * N, ...]."""
    return torch.cat([getattr(each, name) for each in views])
