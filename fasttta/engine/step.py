"""One adaptation step: encode, objective, backward, update, predict."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor

from .. import trace as ranges
from ..methods.base import Method, Objective, TwoPassMethod, check_objective
from ..methods.queue import WindowedMethod
from ..protocols import FusionModel, ReturnsMore
from .ahead import Ahead
from .inputs import prepare
from .precision import Precision, environment
from .state import State


def warn(message: str, category: type[Warning]) -> None:
    """A warning at the caller's line, however deep inside fasttta and torch it is raised."""
    level = 1
    frame: FrameType | None = sys._getframe()
    while frame and frame.f_globals.get("__name__", "").split(".")[0] in ("fasttta", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


@dataclass(repr=False)
class StepResult:
    """What a step returns: fresh tensors on the model's device; nothing synchronises.

    Attributes:
        logits: [B, C], the prediction (before or after the update, as the method scores).
        logits_before: [B, C], of the current batch before the update.
        losses: 0-d tensors of the first inner step, unweighted except ``"total"``.
        stats: tensors the method's docstring describes.
        n_used: 0-d int64, samples in the loss of the update (past batches of a window included).
            At 0 nothing was learnt from the batch: no update, or (SAR) one by momentum alone.
        grads: with ``trace=True``: gradients of the first inner step, named as ``tuned``.
        trace: with ``trace=True``: the method's intermediates.
    """

    logits: Tensor
    logits_before: Tensor
    n_used: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    stats: dict[str, Tensor] = field(default_factory=dict)
    grads: dict[str, Tensor] | None = None
    trace: dict[str, Tensor] | None = None

    def __repr__(self) -> str:
        """Shapes, and the values of single numbers."""
        parts = [f"{x.name}={_brief(getattr(self, x.name))}" for x in fields(self)]
        return f"StepResult({', '.join(parts)})"


def _brief(value: Tensor | Mapping[str, Tensor] | None) -> str:
    if isinstance(value, Tensor):
        return f"Tensor{list(value.shape)}" if value.ndim else f"{value.item():.4g}"
    if value is None:
        return "None"
    return "{" + ", ".join(f"{name}: {_brief(x)}" for name, x in value.items()) + "}"


class Step:
    """Runs a method on a model eagerly.

    Args:
        model: working copy whose tuned parameters are ``state.leaves``.
        host_checks: read values on the host: non-finite input is an error and a non-finite loss
            warns. Without (on a GPU) the same is decided on the device: the update is skipped.
    """

    def __init__(
        self,
        model: FusionModel,
        method: Method,
        state: State,
        precision: Precision,
        device: torch.device,
        host_checks: bool,
    ) -> None:
        self.model, self.method, self.state = model, method, state
        self.precision, self.device, self.host_checks = precision, device, host_checks
        revisits = (
            isinstance(method, WindowedMethod) and method.window > 1 and method.score_at == "after"
        )
        # where the window is fused batch by batch
        ahead = revisits and device.type == "cpu"
        self.first_passes = 1
        self._recorder = model if isinstance(model, ReturnsMore) else None
        self.ahead = Ahead(model, list(state.leaves.values())) if ahead else None

    # ------------------------------------------------------------------ inputs

    def prepare(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Checked inputs in the master precision."""
        return prepare(self.model, inputs, self.precision.master, self.host_checks)

    def encode(self, inputs: tuple[Tensor, ...]) -> Any:
        """What the method's steps on one batch share."""
        with environment(self.device, self.precision, grad=False):
            return self._features(inputs)

    def _features(self, inputs: tuple[Tensor, ...]) -> Any:
        """What ``Method.objective`` gets as ``features``."""
        return self.model.encode(*inputs) if self.method.frozen_encoder else inputs

    def _valid(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """0-d float on the device: 1 if every input value is finite."""
        valid = torch.ones((), dtype=self.precision.master, device=self.device)
        if self.host_checks:
            return valid  # prepare has refused anything else
        for x in inputs:
            valid = valid * torch.isfinite(x).all()
        return valid

    # ------------------------------------------------------------------ predictions

    def predict(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Logits [B, C] with the current weights; changes nothing."""
        with ranges.span("predict"), environment(self.device, self.precision, grad=False):
            return self.method.logits(self.model, self._features(inputs))

    # ------------------------------------------------------------------ adaptation

    def draw(self, inputs: tuple[Tensor, ...], keep: Any = None) -> tuple[Tensor, ...]:
        """What the method draws at random for a batch, or ``keep`` in its place."""
        with torch.inference_mode(False):
            return self.method.draw(self.model, inputs, self.state.generator, keep)

    def __call__(
        self,
        inputs: tuple[Tensor, ...],
        *,
        features: Any = None,
        trace: bool = False,
        drawn: tuple[Tensor, ...] | None = None,
    ) -> StepResult:
        """One step on prepared inputs (``features``: already encoded ones; ``drawn``: in place of
        what the method draws at random), between the state's ``begin`` and ``commit``: one that
        fails leaves the tensors as they are then."""
        if drawn is None:
            drawn = self.draw(inputs)
        result = self._eager((*inputs, *drawn), features, trace)
        self.state.method = _apart(self.state.method, inputs)
        return result

    def _eager(self, inputs: tuple[Tensor, ...], features: Any, trace: bool) -> StepResult:
        if features is None:
            features = self.encode(inputs)
        with environment(self.device, self.precision, grad=True):
            valid = self._valid(inputs)
            if not self.method.updates:
                with torch.no_grad():
                    objective = self._objective(features, valid, self.state.method)
                finite = self._finite(objective, valid)
                self.state.method = self._state_after(objective, finite)
                return self._result(objective, objective.logits, valid, 0, {}, trace)
            return self._adapt(features, valid, trace)

    def _state_after(self, objective: Objective, finite: Tensor) -> Mapping[str, Tensor]:
        """The state of the method for the next batch."""
        if isinstance(self.method, WindowedMethod):
            return self.method.after_update(objective.state, finite, self.state.method)
        return objective.state

    def _logits(self, features: Any) -> Tensor:
        return self.method.score(self.model, features)

    def _objective(self, features: Any, valid: Tensor, state: Mapping[str, Tensor]) -> Objective:
        # what an Ahead does not keep is the model's
        model = cast(FusionModel, self.ahead) if self.ahead else self.model
        with ranges.span("objective"):
            objective = self.method.objective(
                model,
                features,
                state=state,
                constants=self.state.constants,
                valid=valid,
            )
        check_objective(self.method, objective)
        return objective

    def _finite(self, objective: Objective, valid: Tensor) -> Tensor:
        """0-d float, 1 if inputs and loss are finite."""
        finite = valid.amax()
        if "total" in objective.losses:
            finite = finite * torch.isfinite(objective.losses["total"].detach())
        return finite

    def _adapt(self, features: Any, valid: Tensor, trace: bool) -> StepResult:
        method, state = self.method, self.state
        leaves = list(state.leaves.values())
        first: Objective | None = None
        carried, recovered = state.method, None
        all_finite = torch.ones((), dtype=self.precision.master, device=self.device)
        if method.episodic:
            state.recover(torch.ones((), dtype=torch.bool, device=self.device))
            carried = {}
        for _ in range(method.steps):
            objective = self._objective(features, valid, carried)
            if first is None and self._recorder is not None and self._recorder.outputs:
                self.first_passes = len(self._recorder.outputs)
            grads, recover = self._gradients(objective, leaves), None
            if isinstance(method, TwoPassMethod):
                objective, recover, grads = self._second_pass(
                    method, features, objective, grads, leaves, carried
                )
            finite = self._finite(objective, valid)
            for grad in grads:
                # Adam keeps the square: where that overflows, the tensor never moves again
                finite = finite * (grad.abs() < torch.finfo(grad.dtype).max ** 0.5).all()
            all_finite = all_finite * finite
            with ranges.span("update"):
                self._update(leaves, grads, finite, objective.apply)
                if recover is not None:
                    state.recover(recover)
                    recovered = recover if recovered is None else recovered | recover
            if not isinstance(method, WindowedMethod):  # whose window has the batch once
                carried = {name: x.detach() for name, x in objective.state.items()}
            if first is None:
                first, used = objective, objective.n_used * finite * objective.apply
                named = dict(zip(state.leaves, grads, strict=True))
        assert first is not None  # steps is at least 1
        with torch.no_grad():
            after = None
            if method.score_at == "after":
                with ranges.span("predict"):
                    predict = self.ahead.predict if self.ahead else self._logits
                    after = predict(features)
            after_state = self._state_after(objective, all_finite)
            state.method = {name: x.detach() for name, x in after_state.items()}
            if method.episodic:
                state.method = {}
            if recovered is not None:
                first.stats["recovered"] = recovered
            logits = first.logits if after is None else after
            return self._result(first, logits, valid, used, named, trace)

    def _gradients(self, objective: Objective, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with ranges.span("backward"):
            total = objective.losses["total"]
            grads = (
                torch.autograd.grad(total, leaves, allow_unused=True)
                if total.requires_grad
                else (None,)
            )
            if all(grad is None for grad in grads):
                raise ValueError(
                    "the loss depends on none of the tuned tensors; is a part of the model "
                    "replaced by something that runs other weights?"
                )
            return tuple(
                torch.zeros_like(leaf) if grad is None else grad
                for leaf, grad in zip(leaves, grads, strict=True)
            )

    def _second_pass(
        self,
        method: TwoPassMethod,
        features: Any,
        first: Objective,
        grads: tuple[Tensor, ...],
        leaves: Sequence[Tensor],
        state: Mapping[str, Tensor],
    ) -> tuple[Objective, Tensor, tuple[Tensor, ...]]:
        """Objective, whether to recover (0-d bool), and gradients at weights perturbed along the
        first gradients (SAM: Foret et al., ICLR 2021, equation 2). Puts the weights back."""
        norm = torch.stack([grad.norm() for grad in grads]).norm()
        kept = [leaf.detach().clone() for leaf in leaves]
        with torch.no_grad():
            for leaf, grad in zip(leaves, grads, strict=True):
                leaf.add_(grad * (method.rho / (norm + 1e-12)))
        with ranges.span("objective"):
            second, recover = method.second_objective(self.model, features, first, state=state)
        grads = self._gradients(second, leaves)
        second.losses["total"] = first.losses["total"]
        with torch.no_grad():
            for leaf, value in zip(leaves, kept, strict=True):
                leaf.copy_(value)
        return second, recover, grads

    def _update(
        self,
        leaves: Sequence[Tensor],
        grads: tuple[Tensor, ...],
        finite: Tensor,
        apply: Tensor | float,
    ) -> None:
        optimizer: Any = self.state.optimizer  # which does not declare found_inf
        if self.host_checks:
            if not finite:
                warn(
                    "the loss or a gradient is not finite although the input is (or its square is "
                    "not); this update was skipped (n_used = 0)",
                    RuntimeWarning,
                )
            if not finite or not apply:
                return
        for leaf, grad in zip(leaves, grads, strict=True):
            # fused Adam on a GPU takes no other strides than the parameter's
            same = grad.stride() == leaf.stride()
            leaf.grad = grad if same else torch.empty_like(leaf).copy_(grad)
        try:
            if not self.host_checks:
                # fused Adam leaves parameters, moments and step count as they are where this is 1
                optimizer.found_inf = (1 - finite * apply).float()
            optimizer.step()
        finally:
            optimizer.found_inf = None
            optimizer.zero_grad(set_to_none=True)

    def _result(
        self,
        objective: Objective,
        logits: Tensor,
        valid: Tensor,
        used: Tensor | int,
        grads: Mapping[str, Tensor],
        trace: bool,
    ) -> StepResult:
        def fresh(x: Tensor) -> Tensor:
            return x.detach().clone()

        def shown(x: Tensor) -> Tensor:
            # a batch that did not count was computed from zeros: say so rather than show it
            x = fresh(x)
            return x if self.host_checks else torch.where(valid.amax() > 0, x, torch.nan)

        if not isinstance(used, Tensor):
            used = torch.full((), used, device=self.device)
        return StepResult(
            logits=shown(logits),
            logits_before=shown(objective.logits),
            losses={name: fresh(x) for name, x in objective.losses.items()},
            stats={name: fresh(x) for name, x in objective.stats.items()},
            n_used=used.detach().to(torch.int64),
            grads={n: fresh(g) for n, g in self.state.named(grads).items()}
            if trace and grads
            else ({} if trace else None),
            trace={name: fresh(x() if callable(x) else x) for name, x in objective.trace.items()}
            if trace
            else None,
        )


def _apart(state: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> Mapping[str, Tensor]:
    """The method's state without memory of the caller's, who may refill it."""
    theirs = {x.untyped_storage().data_ptr() for x in inputs}
    shared = {n: x for n, x in state.items() if x.untyped_storage().data_ptr() in theirs}
    if not shared:
        return state
    with torch.inference_mode(False), torch.no_grad():
        return {**state, **{name: x.clone() for name, x in shared.items()}}
