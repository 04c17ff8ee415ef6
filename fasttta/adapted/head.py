"""CLIP with RAda's head over its features: images in, adapted logits out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.precision import Precision
from ..engine.snapshot import Snapshot
from ..engine.step import StepResult
from ..engine.turn import exclusive
from ..families import FusionFamily
from ..families.clip import ClipFamily
from ..methods import RAda
from ..models import RationalCLIP
from ..views import Views
from .episodes import given_views, made_views
from .fusion import Adapted
from .images import items_of, stream_of


class AdaptedHead(Adapted):
    """CLIP with RAda. Made by ``fasttta.adapt(clip, "rada", classes=names)``.

    ``loss="views"``: every image is an episode of its own, whose views are made here (seeded);
    ``loss="entropy"``: a call's images are one batch of a stream. ``tuned`` are the head's tensors,
    ``unwrap(merge=True)`` is a ``fasttta.models.RationalCLIP``.
    """

    def __init__(
        self,
        model: nn.Module,
        known: ClipFamily | FusionFamily,
        method: RAda,
        precision: Precision,
        *,
        engine: str,
        seed: int,
        classes: Any,
        resources: Mapping[str, Any],
        **options: Any,
    ) -> None:
        if engine == "graph":
            raise ValueError(
                'engine="graph": images of vision-language models are not captured in this '
                'version; use engine="eager"'
            )
        ids = None
        if isinstance(known, ClipFamily):
            known = known.with_classes(classes, method.prompt, precision, resources)
            ids = known.ids
        super().__init__(
            model, known, method, precision, engine=engine, seed=seed, constants={}, **options
        )
        self._ids = ids

    # ------------------------------------------------------------------ calls

    def forward(self, images: Any = None, *, views: Views | None = None) -> Tensor:
        """Logits [B, C] of ``step``."""
        return self.step(images, views=views).logits

    @exclusive
    def step(
        self, images: Any = None, *, views: Views | None = None, trace: bool = False
    ) -> StepResult:
        """Adapts on images and predicts them.

        Args:
            images: one image [3, H, W] in [0, 1] (or PIL), a batch [B, 3, H, W], or a list of
                images of any size.
            views: in place of images, with ``loss="views"``: the views of one image.
            trace: also return gradients.

        Returns:
            ``.logits`` [B, C] (B = 1 for a single image or views). Of episodes ``.losses`` are
            means over the images, ``.stats`` and ``.grads`` have a leading B for a batch or list.

        Raises:
            ValueError, TypeError: what was given cannot be used; the state is as before.
        """
        single, items = items_of(images, views)
        batches = (self._prepare((pixels,)) for pixels in self._batches(items))
        if self._in_source:
            parts = [self._unadapted(inputs, trace) for inputs in batches]
        else:
            parts = self._adapt_all(batches, trace=trace)
        if len(parts) == 1 and (single or not self.options.episodic or self._in_source):
            return parts[0]
        with torch.inference_mode(False), torch.no_grad():
            return _joined(parts)

    def predict(self, images: Any = None, *, views: Views | None = None) -> Tensor:
        """Logits [B, C] of the images as they are, with the current head; adapts nothing."""
        _, items = items_of(images, views)
        return Adapted.predict(self, self._anchors(items))

    def stream(
        self, loader: Iterable, encode_batch: int | None = None, cache: None = None
    ) -> Iterator[StepResult]:
        """Steps on every item of a loader (what ``step`` takes as images, or ``Views``), in order.
        ``encode_batch`` has no effect: what a step needs is encoded together as it is.

        Raises:
            ValueError: a cache is given.
        """
        return stream_of(self, loader, cache)

    # ------------------------------------------------------------------ images

    def _batches(self, items: Sequence[Any]) -> Iterator[Tensor]:
        """Pixels [N, 3, R, R] that are stepped on together."""
        method = self.options
        assert isinstance(method, RAda)
        if self._in_source:
            yield self._anchors(items)
        elif method.episodic:
            for i, item in enumerate(items):
                yield self._views(item, i, method).augmix
        elif isinstance(items[0], Views):
            raise TypeError('views= are for loss="views"; give images to adapt on a stream')
        else:
            yield self._anchors(items)

    def _anchors(self, items: Sequence[Any]) -> Tensor:
        return torch.cat([self._views(item, i, None).base[:1] for i, item in enumerate(items)])

    def _views(self, item: Any, index: int, method: RAda | None) -> Views:
        working = self._hidden[1]
        assert isinstance(working, RationalCLIP)  # what RAda makes of a CLIP
        size, device, dtype = working.model.resolution, working.text.device, self._step.precision
        if isinstance(item, Views):
            return given_views(item, size, device, dtype.master)
        return made_views(item, index, method, size, device, dtype.master, self.seed)

    # ------------------------------------------------------------------ files

    def _saved(self) -> dict[str, Tensor]:
        own = {} if self._ids is None else {"classes": self._ids.clone()}
        return super()._saved() | own

    def _state_of(
        self, record: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> Snapshot | Tensor:
        classes = tensors.get("classes")
        if (classes is None) != (self._ids is None):
            raise ValueError("classes: the state was saved for another model")
        own = self._ids
        if classes is not None and own is not None and not torch.equal(classes, own):
            raise ValueError("classes: the state was saved for other classes")
        return super()._state_of(record, {n: x for n, x in tensors.items() if n != "classes"})


def _joined(parts: list[StepResult]) -> StepResult:
    """Episodes as one result: logits one below the other, the rest with a leading B."""

    def stacked(name: str) -> dict[str, Tensor]:
        found = [getattr(part, name) for part in parts]
        return {key: torch.stack([each[key] for each in found]) for key in found[0]}

    traced = parts[0].grads is not None

    return StepResult(
        logits=torch.cat([part.logits for part in parts]),
        logits_before=torch.cat([part.logits_before for part in parts]),
        n_used=torch.stack([part.n_used for part in parts]).sum(),
        losses={name: x.mean() for name, x in stacked("losses").items()},
        stats=stacked("stats"),
        grads=stacked("grads") if traced else None,
        trace=stacked("trace") if traced else None,
    )
