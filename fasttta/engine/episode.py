"""Episodes: updates that start afresh with every image, and the results of B of them.

``run_updates`` is the only loop: forward, objective, backward, update, as often as the method has
steps. An object says what is updated: the weights of a model (``engine.step.Weights``), a
prompt for each image, or the pixels. All tensors have fixed shapes, and nothing in the loop reads a
value on the host, so that a captured step can replay it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..methods.base import Objective
from ..methods.episodic import Episodic, Images, Seen, unit
from ..protocols import Linearised, VisionLanguageModel
from ..views import Views
from .result import StepResult


class Tuned(Protocol):
    """What the updates of an episode change. A new object is at the episode's start."""

    def values(self) -> dict[str, Tensor]:
        """Tensors for the objective's state: leaves of autograd."""

    def gradients(self, objective: Objective) -> tuple[Tensor, ...]:
        """Gradients of the objective's total with respect to what is tuned."""

    def update(self, grads: tuple[Tensor, ...], objective: Objective) -> Tensor:
        """One update; whether it counted: [B], or 0-d of a single episode."""


@dataclass
class Updates:
    """Results of the updates of an episode.

    Attributes:
        first: the objective before any update.
        grads, last_grads: of the first and the last update.
        counted: whether the first update was made, [B] or 0-d.
        state: what the last objective returned as its state.
    """

    first: Objective
    grads: tuple[Tensor, ...]
    last_grads: tuple[Tensor, ...]
    counted: Tensor
    state: Mapping[str, Tensor]


def run_updates(
    steps: int, evaluate: Callable[[Mapping[str, Tensor]], Objective], tuned: Tuned
) -> Updates:
    """Makes ``steps`` updates of what is tuned.

    Args:
        evaluate: the method's objective; its argument holds the tuned tensors and the state that
            the previous objective returned.
    """
    state: Mapping[str, Tensor] = {}
    updates: Updates | None = None
    for _ in range(steps):
        with torch.enable_grad():
            objective = evaluate({**tuned.values(), **state})
            grads = tuned.gradients(objective)
        with torch.no_grad():
            counted = tuned.update(grads, objective)
        state = {name: x.detach() for name, x in objective.state.items()}
        if updates is None:
            updates = Updates(objective, grads, grads, counted, state)
        updates.last_grads, updates.state = grads, state
    assert updates is not None  # steps is at least 1
    return updates


def finite_rows(*tensors: Tensor) -> Tensor:
    """[B], whether all values of a row are finite, in each of the tensors [B, ...]. Infinity and
    NaN times 0 are NaN, which remains in a sum: three kernels where ``isfinite`` has five."""
    zeros = [(x * 0).flatten(1).sum(1) if x.ndim > 1 else x * 0 for x in tensors]
    return sum(zeros[1:], zeros[0]) == 0


class TunedPrompts:
    """A prompt for each of B images, updated by the method's optimiser.

    The objective is a function of the text features, ``tuned`` [B, C, E]: their derivative by the
    prompt at the start, which all images share, is taken once.
    """

    def __init__(
        self, method: Episodic, prompts: Any, start: Linearised, prompt: Tensor, count: int
    ) -> None:
        self._prompts = prompts
        self.value = torch.nn.Parameter(prompt.repeat(count, 1, 1))  # [B, n, D]
        self._optimizer: Any = method.optimizer([self.value])
        # it warns of one optimiser that runs both in and out of a capture, which is intended here
        self._optimizer._warned_capturable_if_run_uncaptured = True
        self._at: Linearised | None = start

    def values(self) -> dict[str, Tensor]:
        """The text features of each image's prompt, as the leaf that gradients are taken of."""
        if self._at is None:
            self._at = self._prompts.linearise(self.value.detach())
        features = self._at.features.expand(len(self.value), -1, -1)
        self._leaf = features.detach().requires_grad_()
        return {"tuned": self._leaf}

    def gradients(self, objective: Objective) -> tuple[Tensor, ...]:
        """Gradient of the total with respect to the prompts, through that of the text features."""
        (cotangent,) = torch.autograd.grad(objective.losses["total"].sum(), self._leaf)
        assert self._at is not None  # ``values`` has run
        with torch.no_grad():
            return (self._at.pullback(cotangent),)

    def update(self, grads: tuple[Tensor, ...], objective: Objective) -> Tensor:
        """One optimiser step where gradients are finite; returns [B], which prompts moved."""
        (grad,) = grads
        finite = finite_rows(grad, objective.losses["total"])
        self.value.grad, before = grad, self.value.detach().clone()
        self._optimizer.step()
        self.value.data = torch.where(finite[:, None, None], self.value.detach(), before)
        self._at = None
        return finite

    def last(self) -> Tensor:
        """Text features [B, C, E] with the prompts as they are."""
        return self._prompts.features(self.value.detach())


