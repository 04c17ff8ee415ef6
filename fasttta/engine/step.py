"""One adaptation step: encode, objective, backward, update, predict."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .. import trace as ranges
from ..methods.base import EpisodeMethod, Method, Objective, check_objective
from ..methods.queue import KeptPasses, WindowedMethod
from ..methods.special_bases import DrawingMethod, TwoPassMethod
from ..ops.checks import all_finite, dense
from ..protocols import FusionModel, ReturnsMore
from .episode import run_updates
from .float32_products import AT_START, float32_products, shown_nodes
from .precision import Precision
from .result import StepResult, warn
from .state import State


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
        self.first_passes = 1
        self._recorder = model if isinstance(model, ReturnsMore) else None
        windowed = isinstance(method, WindowedMethod) and method.window > 1
        # on a CPU, where the window is fused batch by batch
        self.keeps_passes = windowed and method.score_at == "after" and device.type == "cpu"
        self.kept_passes: KeptPasses | None = None  # made by the first prediction that is kept

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
        """1 if every input value is finite: 0-d float on the device."""
        if self.host_checks:  # prepare refuses non-finite values
            return torch.ones((), dtype=self.precision.master, device=self.device)
        return all_finite(*inputs).to(self.precision.master)

    def predict(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Logits [B, C] with the current weights; changes nothing."""
        with ranges.span("predict"), environment(self.device, self.precision, grad=False):
            return self.method.logits(self.model, self._features(inputs))

    def draw(self, inputs: tuple[Tensor, ...], keep: Any = None) -> tuple[Tensor, ...]:
        """What the method draws at random for a batch, or ``keep`` in its place."""
        if not isinstance(self.method, DrawingMethod):
            return ()
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
            return self._run(features, valid, trace)

    def _run(self, features: Any, valid: Tensor, trace: bool) -> StepResult:
        """One step as the method's strategy is: an episode, updates, or the objective alone."""
        counted = valid.amax() if valid.ndim else valid
        if self.state.episodic:
            return self._episode(features, valid, counted, trace)
        if self.state.updates:
            return self._adapt(features, valid, counted, trace)
        with torch.no_grad():
            objective = self._objective(features, valid, self.state.method)
        finite = self._finite(objective, counted)
        self.state.method = self._state_after(objective, finite)
        return self._result(objective, objective.logits, counted, 0, {}, trace)

    def _state_after(self, objective: Objective, finite: Tensor) -> Mapping[str, Tensor]:
        """The state of the method for the next batch."""
        if isinstance(self.method, WindowedMethod):
            return self.method.after_update(objective.state, finite, self.state.method)
        return objective.state

    def _episode(self, features: Any, valid: Tensor, counted: Tensor, trace: bool) -> StepResult:
        """Updates from the start of an episode; nothing but the weights after them is kept."""
        weights = Weights(self, counted)
        updates = run_updates(
            self.method.steps, lambda state: self._objective(features, valid, state), weights
        )
        first = updates.first
        with torch.no_grad():
            logits = self._logits(features) if self.method.score_at == "after" else first.logits
            self.state.method = {}
            named = dict(zip(self.state.leaves, updates.grads, strict=True))
            used = first.n_used * updates.counted
            return self._result(first, logits, counted, used, named, trace)

    def _logits(self, features: Any) -> Tensor:
        if isinstance(self.method, EpisodeMethod):
            return self.method.score(self.model, features)
        return self.method.logits(self.model, features)

    def _objective(self, features: Any, valid: Tensor, state: Mapping[str, Tensor]) -> Objective:
        # everything but the kept passes is the model's
        model = cast(FusionModel, self.kept_passes) if self.kept_passes else self.model
        with ranges.span("objective"):
            objective = self.method.objective(
                model, features, state=state, constants=self.state.constants, valid=valid
            )
        check_objective(self.method, objective, self.state.updates)
        return objective

    def _finite(
        self, objective: Objective, counted: Tensor, grads: tuple[Tensor, ...] = ()
    ) -> Tensor:
        """0-d float, 1 if inputs (``counted``, 0-d), loss and gradients (and their squares) are
        finite."""
        # The largest value of each gradient takes a few launches for all; NaN stays NaN.
        largest = list(torch._foreach_norm(grads, float("inf"))) if grads else []
        limit = torch.inf
        if largest:  # Adam keeps the square: after an overflow the tensor would never move again
            limit = torch.finfo(largest[0].dtype).max ** 0.5
        if "total" in objective.losses:
            total = objective.losses["total"].detach()
            largest.append((total - total).to(largest[0] if largest else total))  # 0 or NaN
        return counted * (torch.stack(largest).amax() < limit) if largest else counted

    def _adapt(self, features: Any, valid: Tensor, counted: Tensor, trace: bool) -> StepResult:
        method, state = self.method, self.state
        leaves = list(state.leaves.values())
        first: Objective | None = None
        carried, recovered = state.method, None
        every: Tensor | None = None  # whether all updates were finite
        for _ in range(method.steps):
            objective = self._objective(features, valid, carried)
            if first is None and self._recorder is not None and self._recorder.outputs:
                self.first_passes = len(self._recorder.outputs)
            grads, recover = self._gradients(objective, leaves), None
            if isinstance(method, TwoPassMethod):
                objective, recover, grads = self._second_pass(
                    method, features, objective, grads, leaves, carried
                )
            finite = self._finite(objective, counted, grads)
            every = finite if every is None else every * finite
            with ranges.span("update"):
                self._update(leaves, grads, finite, objective)
                if recover is not None:
                    state.recover(recover)
                    recovered = recover if recovered is None else recovered | recover
            if not isinstance(method, WindowedMethod):  # whose window has the batch once
                carried = {name: x.detach() for name, x in objective.state.items()}
            if first is None:
                first, used = objective, objective.n_used * _applied(finite, objective)
                named = dict(zip(state.leaves, grads, strict=True))
        assert first is not None  # steps is at least 1
        assert every is not None
        with torch.no_grad():
            logits = first.logits
            if method.score_at == "after":
                with ranges.span("predict"):
                    if self.keeps_passes:
                        self.kept_passes = self.kept_passes or KeptPasses(self.model, leaves)
                        logits = self.kept_passes.predict(features)
                    else:
                        logits = self._logits(features)
            after_state = self._state_after(objective, every)
            state.method = {name: x.detach() for name, x in after_state.items()}
            if recovered is not None:
                first.stats["recovered"] = recovered
            return self._result(first, logits, counted, used, named, trace)

    def _gradients(self, objective: Objective, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with ranges.span("backward"):
            total = objective.losses["total"]
            if total.requires_grad:
                grads = torch.autograd.grad(total, leaves, allow_unused=True)
            if not total.requires_grad or all(grad is None for grad in grads):
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
        leaves: list[Tensor],
        state: Mapping[str, Tensor],
    ) -> tuple[Objective, Tensor, tuple[Tensor, ...]]:
        """Objective, whether to recover (0-d bool), and gradients at weights perturbed along the
        first gradients (SAM: Foret et al., ICLR 2021, equation 2). Puts the weights back."""
        norm = torch.stack(torch._foreach_norm(grads)).norm()
        kept = [torch.empty_like(leaf) for leaf in leaves]
        with torch.no_grad():
            torch._foreach_copy_(kept, leaves)
            torch._foreach_add_(leaves, torch._foreach_mul(grads, method.rho / (norm + 1e-12)))
        with ranges.span("objective"):
            second, recover = method.second_objective(self.model, features, first, state=state)
        grads = self._gradients(second, leaves)
        second.losses["total"] = first.losses["total"]
        with torch.no_grad():
            torch._foreach_copy_(leaves, kept)
        return second, recover, grads

    def _update(
        self,
        leaves: Sequence[Tensor],
        grads: tuple[Tensor, ...],
        finite: Tensor,
        objective: Objective,
    ) -> None:
        optimizer: Any = self.state.optimizer  # which does not declare found_inf
        if self.host_checks:
            if not finite:
                warn(
                    "the loss or a gradient is not finite although the input is (or its square is "
                    "not); this update was skipped (n_used = 0)",
                    RuntimeWarning,
                )
            if not finite or not objective.apply:
                return
        for leaf, grad in zip(leaves, grads, strict=True):
            # fused Adam on a GPU takes no other strides than the parameter's
            same = grad.stride() == leaf.stride()
            leaf.grad = grad if same else torch.empty_like(leaf).copy_(grad)
        try:
            if not self.host_checks:
                # fused Adam leaves parameters, moments and step count as they are where this is 1
                optimizer.found_inf = (1 - _applied(finite, objective)).float()
            optimizer.step()
        finally:
            optimizer.found_inf = None
            optimizer.zero_grad(set_to_none=True)

    def _fresh(self, x: Tensor) -> Tensor:
        """What a result shows, apart from what later steps change."""
        return x.detach().clone()

    def _result(
        self,
        objective: Objective,
        logits: Tensor,
        counted: Tensor,
        used: Tensor | int,
        grads: Mapping[str, Tensor],
        trace: bool,
    ) -> StepResult:
        fresh = self._fresh
        shown: Any = fresh
        if not self.host_checks:
            # a batch that did not count was computed from zeros: show NaN in place of its results
            nan = torch.full_like(counted, torch.nan)
            shown = functools.partial(torch.where, counted > 0, other=nan)
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


