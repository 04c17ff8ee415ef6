"""CLIP with RAda's head over its features: images in, adapted logits out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.episode import as_episodes, as_result
from ..engine.precision import Precision
from ..engine.result import StepResult
from ..engine.state import Snapshot
from ..families import FusionFamily
from ..families.clip import ClipFamily
from ..methods import RAda
from ..models import RationalCLIP
from ..views import Views
from .base import exclusive
from .fusion import AdaptedFusion
from .images import ImageCalls, as_views, items_of
from .warmup import Images, Rehearsal


class AdaptedHead(ImageCalls, AdaptedFusion):
    """CLIP with RAda. Made by ``fasttta.adapt(clip, "rada", classes=names)``.

    ``loss="views"``: every image is a separate episode, whose views are made here (seeded);
    ``loss="entropy"``: a call's images are one batch of a stream. ``tuned`` are the head's tensors,
    ``unwrap(merge=True)`` is a ``fasttta.models.RationalCLIP``.
    """

    def __init__(
        self,
        model: nn.Module,
        family: ClipFamily | FusionFamily,
        method: RAda,
        precision: Precision,
        *,
        engine: str,
        seed: int,
        classes: Any,
        resources: Mapping[str, Any],
        **options: Any,
    ) -> None:
        ids = None
        if isinstance(family, ClipFamily):
            family = family.with_classes(classes, method.prompt, precision, resources)
            ids = family.ids
        AdaptedFusion.__init__(
            self, model, family, method, precision,
            engine=engine, seed=seed, constants={}, **options,
        )  # fmt: skip
        self._ids = ids

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
            ValueError, TypeError: an argument cannot be used; the state is as before.
        """
        single, items = items_of(images, views)
        batches = (self._prepare((pixels,)) for pixels in self._batches(items))
        if self._in_source:
            parts = [self._unadapted(inputs, trace) for inputs in batches]
        else:
            parts = self._adapt_all(batches, trace=trace)
        if len(parts) == 1 and (single or not self._state.episodic or self._in_source):
            return parts[0]
        with torch.inference_mode(False), torch.no_grad():
            return as_result([as_episodes(part) for part in parts], False, trace)

    @exclusive
    def predict(self, images: Any = None, *, views: Views | None = None) -> Tensor:
        """Logits [B, C] of the images as they are, with the current head; adapts nothing."""
        _, items = items_of(images, views)
        self._ready()
        return self._step.predict(self._prepare((self._anchors(items),)))

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

    def _rehearsal(
        self, inputs: tuple[Any, ...], encode_batch: int | None, options: dict[str, Any]
    ) -> Rehearsal:
        # episodes are computed one at a time, a stream's images as the batches that they come in
        most = 0 if self._state.episodic else len(inputs[0]) if inputs else 0
        return Images(inputs, options, most)

    def _anchors(self, items: Sequence[Any]) -> Tensor:
        return torch.cat([self._views(item, i, None).base[:1] for i, item in enumerate(items)])

    def _views(self, item: Any, index: int, method: RAda | None) -> Views:
        working = self._hidden[1]
        assert isinstance(working, RationalCLIP)  # what RAda makes of a CLIP
        size, device = working.model.resolution, working.text.device
        return as_views(item, index, method, size, device, self._numbers.master, self.seed)

    def _saved(self) -> dict[str, Tensor]:
        classes = {} if self._ids is None else {"classes": self._ids.clone()}
        return super()._saved() | classes

    def _state_of(self, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Snapshot:
        saved, ours = tensors.get("classes"), self._ids
        if (saved is None) != (ours is None):
            raise ValueError("classes: the state was saved for another model")
        if saved is not None and ours is not None and not torch.equal(saved, ours):
            raise ValueError("classes: the state was saved for other classes")
        return super()._state_of(record, {n: x for n, x in tensors.items() if n != "classes"})
