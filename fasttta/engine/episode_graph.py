"""Episodes on images captured as a CUDA graph: one replay for a group of images."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..methods.episodic import Episodic
from ..protocols import Linearised, VisionLanguageModel
from ..views import Views
from .capture import Capture, CaptureError
from .episode import Episodes, run_episodes
from .result import warn


@dataclass
class EpisodePlan:
    """Captured episodes of a group of images: buffers that they read and results they write.

    Attributes:
        views: of each image. ``mix`` is ``base`` itself where views are not augmented.
        noise: [B, 3, R, R], the start of a method that moves pixels; None for others.
        result: static, of all images.
        graph: None where episodes run without capture (in tests, which have no GPU).
    """

    views: list[Views]
    noise: Tensor | None
    result: Episodes | None = None
    graph: torch.cuda.CUDAGraph | None = None

    @classmethod
    def of(cls, views: Sequence[Views], noise: Tensor | None) -> EpisodePlan:
        """Empty buffers for as many images, of the same kind."""
        alike = _without_augmentation(views)
        buffers = []
        for each in views:
            base, region = torch.empty_like(each.base), each.region
            mix = base if alike else torch.empty_like(each.mix)
            region = None if region is None else torch.empty_like(region)
            buffers.append(Views.trusted(base, mix, torch.empty_like(each.weight), region))
        started = None if noise is None else noise.new_empty((len(views), *noise.shape[1:]))
        return cls(buffers, started)

    def fill(self, views: Sequence[Views], noise: Tensor | None) -> None:
        """Writes images to the first places of the buffers; the others repeat the first image."""
        for i, buffer in enumerate(self.views):
            each = views[i if i < len(views) else 0]
            buffer.base.copy_(each.base)
            if buffer.mix is not buffer.base:
                buffer.mix.copy_(each.mix)
            buffer.weight.copy_(each.weight)
            if buffer.region is not None and each.region is not None:
                buffer.region.copy_(each.region)
        if self.noise is not None and noise is not None:
            rows = noise.expand(len(views), *noise.shape[1:])
            self.noise[: len(views)].copy_(rows)
            self.noise[len(views) :].copy_(rows[:1].expand_as(self.noise[len(views) :]))

    def taken(self, size: int) -> Episodes:
        """Fresh copies of the results of the first images."""
        result = self.result
        assert result is not None  # episodes have run

        def rows(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: x[:size].clone() for name, x in tensors.items()}

        return Episodes(
            result.logits[:size].clone(), result.logits_before[:size].clone(),
            result.used[:size].clone(), rows(result.losses), rows(result.stats),
        )  # fmt: skip


class GraphEpisodes:
    """Runs a method's episodes on images, from ``prompts.initial``, as one graph replay a group.

    A group of fewer images than a captured one may leave places empty; a much smaller one (less
    than half), a larger one, or one of other views causes a new capture.

    The text features at the start, and the activations that their derivative needs, are a graph of
    their own. It is replayed where the start or the weights have changed: episodes read its
    results, and need not be captured again.

    Args:
        prompts: of ``model.prompts(ids, method.tuned_length)``.
        capture: off: the same episodes on the same static buffers without a graph.
        falls_back: episodes that cannot be captured give a warning, not an error; they and all
            later ones run eagerly.
    """

    def __init__(
        self,
        method: Episodic,
        model: VisionLanguageModel,
        prompts: Any,
        capture: bool = True,
        falls_back: bool = False,
    ) -> None:
        self.method, self.model, self.prompts, self.capture = method, model, prompts, capture
        self.falls_back, self.given_up = falls_back, False
        self.plans: dict[tuple, dict[int, EpisodePlan]] = {}
        self._prompt: Tensor = prompts.initial[None].clone()  # [1, n, D], what the start is of
        self._start: Linearised | None = None
        self._start_graph: torch.cuda.CUDAGraph | None = None
        self._held: tuple[Tensor, list[int]] | None = None  # what the start was computed from
        self._recorder = Capture(self._prompt.device) if capture else None

    def __deepcopy__(self, memo: dict) -> GraphEpisodes:
        # a graph uses the buffers that it was captured with
        model, prompts = (copy.deepcopy(x, memo) for x in (self.model, self.prompts))
        twin = GraphEpisodes(self.method, model, prompts, self.capture, self.falls_back)
        twin.given_up = self.given_up
        return twin

    def __call__(
        self, views: Sequence[Views], *, seed: int = 0, noise: Tensor | None = None
    ) -> Episodes:
        """Episodes of B images. Arguments as of ``run_episodes``; the results are copies."""
        try:
            plan = None if self.given_up else self._ready(views, seed, noise)
        except CaptureError as error:
            if not self.falls_back:
                raise
            self._give_up(error)
            plan = None
        if plan is None:
            return run_episodes(
                self.method, self.model, self.prompts, views, seed=seed, noise=noise
            )
        plan.fill(views, noise)
        if plan.graph is None:
            plan.result = self._body(plan, seed)
        else:
            plan.graph.replay()
        return plan.taken(len(views))

    def _ready(self, views: Sequence[Views], seed: int, noise: Tensor | None) -> EpisodePlan:
        """The plan for a group, and its start computed."""
        self._begin()
        return self._plan(views, seed, noise)

    def _give_up(self, error: CaptureError) -> None:
        """Runs eagerly from now on, with the memory of earlier captures given back."""
        self.given_up, self._start, self._start_graph = True, None, None
        self.plans.clear()
        warn(
            f"episodes run eagerly, because capturing them as a CUDA graph failed: "
            f'{error.__cause__} (engine="eager" says the same without a warning, engine="graph" '
            "makes it an error)",
            RuntimeWarning,
        )

    def _body(self, plan: EpisodePlan, seed: int) -> Episodes:
        """Episodes on static buffers; what is captured."""
        assert self._start is not None  # ``_begin`` has run
        return run_episodes(
            self.method, self.model, self.prompts, plan.views, seed=seed, noise=plan.noise,
            start=(self._prompt[0], self._start),
        )  # fmt: skip

    def _begin(self) -> None:
        """Computes text features where episodes start from another prompt than the last did, or
        other weights."""
        now = self.prompts.initial, self.prompts.versions()
        if self._held is not None and self._held[0] is now[0] and self._held[1] == now[1]:
            return
        self._held = None  # until it is computed the buffers hold a mixture
        self._prompt.copy_(now[0][None])
        if self._recorder is None:
            self._start = self._linearised()
        else:
            if self._start_graph is None:
                # Captured, because autograd runs a backward pass on the stream of its forward
                # pass: one that has run on another stream cannot be a part of a capture.
                graph, self._start = self._recorder.record(self._linearised, "text features")
                self._start_graph = graph
            self._start_graph.replay()
        self._held = now

    def _linearised(self) -> Linearised:
        return self.prompts.linearise(self._prompt)

    def _plan(self, views: Sequence[Views], seed: int, noise: Tensor | None) -> EpisodePlan:
        """The captured episodes that this group fits into."""
        first, size = views[0], len(views)
        counts = {len(x) for x in views}
        if len(counts) > 1:
            raise ValueError(
                f"the images have {', '.join(map(str, sorted(counts)))} views; needed as many of "
                "every image"
            )
        regions = tuple(x.region is not None for x in views)
        alone = len(set(regions)) > 1  # some came with a region: the first cannot be repeated
        key = (
            first.base.shape, first.base.dtype, first.weight.dtype, _without_augmentation(views),
            regions if alone else regions[:1], noise is None, seed,
        )  # fmt: skip
        plans = self.plans.setdefault(key, {})
        fitting = [n for n in plans if size <= n <= (size if alone else 2 * size)]
        if fitting:
            return plans[min(fitting)]
        plan = EpisodePlan.of(views, noise)
        plan.fill(views, noise)
        if self._recorder is not None:
            name = f"{size} x {len(first)} views of {first.resolution} pixels"
            plan.graph, plan.result = self._recorder.record(lambda: self._body(plan, seed), name)
        plans[size] = plan
        return plan


def _without_augmentation(views: Sequence[Views]) -> bool:
    return all(x.mix.data_ptr() == x.base.data_ptr() for x in views)
