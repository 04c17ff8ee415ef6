"""A vision-language model that adapts to each image separately."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..engine import record as records
from ..engine.episode import Episodes, as_result, run_episodes
from ..engine.episode_graph import GraphEpisodes
from ..engine.precision import Precision, working_copy
from ..engine.result import StepResult
from ..engine.state import checked_value
from ..engine.step import environment
from ..engine.streaming import Pipeline
from ..families.class_names import token_ids
from ..families.clip import ClipFamily
from ..methods.base import Method
from ..methods.episodic import Episodic, zero_shot
from ..methods.source import Source
from ..models import CLIP
from ..ops.checks import dense
from ..views import Views, make_views
from .base import Adapted, exclusive
from .warmup import Images, Rehearsal

_VIEWS = 256  # views that are computed together; more images are computed in turn


class MakesViews(Protocol):
    """A method that says which views it wants of an image."""

    @property
    def view_count(self) -> int:
        """The views of an image, the original included."""

    @property
    def augmented(self) -> bool:
        """Whether views are made with AugMix."""

    @property
    def base_view(self) -> str:
        """How the base of a view is made: ``"crop"`` or ``"flip"``."""


class ImageCalls(Adapted):
    """What models of images share: calls and streams of images, or of views."""

    takes_images: ClassVar[bool] = True

    def forward(self, images: Any = None, *, views: Views | None = None) -> Tensor:
        """Logits [B, C] of ``step``."""
        return self.step(images, views=views).logits

    def _pipeline(self, encode_batch: int | None, cache: Any) -> Pipeline:
        if cache is not None:
            raise ValueError("cache: views are made anew of every image, so no features are kept")
        return Pipeline(lambda item, _: self._step_on_item(item))

    def _step_on_item(self, item: Any) -> StepResult:
        """A step on what a loader yields."""
        if isinstance(item, Views):
            return self.step(views=item)
        lone = isinstance(item, (tuple, list)) and len(item) == 1
        return self.step(item[0] if lone else item)


class AdaptedCLIP(ImageCalls):
    """CLIP with a method for single images. Made by ``fasttta.adapt``.

    Nothing is carried from image to image: prompt, optimiser and random numbers start afresh with
    each, so that neither the order nor the other images of a call change a result. ``tuned`` holds
    the prompt [n, D] from which every episode starts (nothing for methods without one); the prompt
    after an episode is in its ``.stats["prompt"]``.
    """

    _family: ClipFamily

    def __init__(
        self,
        model: nn.Module,
        family: ClipFamily,
        method: Method,
        precision: Precision,
        *,
        engine: str,
        seed: int,
        classes: Any,
        resources: Mapping[str, Any],
        verify_model: str = "first",
    ) -> None:
        episodic = method if isinstance(method, Episodic) else None
        with torch.inference_mode(False), torch.no_grad():
            differentiated = 0 if episodic is None else episodic.differentiated_blocks
            working, _ = working_copy(family.model, set(), precision, differentiated)
            if episodic is not None:
                episodic.fitted(working)
            prompt = method.prompt if isinstance(method, (Episodic, Source)) else "a photo of a"
            length, tokenizer = family.model.context_length, resources.get("tokenizer")
            ids = token_ids(classes, prompt, length, tokenizer)
            if len(ids) < 2 and method.group is not None:
                raise ValueError(
                    f"{method.name!r} learns from the distribution over classes, and of one class "
                    "it is 1 whatever the image: needed at least 2 classes"
                )
            tuned = episodic is not None and method.group is not None
            prompts = working.prompts(ids, episodic.tuned_length if episodic and tuned else 0)
        super().__init__(
            model, working, family, method, precision,
            engine=engine, seed=seed, verify_model=verify_model,
        )  # fmt: skip
        self._episodic = episodic
        self._ids, self._prompts = ids, prompts
        with torch.inference_mode(False):
            self._source_prompt = prompts.initial.clone()
        # the state: what every episode starts from, replaced, never written to
        self._start: Tensor = self._source_prompt
        self._at: Tensor | None = None  # what the prompts were set to
        self._device = working.positional_embedding.device

    @property
    def _clip(self) -> CLIP:
        """The CLIP that episodes run. Not registered as a child: ``.to()`` must not move it."""
        return cast(CLIP, self._hidden[1])

    @functools.cached_property
    def _captured(self) -> GraphEpisodes | None:
        """What replays the method's episodes; made when the first image comes. None: they run
        eagerly."""
        if self.engine != "graph" or self._episodic is None:
            return None
        parts = self._episodic, self._clip, self._prompts
        return GraphEpisodes(*parts, falls_back=self._asked == "auto")

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
            noise: for TTC, the perturbation to start from, [B or 1, 3, R, R].
            trace: also return gradients and the method's intermediates.

        Returns:
            ``.logits`` [B, C] (B = 1 for a single image or views), ``.losses`` means over the
            images, ``.stats`` (and ``grads``, ``trace``) with a leading B for a batch or a list.

        Raises:
            ValueError, TypeError: an argument cannot be used.
        """
        single, items = items_of(images, views)
        if noise is not None and self.method != "ttc":
            raise TypeError(f"noise= is for 'ttc', the method is {self.method!r}")
        method = None if self._in_source else self._episodic
        parts = []
        for rows, views_of_images in self._groups(items, method):
            with environment(self._device, self._numbers, grad=False):
                if method is None:
                    logits = self._zero_shot(views_of_images)
                    unused = torch.zeros_like(logits[:, 0], dtype=torch.bool)
                    parts.append(Episodes(logits, logits.clone(), unused))
                    continue
                start = method.noise(views_of_images, self.seed, _rows_of(noise, rows))
                if self._captured is not None and not trace:
                    parts.append(self._captured(views_of_images, seed=self.seed, noise=start))
                    continue
                parts.append(
                    run_episodes(
                        method, self._clip, self._prompts, views_of_images,
                        seed=self.seed, noise=start, trace=trace,
                    )
                )  # fmt: skip
        with torch.inference_mode(False), torch.no_grad():
            return as_result(parts, single, trace)

    @exclusive
    def predict(self, images: Any = None, *, views: Views | None = None) -> Tensor:
        """Zero-shot logits [B, C] of the anchors with the prompt that episodes start from."""
        _, items = items_of(images, views)
        logits = []
        for _, views_of_images in self._groups(items, None):
            with environment(self._device, self._numbers, grad=False):
                logits.append(self._zero_shot(views_of_images))
        return torch.cat(logits)

    def _zero_shot(self, views: Sequence[Views]) -> Tensor:
        anchors = torch.cat([each.base[:1] for each in views])
        return zero_shot(self._clip, self._prompts, anchors)

    def _groups(
        self, items: Sequence[Any], method: Episodic | None
    ) -> Iterator[tuple[slice, list[Views]]]:
        """Groups of images that are computed together, with the views that a method asks for (None:
        the anchor alone); a group's views are made when its turn comes."""
        self._ready()
        size, dtype = self._clip.resolution, self._numbers.master
        first = items[0]
        count = 1 if method is None else method.view_count
        count = len(first) if isinstance(first, Views) else count
        together = max(1, _VIEWS // count)
        for at in range(0, len(items), together):
            rows = slice(at, at + together)
            views = [
                as_views(item, at + i, method, size, self._device, dtype, self.seed)
                for i, item in enumerate(items[rows])
            ]
            if at == 0:
                self._compare(views[0].base[:1])
            yield rows, views

    def _rehearsal(
        self, inputs: tuple[Any, ...], encode_batch: int | None, options: dict[str, Any]
    ) -> Rehearsal:
        count = 1 if self._episodic is None else self._episodic.view_count
        return Images(inputs, options, max(1, _VIEWS // count))

    def _compare(self, pixels: Tensor) -> None:
        """Checks that the user's module has not changed and computes what fasttta assumes."""

        def compare() -> bool:
            with environment(self._device, self._numbers, grad=False):
                return self._family.verify((pixels, self._ids))

        self._verify(compare)

    def _ready(self) -> None:
        wanted = self._source_prompt if self._in_source else self._start
        if self._at is not wanted:
            self._at = None
            with torch.inference_mode(False), torch.no_grad():
                self._prompts.start_at(wanted)
            self._at = wanted

    @property
    def tuned(self) -> dict[str, Tensor]:
        """Copy of the prompt [n, D] that every episode starts from; nothing for methods without."""
        with torch.inference_mode(False):
            return {"prompt": self._start.clone()} if self.options.group else {}

    def _state_now(self) -> Tensor:
        return self._start

    def _first_state(self) -> Tensor:
        return self._source_prompt

    def _with_tuned(self, values: Mapping[str, Tensor]) -> Tensor:
        return values["prompt"].clone() if values else self._start

    def _publish(self, state: Tensor) -> None:
        self._start = state
        self._ready()

    def _saved(self) -> dict[str, Tensor]:
        tensors = {"classes": self._ids, "prompt": self._start}
        return {n: x.detach().to("cpu", copy=True).contiguous() for n, x in tensors.items()}

    def _base(self) -> dict[str, Any]:
        return records.fingerprint(self._family.model, {})

    def _state_of(self, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
        records.check_fingerprint(record["base"], self._family.model, {})
        if odd := sorted({"classes", "prompt"} ^ tensors.keys()):
            raise ValueError(f"the saved state is of another model or method: {', '.join(odd[:3])}")
        if not torch.equal(tensors["classes"], self._ids):
            raise ValueError("classes: the state was saved for other classes")
        if tensors["prompt"].dtype != self._start.dtype:
            raise ValueError(f"prompt is {tensors['prompt'].dtype}, needed {self._start.dtype}")
        with torch.inference_mode(False), torch.no_grad():
            return checked_value("prompt", tensors["prompt"], self._start).clone()

    def _merged(self) -> nn.Module:
        self._watch.check()
        with torch.inference_mode(False), torch.no_grad():
            self._ready()
            merged = copy.deepcopy(self._family.model)
            text = self._prompts.linearise().features[0]
            merged.class_features = text / text.norm(dim=-1, keepdim=True)
        return merged

    def __deepcopy__(self, memo: dict[int, Any]) -> AdaptedCLIP:
        # activations kept for the initial prompt cannot be copied, and need not be
        with self._lock():
            self._at = None
            self._prompts.start_at(self._start)
            return super().__deepcopy__(memo)

    def extra_repr(self) -> str:
        """The method's options, the precision and the count of classes, for ``print``."""
        return f"{self.options}, precision={self.precision!r}, {self._prompts.count} classes"


def _rows_of(noise: Tensor | None, rows: slice) -> Tensor | None:
    if isinstance(noise, Tensor):
        noise = dense("noise", noise)
    return noise if noise is None or len(noise) == 1 else noise[rows]


def as_list(images: Any) -> tuple[bool, Sequence[Any]]:
    """Whether the argument is one image, and its images as a sequence.

    Raises:
        ValueError: there are none.
        TypeError: a tensor that is not dense.
    """
    if isinstance(images, (list, tuple)):
        if not len(images):
            raise ValueError("images is an empty list; needed at least one image")
        return False, images
    if isinstance(images, Tensor):
        images = dense("images", images)
    if isinstance(images, (Tensor, np.ndarray)) and images.ndim == 4:
        if not len(images):
            raise ValueError(f"images is an empty batch {list(images.shape)}")
        return False, list(images)
    return True, [images]


def items_of(images: Any, views: Any) -> tuple[bool, Sequence[Any]]:
    """Whether the call is of a single image, and the images or views, one for each episode."""
    if (images is None) == (views is None):
        raise TypeError("needed images, or views= of one image; found both or neither")
    if views is None:
        return as_list(images)
    if not isinstance(views, Views):
        raise TypeError(f"views must be fasttta.data.Views, found {type(views).__name__}")
    return True, [views]


def as_views(
    item: Any,
    index: int,
    method: MakesViews | None,
    size: int,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
) -> Views:
    """The views of an image that a method asks for (None: the image alone), from this seed; or a
    user's views, fit for the model.

    Args:
        index: of the image in its call, for messages.
        size: of the model's images.

    Raises:
        ValueError, TypeError: it is no image, or on another device, or views do not fit.
    """
    if isinstance(item, Views):
        if item.resolution != size:
            raise ValueError(f"views are {item.resolution} pixels a side, the model takes {size}")
        if item.base.device != device:
            raise ValueError(f"views are on {item.base.device}, the model on {device}")
        return _cast(item, dtype)
    if isinstance(item, Tensor) and item.device != device:
        raise ValueError(f"image {index} is on {item.device}, the model on {device}")
    options: dict[str, Any] = {"augment": False}
    if method is not None:
        options = {"base_view": method.base_view, "augment": method.augmented}
    try:
        views = make_views(
            item,
            1 if method is None else method.view_count,
            generator=torch.Generator().manual_seed(seed),
            resolution=size,
            device=device,
            **options,
        )
    except (ValueError, TypeError) as error:
        raise type(error)(f"image {index}: {error}") from error
    assert isinstance(views, Views)  # of one image
    return _cast(views, dtype)


def _cast(views: Views, dtype: torch.dtype) -> Views:
    def owned(x: Tensor) -> Tensor:
        x = x.detach()
        return x.clone() if x.is_inference() else x

    with torch.inference_mode(False), torch.no_grad():
        alike = views.mix.data_ptr() == views.base.data_ptr()  # without augmentation
        base = owned(views.base).to(dtype)
        mix = base if alike else owned(views.mix).to(dtype)
        region = None if views.region is None else owned(views.region)
        return Views.trusted(base, mix, owned(views.weight), region)