class TunedPixels:
    """What is added to each of B images, moved by the method along the gradient."""

    def __init__(self, method: Episodic, images: Images, seen: Seen) -> None:
        self._method, self._seen = method, seen
        self.value = method.start(images, seen)  # [B, 3, R, R]

    def values(self) -> dict[str, Tensor]:
        """What is added to the pixels, as the leaf that gradients are taken of."""
        self._leaf = self.value.detach().requires_grad_()
        return {"tuned": self._leaf}

    def gradients(self, objective: Objective) -> tuple[Tensor, ...]:
        """Gradient of the total with respect to what is added to the pixels."""
        return torch.autograd.grad(objective.losses["total"].sum(), self._leaf)

    def update(self, grads: tuple[Tensor, ...], objective: Objective) -> Tensor:
        """One move, as the method says. It counts for every image."""
        self.value = self._method.move(self._seen, self.value, grads[0])
        return torch.ones(len(self.value), dtype=torch.bool, device=self.value.device)

    def last(self) -> Tensor:
        """[B, 3, R, R] as it is."""
        return self.value


@dataclass
class Episodes:
    """Results of B episodes that were computed together.

    Attributes:
        logits, logits_before: [B, C]; logits_before is the zero-shot prediction of the anchor.
        used: [B], samples that were learnt from; for images bool.
        losses: [B] each, of the first step.
        stats: [B, ...] each.
        grads: [B, ...] each, of the first step, by tuned name.
        trace: [B, ...] each, intermediates.
    """

    logits: Tensor
    logits_before: Tensor
    used: Tensor
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    grads: Mapping[str, Tensor] = field(default_factory=dict)
    trace: Mapping[str, Tensor] = field(default_factory=dict)


def run_episodes(
    method: Episodic,
    model: VisionLanguageModel,
    prompts: Any,
    views: Sequence[Views],
    *,
    seed: int = 0,
    noise: Tensor | None = None,
    trace: bool = False,
    start: tuple[Tensor, Linearised] | None = None,
) -> Episodes:
    """B episodes on images, each from ``prompts.initial``.

    Args:
        prompts: of ``model.prompts(ids, method.tuned_length)``.
        views: of each image, alike in number.
        seed: of random numbers, the same for every image.
        noise: [B or 1, 3, R, R], what ``method.noise`` returned.
        trace: also return gradients and intermediates.
        start: another prompt [n, D] than the initial one, and its text features.
    """
    with torch.no_grad():
        prompt, at = start or (prompts.initial, prompts.linearise())
        text = unit(at.features)  # [1, C, E]
        images = Images(views, text, seed, noise)
        seen = method.forward(model, images)
        tuned: TunedPrompts | TunedPixels | None = None
        if method.strategy == "prompt":
            tuned = TunedPrompts(method, prompts, at, prompt, len(views))
        elif method.strategy == "pixels":
            tuned = TunedPixels(method, images, seen)
    if tuned is None:
        with torch.no_grad():
            prediction = method.predict(model, seen, {})
        used = finite_rows(prediction.logits)
        return Episodes(
            prediction.logits, seen.logits[:, 0], used, stats=prediction.stats,
            trace=prediction.trace if trace else {},
        )  # fmt: skip
    ones = torch.ones(len(views), device=text.device, dtype=text.dtype)

    def evaluate(state: Mapping[str, Tensor]) -> Objective:
        return method.objective(model, seen, state=state, constants={}, valid=ones)

    updates = run_updates(method.steps, evaluate, tuned)
    with torch.no_grad():
        prediction = method.predict(model, seen, {**updates.state, "tuned": tuned.last()})
    episodes = Episodes(
        prediction.logits, seen.logits[:, 0], finite_rows(prediction.logits),
        stats=prediction.stats, trace=prediction.trace if trace else {},
    )  # fmt: skip
    if isinstance(tuned, TunedPrompts):
        episodes.used = updates.counted
        episodes.losses = {name: x.detach() for name, x in updates.first.losses.items()}
        episodes.stats = {**prediction.stats, "prompt": tuned.value.detach()}
        episodes.grads = {"prompt": updates.grads[0]}
        if trace:
            episodes.trace = {**prediction.trace, "grad_last": updates.last_grads[0]}
    return episodes


def as_episodes(result: StepResult) -> Episodes:
    """Turns the result of a step into episodes with B = 1."""

    def rows(tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        return {name: x.unsqueeze(0) for name, x in (tensors or {}).items()}

    return Episodes(
        result.logits, result.logits_before, result.n_used.unsqueeze(0), rows(result.losses),
        rows(result.stats), rows(result.grads), rows(result.trace),
    )  # fmt: skip


def as_result(parts: Sequence[Episodes], single: bool, trace: bool) -> StepResult:
    """Episodes of all images; ``single``: no leading B in what is not logits."""

    def joined(name: str) -> dict[str, Tensor]:
        groups = [getattr(part, name) for part in parts]
        tensors = {key: torch.cat([group[key] for group in groups]) for key in groups[0]}
        return {key: x[0] if single else x for key, x in tensors.items()}

    losses = [part.losses for part in parts]
    return StepResult(
        logits=torch.cat([part.logits for part in parts]),
        logits_before=torch.cat([part.logits_before for part in parts]),
        n_used=torch.cat([part.used for part in parts]).sum(),
        losses={name: torch.cat([loss[name] for loss in losses]).mean() for name in losses[0]},
        stats={name: x.clone() for name, x in joined("stats").items()},
        grads={name: x.clone() for name, x in joined("grads").items()} if trace else None,
        trace={name: x.clone() for name, x in joined("trace").items()} if trace else None,
    )
