"""A vision-language model whose every image is an episode of its own."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..engine import delta
from ..engine.model_watch import ModelWatch, said_of
from ..engine.precision import Precision, environment
from ..engine.state import checked_value, working_copy
from ..engine.step import StepResult
from ..engine.streaming import Reader, Stream
from ..engine.turn import exclusive, surely
from ..families.class_names import token_ids
from ..families.clip import ClipFamily
from ..methods.base import Method
from ..methods.episodic import Episode, Episodic, zero_shot
from ..models import CLIP
from ..ops.checks import dense
from ..views import Views
from .base import Stateful
from .episodes import as_list, given_views, made_views, result
from .fusion import Adapted

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
        known: ClipFamily,
        method: Method,
        precision: Precision,
        *,
        engine: str,
        seed: int,
        classes: Any,
        resources: Mapping[str, Any],
        verify_model: str = "first",
    ) -> None:
        Stateful.__init__(self)
        if engine == "graph":
            raise ValueError(
                'engine="graph": episodes of vision-language models are not captured in this '
                'version; use engine="eager"'
            )
        self.method, self.precision = method.name, precision.name
        self.options, self.engine, self.seed = method, engine, seed
        with torch.inference_mode(False), torch.no_grad():
            working, _ = working_copy(known.model, set(), precision)
            if isinstance(method, Episodic):
                method.fitted(working)
            ids = token_ids(
                classes, getattr(method, "prompt", "a photo of a"), known.model.context_length,
                resources.get("tokenizer"),
            )  # fmt: skip
            if len(ids) < 2 and method.group is not None:
                raise ValueError(
                    f"{method.name!r} learns from the distribution over classes, and of one class "
                    "it is 1 whatever the image: needed at least 2 classes"
                )
            length = method.tuned_length if isinstance(method, Episodic) else 0
            prompts = working.prompts(ids, length if method.group else 0)
        self._hidden = (model, working, None)
        self._recognised, self._numbers = known, precision
        self._ids, self._prompts = ids, prompts
        with torch.inference_mode(False):
            self._source_prompt = prompts.initial.clone()
        # the state: what every episode starts from, replaced, never written to
        self._start: Tensor = self._source_prompt
        self._at: Tensor | None = None  # what the prompts were set to
        self._device = working.positional_embedding.device
        self._in_source, self._verified = False, known.module is None
        self._watch = ModelWatch(model, verify_model)
        self._changed: str | None = None
        self._guard = None

    @property
    def _clip(self) -> CLIP:
        """As episodes run it; no child, as ``.to()`` must not reach it."""
        return cast(CLIP, self._hidden[1])

    # ------------------------------------------------------------------ calls

    def forward(self, images: Any = None, *, views: Views | None = None) -> Tensor:
        """Logits [B, C] of ``step``."""
        return self.step(images, views=views).logits

    @exclusive
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
        self._ready()
        parts = []
        method = None if self._in_source else self.options
        method = method if isinstance(method, Episodic) else None
        for rows, given in self._groups(items, method):
            with environment(self._device, self._numbers, grad=False):
                if method is None:
                    parts.append(self._plain(given))
                    continue
                part = method.run(
                    self._clip, self._prompts, given, trace=trace,
                    resources={"seed": self.seed, "noise": _rows_of(noise, rows)},
                )  # fmt: skip
                parts.append(part)
        with torch.inference_mode(False), torch.no_grad():
            return result(parts, single, trace)

    @exclusive
    def predict(self, images: Any = None, *, views: Views | None = None) -> Tensor:
        """Zero-shot logits [B, C] of the anchors with the prompt that episodes start from."""
        self._ready()
        _, items = items_of(images, views)
        logits = []
        for _, given in self._groups(items, None):
            with environment(self._device, self._numbers, grad=False):
                logits.append(self._plain(given).logits)
        return torch.cat(logits)

    def _ready(self) -> None:
        """Sets the prompts to the state, where they are not there; is the model what it was?"""
        if (changed := self._watch.check()) is not None:
            self._recognised.compare_again()
            self._verified, self._changed = False, changed
        wanted = self._source_prompt if self._in_source else self._start
        if self._at is not wanted:
            self._at = None
            with torch.inference_mode(False), torch.no_grad():
                self._prompts.start_at(wanted)
            self._at = wanted

    def _plain(self, given: list[Views]) -> Episode:
        anchors = torch.cat([views.base[:1] for views in given])
        logits = zero_shot(self._clip, self._prompts, anchors)
        return Episode(logits, logits.clone(), torch.zeros_like(logits[:, 0], dtype=torch.bool))

    def _groups(
        self, items: Sequence[Any], method: Method | None
    ) -> Iterator[tuple[slice, list[Views]]]:
        """Images that are computed together, with the views that a method asks for (None: the
        anchor); those of later groups are made when it is their turn."""
        size, dtype = self._clip.resolution, self._numbers.master
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
            with environment(self._device, self._numbers, grad=False), said_of(self._changed):
                self._recognised.verify((pixels, self._ids))
            if self._changed is not None:
                self._watch.accept()
            self._verified, self._changed = True, None

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
        with torch.inference_mode(False):
            return {"prompt": self._start.clone()} if self.options.group else {}

    @exclusive
    def load_tuned(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets the prompt that every episode starts from, ``{"prompt": [n, D]}``.

        Raises:
            ValueError, TypeError: an unknown name, wrong shape or type, non-finite values.
        """
        known = self.tuned
        for name in tensors:
            if name not in known:
                raise ValueError(
                    f"{name!r} is not tuned; tuned: {', '.join(known) or 'nothing by this method'}"
                )
        with torch.inference_mode(False), torch.no_grad():
            for name, value in tensors.items():
                self._publish(checked_value(name, value, known[name]).clone())

    @exclusive
    def reset(self) -> None:
        """The state of a fresh ``adapt``, bit for bit: episodes leave nothing, a prompt that
        ``load_tuned`` set does."""
        self._publish(self._source_prompt)

    @contextlib.contextmanager
    def source(self) -> Iterator[AdaptedCLIP]:
        """The untouched model inside the block: calls predict zero-shot and adapt nothing. Calls
        of other threads wait until the block ends."""
        with self._turn():
            if self._in_source:
                yield self
                return
            with surely(self._leave_source):
                self._in_source = True
                yield self

    def _leave_source(self) -> None:
        self._in_source = False

    def _state_now(self) -> Tensor:
        return self._start

    def _publish(self, state: Any) -> None:
        self._start = state
        self._ready()

    def _saved(self) -> dict[str, Tensor]:
        tensors = {"classes": self._ids, "prompt": self._start}
        return {n: x.detach().to("cpu", copy=True).contiguous() for n, x in tensors.items()}

    def _base(self) -> dict[str, Any]:
        return delta.fingerprint(self._recognised.model, _NothingTuned())

    def _state_of(self, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
        delta.check_fingerprint(record["base"], self._recognised.model, _NothingTuned())
        if odd := sorted({"classes", "prompt"} ^ tensors.keys()):
            raise ValueError(f"the saved state is of another model or method: {', '.join(odd[:3])}")
        if not torch.equal(tensors["classes"], self._ids):
            raise ValueError("classes: the state was saved for other classes")
        if tensors["prompt"].dtype != self._start.dtype:
            raise ValueError(f"prompt is {tensors['prompt'].dtype}, needed {self._start.dtype}")
        with torch.inference_mode(False), torch.no_grad():
            return checked_value("prompt", tensors["prompt"], self._start).clone()

    @exclusive
    def unwrap(self, merge: bool = False) -> nn.Module:
        """The user's own module; or (merge) a ``fasttta.models.CLIP`` with its weights that
        predicts these classes with the prompt that episodes start from: no episode leaves
        anything to merge."""
        if not merge:
            return self._hidden[0]
        with torch.inference_mode(False), torch.no_grad():
            self._ready()
            merged = copy.deepcopy(self._recognised.model)
            text = self._prompts.linearise().features[0]
            merged.class_features = text / text.norm(dim=-1, keepdim=True)
        return merged

    # ------------------------------------------------------------------ nn.Module

    @exclusive
    def __deepcopy__(self, memo: dict[int, Any]) -> AdaptedCLIP:
        # activations kept for the initial prompt cannot be copied, and need not be
        self._at = None
        self._prompts.start_at(self._start)
        return super().__deepcopy__(memo)

    def extra_repr(self) -> str:
        return f"{self.options}, precision={self.precision!r}, {self._prompts.count} classes"


def stream_of(adapted: Adapted, loader: Iterable, cache: None) -> Iterator[StepResult]:
    """Steps of a model that takes images on every item of a loader."""
    if cache is not None:
        raise ValueError("cache: views are made anew of every image, so no features are kept")

    def steps() -> Generator[StepResult]:
        reader = Reader(loader)
        try:
            for item in reader:
                try:
                    if isinstance(item, Views):
                        result = adapted.step(views=item)
                    else:
                        lone = isinstance(item, (tuple, list)) and len(item) == 1
                        result = adapted.step(item[0] if lone else item)
                except Exception:
                    reader.refuse()
                    raise
                reader.stepped()
                yield result
        finally:
            reader.close()

    return Stream(steps(), loader)


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
    if isinstance(noise, Tensor):
        noise = dense("noise", noise)
    return noise if noise is None or len(noise) == 1 else noise[rows]


class _NothingTuned:
    """A state for fingerprints of the model alone."""

    source: dict[str, Tensor] = {}  # noqa: RUF012