def _applied(finite: Tensor, objective: Objective) -> Tensor:
    """0-d float, 1 if the update is finite and to be applied."""
    apply = objective.apply
    return finite if isinstance(apply, float) and apply == 1 else finite * apply


class Weights:
    """Tuned weights of a model, as the updates of an episode change them; made at its start."""

    def __init__(self, step: Step, counted: Tensor) -> None:
        self._step, self._counted = step, counted
        self._leaves = list(step.state.leaves.values())
        step.state.recover(torch.ones((), dtype=torch.bool, device=step.device))

    def values(self) -> dict[str, Tensor]:
        """Empty: the objective runs the model that holds the weights."""
        return {}

    def gradients(self, objective: Objective) -> tuple[Tensor, ...]:
        """Of the loss by each weight."""
        return self._step._gradients(objective, self._leaves)

    def update(self, grads: tuple[Tensor, ...], objective: Objective) -> Tensor:
        """One update; 0-d float, 1 if it counted."""
        finite = self._step._finite(objective, self._counted, grads)
        self._step._update(self._leaves, grads, finite, objective)
        return _applied(finite, objective)


def _apart(state: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> Mapping[str, Tensor]:
    """The method's state, with copies of tensors that share memory with the caller's inputs."""
    theirs = {x.untyped_storage().data_ptr() for x in inputs}
    shared = {n: x for n, x in state.items() if x.untyped_storage().data_ptr() in theirs}
    if not shared:
        return state
    with torch.inference_mode(False), torch.no_grad():
        return {**state, **{name: x.clone() for name, x in shared.items()}}


def prepare(
    model: FusionModel, inputs: tuple, dtype: torch.dtype, check_finite: bool
) -> tuple[Tensor, ...]:
    """Checked inputs in a precision, usable by autograd; the caller's tensors do not change.

    Raises:
        ValueError, TypeError: they cannot be one batch, are no dense tensors, or (check_finite) are
            not finite.
    """
    names = model.input_names
    if len(inputs) != len(names) and not model.required_inputs <= len(inputs) < len(names):
        required = model.required_inputs
        needed = str(required) if required == len(names) else f"{required} to {len(names)}"
        raise TypeError(
            f"needed {needed} inputs ({', '.join(names)}), found {len(inputs)}; "
            "labels and the like stay out of it"
        )
    named = zip(names, inputs, strict=False)
    inputs = tuple([dense(name, x) if isinstance(x, Tensor) else x for name, x in named])
    model.check_inputs(*inputs)
    prepared = []
    with torch.inference_mode(False), torch.no_grad():
        for name, x in zip(names, inputs, strict=False):
            x = x.detach().to(dtype) if x.is_floating_point() else x.detach()
            if check_finite and not torch.isfinite(x).all():
                raise ValueError(f"{name} holds non-finite values (NaN or infinity in {x.dtype})")
            prepared.append(x.clone() if x.is_inference() else x)
    return tuple(prepared)


@contextlib.contextmanager
def environment(device: torch.device, precision: Precision, grad: bool) -> Iterator[None]:
    """No inference mode, no autocast, gradients as asked, float32 products in IEEE float32."""
    as_wanted = device.type == "cpu" and tuple(shown_nodes()) == AT_START
    mode = "tf32" if precision.name == "tf32" else "ieee"
    with (
        torch.inference_mode(False),
        torch.set_grad_enabled(grad),
        torch.autocast(device.type, enabled=False),
        contextlib.nullcontext() if as_wanted else float32_products(mode),
    ):
        yield
