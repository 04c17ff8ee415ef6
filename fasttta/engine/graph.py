"""Steps captured as CUDA graphs: one replay a step, nothing decided on the host."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..methods.queue import WindowedMethod
from ..methods.special_bases import StatefulMethod
from ..ops.checks import all_finite
from .capture import Capture, CaptureError
from .result import StepResult, warn
from .step import Step, environment


@dataclass
class Plan:
    """One captured step: buffers that it reads and the results that it writes.

    Attributes:
        inputs: static, for ``size`` samples.
        features: static encoder outputs if the step takes them, else None.
        present: [size], 1 for rows that hold a sample, the first ``filled``; 0: nobody knows.
        constants: of the method, which the graph reads where they lay at its capture.
        state: the method's state; for a window ``ring``, ``counts`` and ``place``, and ``rows``,
            the ring with a spare place, and ``places``, of which ``place`` is the first.
        places: [window, 3], for each place of the newest batch it, the one before and the spare.
        result: static, of all rows; rows without a sample hold arbitrary values.
        graph: None where steps run without capture (in tests, which have no GPU).
    """

    inputs: tuple[Tensor, ...]
    features: Tensor | None
    present: Tensor
    constants: Mapping[str, Tensor]
    state: dict[str, Tensor] = field(default_factory=dict)
    filled: int = 0
    places: Sequence[Tensor] = ()
    result: StepResult | None = None
    graph: torch.cuda.CUDAGraph | None = None

    @property
    def size(self) -> int:
        """The rows of the captured batch."""
        return len(self.present)


class GraphStep(Step):
    """Runs a method with forward, objective, backward, update and prediction as one graph replay.

    A batch smaller than the captured one leaves rows empty, with weight 0; a larger one, or one
    of other shapes, causes a new capture. While the window fills, its empty places have weight 0.
    ``trace=True`` runs eagerly on the same state.

    Args:
        capture: off: the same steps on the same static buffers without a graph.
        falls_back: a step that cannot be captured gives a warning, not an error; it and all later
            steps run eagerly.
    """

    def __init__(
        self, *args: Any, capture: bool = True, falls_back: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.host_checks = False
        self.capture = Capture(self.device) if capture else None
        self.falls_back, self.given_up = falls_back, False
        self.plans: dict[tuple, Plan] = {}
        self.current: Plan | None = None
        self.rows: list[int] = []  # samples in each place of the window, oldest first
        self.place = 0  # place of the newest batch
        self.past: list[tuple[Tensor, Tensor]] = []  # tokens and counts of the last places
        self.published: Mapping[str, Tensor] | None = None
        self._running: Plan | None = None  # whose body runs
        self.keeps_passes = False  # the window is one pass here

    def __deepcopy__(self, memo: dict) -> GraphStep:
        # a graph uses the buffers that it was captured with
        model, state = (copy.deepcopy(x, memo) for x in (self.model, self.state))
        capture = self.capture is not None
        parts = model, self.method, state, self.precision, self.device, False
        twin = GraphStep(*parts, capture=capture, falls_back=self.falls_back)
        twin.given_up = self.given_up
        return twin

    def _eager(self, inputs: tuple[Tensor, ...], features: Any, trace: bool) -> StepResult:
        fits = not trace and (features is None or isinstance(features, Tensor))
        if self.given_up or not fits:
            return super()._eager(inputs, features, trace)
        with torch.inference_mode(False), torch.no_grad():
            try:
                plan = self._plan(inputs, features)
            except CaptureError as error:
                if not self.falls_back:
                    raise
                self._give_up(error)
                return super()._eager(inputs, features, trace)
            # a step may be interrupted: until it ends the buffers match no state
            published, self.published = self.published, None
            if plan is not self.current or self.state.method is not published:
                self._enter(plan)
            size = len(inputs[0])
            for buffer, x in zip(plan.inputs, inputs, strict=True):
                _fill(buffer, x)
            if features is not None and plan.features is not None:  # the plan's key says both
                _fill(plan.features, features)
            if plan.filled != size:
                plan.filled = 0
                plan.present.fill_(0)[:size].fill_(1)
                plan.filled = size
            self._advance(size)
            if self._window:
                plan.state["places"].copy_(plan.places[self.place])
            if plan.graph is None:
                plan.result = self._body(plan)
            else:
                plan.graph.replay()
            self._publish(plan)
            return self._taken(plan, size)

    def _give_up(self, error: CaptureError) -> None:
        """Runs eagerly from now on, with the memory of earlier captures given back."""
        self.given_up, self.current = True, None
        self.plans.clear()
        warn(
            f"steps run eagerly, because capturing one as a CUDA graph failed: {error.__cause__} "
            '(engine="eager" says the same without a warning, engine="graph" makes it an error)',
            RuntimeWarning,
        )

    @property
    def _window(self) -> int:
        """Places of the window, 0 for methods without one."""
        method = self.method
        return method.window if isinstance(method, WindowedMethod) and method.window > 1 else 0

    def _body(self, plan: Plan) -> StepResult:
        """One step on static buffers; what is captured."""
        self._running = plan
        try:
            return self._step(plan)
        finally:
            self._running = None

    def _fresh(self, x: Tensor) -> Tensor:
        """Results of a body are copied when it has run: here only what it writes afterwards."""
        if self._running is None:
            return super()._fresh(x)
        written = {y.untyped_storage()._cdata for y in self._running.state.values()}
        return x.detach().clone() if x.untyped_storage()._cdata in written else x.detach()

    def _step(self, plan: Plan) -> StepResult:
        features = plan.features
        if features is None:
            features = self.encode(plan.inputs)
        with environment(self.device, self.precision, grad=True):
            checked = (*plan.inputs, features) if self._window else plan.inputs
            finite = all_finite(*checked)
            valid = plan.present * finite
            state = plan.state
            if self._window:
                self._write(state, features, valid, finite)
            self.state.method = {n: state[n] for n in state if n not in ("rows", "places")}
            result = self._run(features, valid, False)
            with torch.no_grad():
                method = self.state.method
                if self._window:
                    self._settle(state, method["kept"])
                else:
                    for name, x in method.items():
                        state[name].copy_(x)
            return result

    def _write(
        self, state: dict[str, Tensor], features: Tensor, counts: Tensor, finite: Tensor
    ) -> None:
        """Writes the current batch to its place of the window. One that is not finite goes to a
        spare row: the place keeps the tokens of the oldest batch, as a value with weight 0 must
        still be finite."""
        with torch.no_grad():
            row = torch.where(finite, state["place"], state["places"][2:])
            state["rows"].index_copy_(0, row, features.unsqueeze(0))
            state["counts"].index_copy_(0, state["place"], counts.unsqueeze(0))

    def _settle(self, state: dict[str, Tensor], counts: Tensor) -> None:
        """Whether the current batch counts in later windows. One that does not gets the tokens of
        the place before: its own cannot serve even if they are finite, because the pass over them
        may have overflowed."""
        with torch.no_grad():
            row = torch.where(counts.amax() > 0, state["place"], state["places"][1:2])
            tokens = state["ring"].index_select(0, row)
            state["ring"].index_copy_(0, state["place"], tokens)
            state["counts"].index_copy_(0, state["place"], counts.unsqueeze(0))

    def _plan(self, inputs: tuple[Tensor, ...], features: Tensor | None) -> Plan:
        """The captured step that this batch fits into."""
        of_features = None if features is None else (features.shape[1:], features.dtype)
        # the views of an image: with some of them missing fewer would be selected
        views = len(inputs[0]) if self.state.episodic else None
        key = (*((x.shape[1:], x.dtype) for x in inputs), of_features, views)
        plan = self.plans.get(key)
        past = [len(x) for name, x in self.state.method.items() if name.startswith("queue.")]
        size = max([len(inputs[0]), *past])
        if plan is None or plan.size < size or plan.constants is not self.state.constants:
            plan = self._captured(inputs, features, size)
            self.plans[key] = plan
        return plan

    def _captured(self, inputs: tuple[Tensor, ...], features: Tensor | None, size: int) -> Plan:
        plan = Plan(
            tuple(_fill(x.new_empty((size, *x.shape[1:])), x) for x in inputs),
            None
            if features is None
            else _fill(features.new_empty((size, *features.shape[1:])), features),
            torch.ones(size, dtype=self.precision.master, device=self.device),
            self.state.constants,
        )
        tokens: Any = self.encode(plan.inputs) if features is None else plan.features
        if self._window:
            places = self._window
            # Empty places repeat a real batch: all-zero tokens give NaN in some models. A batch
            # that overflows in the fusion cannot serve, as a weight of 0 does not remove a NaN.
            with environment(self.device, self.precision, grad=False):
                loss = self._objective(tokens, plan.present, {}).losses["total"]
            finite = torch.where(torch.isfinite(loss), tokens, 0)
            rows = finite.expand(places + 1, *tokens.shape).clone()
            turns = [[i, (i - 1) % places, places] for i in range(places)]
            plan.places = torch.tensor(turns, device=self.device).unbind()
            current = plan.places[0].clone()
            plan.state = {
                "rows": rows,
                "ring": rows[:places],
                "counts": plan.present.new_zeros((places, size)),
                "places": current,
                "place": current[:1],
            }
        elif self.state.updates and isinstance(self.method, StatefulMethod):
            first = tokens if isinstance(tokens, Tensor) else plan.present
            with environment(self.device, self.precision, grad=False):
                classes = self.method.logits(self.model, tokens).shape[1]
            plan.state = self.method.blank_state(
                first.new_zeros(0, dtype=self.precision.master), classes
            )
        if self.capture is None:
            return plan
        method, restore = self.state.method, self.state.journal()
        blank = {name: x.clone() for name, x in plan.state.items()}
        try:
            shapes = ", ".join(str(list(x.shape)) for x in plan.inputs)
            plan.graph, plan.result = self.capture.record(
                lambda: self._body(plan), f"a step of {self.method.name!r} on {shapes}"
            )
        finally:
            restore()
            self.state.method = method
            for name, x in blank.items():
                plan.state[name].copy_(x)
        return plan

    def _enter(self, plan: Plan) -> None:
        """Takes the method's state, as eager steps and saved files have it, into the buffers."""
        state = self.state.method
        if self._window:
            plan.state["counts"].zero_()
            past = [state[f"queue.{i}"] for i in range(sum(n.startswith("queue.") for n in state))]
            past = past[-(self._window - 1) :]
            self.rows = [len(tokens) for tokens in past]
            # sums run in the order of the places: as they were, the next step is bit-identical
            self.place = int(state.get("place", len(past) - 1))
            for i, (place, n) in enumerate(self._order()):
                plan.state["ring"][place, :n] = past[i]
                plan.state["counts"][place, :n] = state[f"valid.{i}"]
            self.past = [(tokens, state[f"valid.{i}"]) for i, tokens in enumerate(past)]
        else:
            blank = {}
            if isinstance(self.method, StatefulMethod):
                empty = plan.present.new_zeros(0)
                blank = self.method.blank_state(empty, self._classes(plan))
            for name, buffer in plan.state.items():
                buffer.copy_(state.get(name, blank[name]))
        self.current = plan

    def _classes(self, plan: Plan) -> int:
        average = plan.state.get("average")
        return average.numel() if average is not None else 0

    def _advance(self, size: int) -> None:
        """The place that the next batch takes: that of the oldest, once the window is full."""
        if self._window:
            self.place = (self.place + 1) % self._window
            self.rows = [*self.rows, size][-self._window :]

    def _order(self) -> list[tuple[int, int]]:
        """(place, samples) of the window's batches, oldest first."""
        last = len(self.rows) - 1
        return [((self.place - last + i) % self._window, n) for i, n in enumerate(self.rows)]

    def _publish(self, plan: Plan) -> None:
        """The method's state as eager steps have it, apart from the buffers."""
        if self._window:
            ring, counts = plan.state["ring"], plan.state["counts"]
            newest = ring[self.place, : self.rows[-1]], counts[self.place, 0]
            tokens, count = _copied([[x] for x in newest])
            self.past = [*self.past, (tokens, count)][-(self._window - 1) :]
            method = {f"queue.{i}": tokens for i, (tokens, _) in enumerate(self.past)}
            method |= {f"valid.{i}": count for i, (_, count) in enumerate(self.past)}
            method["place"] = torch.tensor(self.place, device="cpu")
        else:
            copies = _copied([[x] for x in plan.state.values()])
            method = dict(zip(plan.state, copies, strict=True))
        self.state.method = method
        self.published = method

    def _taken(self, plan: Plan, size: int) -> StepResult:
        """Fresh copies of the static results, for rows that hold a sample."""
        result = plan.result
        assert result is not None  # a step has run

        def rows(x: Tensor) -> list[Tensor]:
            if not x.ndim:
                return [x]
            if not self._window:
                return [x[:size]]
            return [x[p * plan.size : p * plan.size + n] for p, n in self._order()]

        shown = [[result.logits[:size]], [result.logits_before[:size]], [result.n_used]]
        shown += [[x] for x in result.losses.values()]
        shown += [rows(x) for x in result.stats.values()]
        logits, before, used, *others = _copied(shown)
        losses, stats = others[: len(result.losses)], others[len(result.losses) :]
        return replace(
            result,
            logits=logits,
            logits_before=before,
            n_used=used,
            losses=dict(zip(result.losses, losses, strict=True)),
            stats=dict(zip(result.stats, stats, strict=True)),
        )


def _copied(groups: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    """The tensors of each group, one after another along their first dimension, in fresh memory;
    on a GPU in a launch for all of one type."""
    copies: list[Tensor] = []
    by_type: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for parts in groups:
        places, sources = by_type.setdefault(parts[0].dtype, ([], []))
        sources += parts
        if len(parts) == 1:
            copies.append(torch.empty_like(parts[0]))
            places.append(copies[-1])
        else:
            sizes = [len(x) for x in parts]
            copies.append(parts[0].new_empty(sum(sizes), *parts[0].shape[1:]))
            places += copies[-1].split(sizes)
    for places, sources in by_type.values():
        torch._foreach_copy_(places, sources)
    return copies


def _fill(buffer: Tensor, x: Tensor) -> Tensor:
    """Writes samples to the first rows of a buffer; the other rows repeat the first sample."""
    buffer[: len(x)].copy_(x)
    if len(x) < len(buffer):
        buffer[len(x) :].copy_(x[:1].expand_as(buffer[len(x) :]))
    return buffer
