"""A vision-language model whose every image is an episode of its own."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .adapted import Adapted
from .classes import token_ids
from .engine import delta
from .engine.precision import Precision, environment
from .engine.state import working_copy
from .engine.step import StepResult
from .episodes import as_list, given_views, made_views, result
from .families_clip import RecognisedCLIP
from .methods.base import Method
from .methods.episodic import Episode, Episodic, zero_shot
from .views import Views

_VIEWS = 256  # computed together, of several images; more are taken in turns


class AdaptedCLIP(Adapted):
    """CLIP with a method for single images. Made by ``fasttta.adapt``.

    Nothing is carried from image to image: prompt, optimiser and random numbers start afresh with
    each, so that neither order nor company changes a result. ``tuned`` holds the prompt that every
    episode starts from; what an episode made of it is in its ``.stats["prompt"]``.
    """

    def __init__(
        self,
        model: nn.Module,
        known: RecognisedCLIP,
        method: Method,
        precision: Precision,
        *,
        engine: str,
        seed: int,
        classes: Any,
        resources: Mapping[str, Any],
    ) -> None:
        nn.Module.__init__(self)
        if "vision-language" not in type(method).families:
            from . import methods

            raise ValueError(
                f"{method.name!r} adapts fusion models, found {known.family}; for it: "
                f"{', '.join(map(repr, methods.names('vision-language')))}"
            )
        if engine == "graph":
            raise ValueError(
                'engine="graph": episodes of vision-language models are not captured in this '
                'version; use engine="eager"'
            )
        self.method, self.precision = method.name, precision.name
        self.options, self.engine, self.seed = method, engine, seed
        with torch.inference_mode(False), torch.no_grad():
            working, _ = working_copy(known.clip, set(), precision)
            if isinstance(method, Episodic):
                method.check_model(working)
            ids = token_ids(
                classes, getattr(method, "prompt", "a photo of a"), known.clip.context_length,
                resources.get("tokenizer"),
            )  # fmt: skip
            length = method.tuned_length if isinstance(method, Episodic) else 0
            prompts = working.prompts(ids, length if method.group else 0)
        self._hidden, self._known, self._numbers = (model, working), known, precision
        self._ids, self._prompts = ids, prompts
        self._source_prompt = prompts.initial.clone()
        self._device = working.positional_embedding.device
        self._in_source, self._verified = False, known.module is None

    # ------------------------------------------------------------------ calls

    def forward(self, images: Any = None, *, views: Views | None = None) -> Tensor:
        """Logits [B, C] of ``step``."""
        return self.step(images, views=views).logits

    def step(
        self,
        images: Any = None,
        *,
        views: Views | None = None,
        noise: Tensor | None = None,
        trace: bool = False,
    ) -> StepResult:
        """An episode for every image.

        Args:
            images: one image [3, H, W] in [0, 1] (or PIL), a batch [B, 3, H, W], or a list of
                images of any size; their views are made here, from ``seed``.
            views: in place of images: the views of one image.
            noise: for TTC, where its perturbation starts, [B or 1, 3, R, R].
            trace: also return gradients and the method's intermediates.

        Returns:
            ``.logits`` [B, C] (B = 1 for a single image or views), ``.losses`` means over the
            images, ``.stats`` (and ``grads``, ``trace``) with a leading B for a batch or a list.

        Raises:
            ValueError, TypeError: what was given cannot be used.
        """
        single, items = items_of(images, views)
        if noise is not None and self.method != "ttc":
            raise TypeError(f"noise= is for 'ttc', the method is {self.method!r}")
        parts = []
        plain = self._in_source or not isinstance(self.options, Episodic)
        for rows, given in self._groups(items, None if plain else self.options):
            with environment(self._device, self._numbers, grad=False):
                if plain:
                    parts.append(self._plain(given))
                    continue
                part = self.options.run(
                    self._hidden[1], self._prompts, given, trace=trace,
                    resources={"seed": self.seed, "noise": _rows_of(noise, rows)},
                )  # fmt: skip
                parts.append(part)
        with torch.inference_mode(False), torch.no_grad():
            return result(parts, single, trace)

    def predict(self, images: Any = None, *, views: Views | None = None) -> Tensor:
        """Zero-shot logits [B, C] of the anchors with the prompt that episodes start from."""
        _, items = items_of(images, views)
        logits = []
        for _, given in self._groups(items, None):
            with environment(self._device, self._numbers, grad=False):
                logits.append(self._plain(given).logits)
        return torch.cat(logits)

    def _plain(self, given: list[Views]) -> Episode:
        anchors = torch.cat([views.base[:1] for views in given])
        logits = zero_shot(self._hidden[1], self._prompts, anchors)
        return Episode(logits, logits.clone(), torch.zeros_like(logits[:, 0], dtype=torch.bool))

    def _groups(
        self, items: Sequence[Any], method: Method | None
    ) -> Iterator[tuple[slice, list[Views]]]:
        """Images that are computed together, with the views that a method asks for (None: the
        anchor); those of later groups are made when it is their turn."""
        size, dtype = self._hidden[1].resolution, self._numbers.master
        count = len(items[0]) if isinstance(items[0], Views) else getattr(method, "view_count", 1)
        together = max(1, _VIEWS // count)
        for at in range(0, len(items), together):
            rows = slice(at, at + together)
            given = [
                given_views(item, size, self._device, dtype)
                if isinstance(item, Views)
                else made_views(item, at + i, method, size, self._device, dtype, self.seed)
                for i, item in enumerate(items[rows])
            ]
            self._verify(given[0].base[:1])
            yield rows, given

    def _verify(self, pixels: Tensor) -> None:
        """On the first image: was the user's module understood?"""
        if not self._verified:
            with environment(self._device, self._numbers, grad=False):
                self._known.verify(pixels, self._ids)
            self._verified = True

    def stream(
        self, loader: Iterable, encode_batch: int | None = None, cache: None = None
    ) -> Iterator[StepResult]:
        """Steps on every item of a loader (what ``step`` takes as images, or ``Views``), in order.
        ``encode_batch`` has no effect: an episode's views are encoded together as it is.

        Raises:
            ValueError: a cache is given.
        """
        return stream_of(self, loader, cache)

    # ------------------------------------------------------------------ state

    @property
    def tuned(self) -> dict[str, Tensor]:
        """Copy of the prompt [n, D] that every episode starts from; nothing for methods without."""
        return {"prompt": self._prompts.initial.clone()} if self.options.group else {}

    def load_tuned(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets the prompt that every episode starts from, ``{"prompt": [n, D]}``.

        Raises:
            ValueError, TypeError: an unknown name, wrong shape or type, non-finite values.
        """
        known = self.tuned
        for name, value in tensors.items():
            if name not in known:
                raise ValueError(
                    f"{name!r} is not tuned; tuned: {', '.join(known) or 'nothing by this method'}"
                )
            if not isinstance(value, Tensor) or not value.is_floating_point():
                found = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"{name} must be a floating point tensor, found {found}")
            if value.shape != known[name].shape:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}, needed {tuple(known[name].shape)}"
                )
            if not torch.isfinite(value).all():
                raise ValueError(f"{name} holds non-finite values")
        for value in tensors.values():
            with torch.inference_mode(False), torch.no_grad():
                self._prompts.start_at(value)

    def reset(self) -> None:
        """The state of a fresh ``adapt``, bit for bit: episodes leave nothing, a prompt that
        ``load_tuned`` set does."""
        self._prompts.start_at(self._source_prompt)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes what ``fasttta.load(model, folder)`` needs: options, class tokens, prompt."""
        record = {
            "method": self.method,
            "options": {n: getattr(self.options, n) for n in self.options.option_names()},
            "precision": self.precision,
            "seed": self.seed,
            "base": self._fingerprint(),
        }
        tensors = {"classes": self._ids, "prompt": self._prompts.initial}
        delta.write(folder, record, {n: x.detach().cpu().contiguous() for n, x in tensors.items()})

    def _fingerprint(self) -> dict[str, Any]:
        return delta.fingerprint(self._known.clip, _NothingTuned())

    def take(self, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """The state that ``save`` wrote.

        Raises:
            ValueError: it is another model's.
        """
        delta.check_fingerprint(record["base"], self._known.clip, _NothingTuned())
        self._prompts.start_at(tensors["prompt"].to(self._device))

    @contextlib.contextmanager
    def source(self) -> Iterator[AdaptedCLIP]:
        """The untouched model inside the block: calls predict zero-shot and adapt nothing."""
        if self._in_source:
            yield self
            return
        kept = self._prompts.initial
        try:
            self._prompts.start_at(self._source_prompt)
            self._in_source = True
            yield self
        finally:
            self._in_source = False
            self._prompts.start_at(kept)

    def unwrap(self, merge: bool = False) -> nn.Module:
        """The user's own module; or (merge) a ``fasttta.models.CLIP`` with its weights that
        predicts these classes with the prompt that episodes start from: no episode leaves
        anything to merge."""
        if not merge:
            return self._hidden[0]
        with torch.inference_mode(False), torch.no_grad():
            merged = copy.deepcopy(self._known.clip)
            text = self._prompts.linearise().features[0]
            merged.class_features = text / text.norm(dim=-1, keepdim=True)
        return merged

    # ------------------------------------------------------------------ nn.Module

    def __deepcopy__(self, memo: dict) -> AdaptedCLIP:
        # activations kept for the initial prompt cannot be copied, and need not be
        self._prompts.start_at(self._prompts.initial)
        return super().__deepcopy__(memo)

    def extra_repr(self) -> str:
        return f"{self.options}, precision={self.precision!r}, {self._prompts.count} classes"


def stream_of(adapted: Adapted, loader: Iterable, cache: None) -> Iterator[StepResult]:
    """Steps of a model that takes images on every item of a loader."""
    if cache is not None:
        raise ValueError("cache: views are made anew of every image, so no features are kept")

    def steps() -> Iterator[StepResult]:
        for item in loader:
            if isinstance(item, Views):
                yield adapted.step(views=item)
            else:
                lone = isinstance(item, (tuple, list)) and len(item) == 1
                yield adapted.step(item[0] if lone else item)

    return steps()


def items_of(images: Any, views: Any) -> tuple[bool, Sequence[Any]]:
    """Whether it is a single image, and images or views, one an episode."""
    if (images is None) == (views is None):
        raise TypeError("needed images, or views= of one image; found both or neither")
    if views is None:
        return as_list(images)
    if not isinstance(views, Views):
        raise TypeError(f"views must be fasttta.data.Views, found {type(views).__name__}")
    return True, [views]


def _rows_of(noise: Tensor | None, rows: slice) -> Tensor | None:
    return noise if noise is None or len(noise) == 1 else noise[rows]


class _NothingTuned:
    """A state for fingerprints of the model alone."""

    source: dict[str, Tensor] = {}  # noqa: RUF012
