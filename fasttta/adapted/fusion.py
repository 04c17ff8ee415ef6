"""A model that adapts while it predicts."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..engine import delta
from ..engine.graph import GraphStep
from ..engine.inputs import as_inputs
from ..engine.model_watch import ModelWatch, said_of
from ..engine.precision import Precision
from ..engine.restore import restored
from ..engine.shift import Guard
from ..engine.snapshot import Snapshot
from ..engine.state import State, working_copy
from ..engine.step import Step, StepResult, warn
from ..engine.streaming import Lane, Reader, Stream, copied, groups, one_ahead
from ..engine.turn import exclusive, surely
from ..families import FusionFamily
from ..methods.base import Method
from ..protocols import FusionModel, ReturnsMore
from .base import Stateful


class Adapted(Stateful):
    """The model, adapting to what it is called on. Made by ``fasttta.adapt``.

    The wrapped model is never modified: frozen weights are shared with it, tuned tensors are
    private. ``train()`` and ``eval()`` change nothing, ``torch.no_grad()`` and
    ``torch.inference_mode()`` make no difference.

    One thread uses it at a time: calls of another wait, in a stream for one batch, and for the
    whole of a ``source()`` block. A call that fails or is interrupted anywhere leaves the state as
    it was before or as it is after, never between.
    """

    def __init__(
        self,
        model: nn.Module,
        known: FusionFamily,
        method: Method,
        precision: Precision,
        *,
        engine: str,
        seed: int,
        constants: Mapping[str, Tensor],
        guard: Guard | None = None,
        verify_model: str = "first",
    ) -> None:
        super().__init__()
        method = method.fitted(known.model)
        self.method, self.precision = method.name, precision.name
        self.options, self.engine, self.seed = method, engine, seed
        if guard is not None and method.episodic:
            raise ValueError(
                f"guard: {method.name!r} begins every image anew, so that there is nothing to reset"
            )
        self._guard = guard
        with torch.inference_mode(False):
            fusion = method.extend(known.model, seed)
        parameter = next(fusion.parameters())
        device = parameter.device
        slots = method.tuned(fusion)
        if method.group is not None and not slots:
            raise ValueError(
                f"{type(method).__name__} finds nothing to tune in this model (it looks for "
                f"{method.group}); fasttta inspect shows what each method would tune"
            )
        _refuse_tied(fusion, {slot.parameter for slot in slots.values()})
        with torch.inference_mode(False), torch.no_grad():
            working, leaves = working_copy(fusion, {s.parameter for s in slots.values()}, precision)
            fixed = {
                name: x.detach().to(device=device, dtype=precision.master, copy=True)
                for name, x in constants.items()
            }
            state = State(leaves, slots, method, fixed, seed)
        # not registered as children: .to(), .train() and .parameters() must not reach the user's
        # model, nor move tensors from under the optimiser
        extended = None if fusion is known.model else fusion
        self._hidden = (model, cast(nn.Module, working), cast("nn.Module | None", extended))
        if fusion is known.model:
            known.tuned = frozenset(state.leaves)
            known.all_used = method.group == "fusion_qkv"
        self._known, self._verified = known, known.module is None
        self._watch = ModelWatch(model, verify_model, known.copied_parameters(model))
        self._state = state
        self._holders = {name: _owner(self._hidden[1], name) for name in leaves}
        step = GraphStep if engine == "graph" else Step
        self._step = step(working, method, state, precision, device, device.type != "cuda")
        self._in_source: bool = False
        self._wired: bool | None = False  # the weights that calls run: the source's; None: neither
        self._warned_single = False

    # ------------------------------------------------------------------ calls

    @exclusive
    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Adapts on this batch and predicts it: logits [B, C], or what the wrapped model returns
        where that is more (tuple, dict, ModelOutput), with the prediction's logits in it."""
        self._refuse(options)
        inputs = self._prepare(inputs)
        with self._outputs() as returned:
            logits = self.step(*inputs).logits
            before = self._step.method.score_at == "before" and not self._in_source
            return returned(logits, self._step.first_passes - 1 if before else -1)

    @exclusive
    def step(self, *inputs: Any, **options: Any) -> StepResult:
        """Adapts on this batch and predicts it.

        Args:
            inputs: one batch, as the wrapped model takes it.
            trace: a keyword; also return gradients and the method's intermediates.
            keep: a keyword, for methods that mask tokens at random (BriMPR): the ids [B, K] of
                those that each modality keeps, in place of the draw.

        Returns:
            With a guard its ``.stats["reset"]``, 0-d bool, says whether the state was reset behind
            this batch.

        Raises:
            ValueError, TypeError: the inputs cannot be used; the state is as before.
        """
        trace, keep = options.pop("trace", False), options.pop("keep", None)
        self._refuse(options, "trace", "keep")
        prepared, drawn = self._prepare(inputs), None
        if keep is not None:
            drawn = self._step.draw(prepared, keep)
        if self._in_source:
            return self._unadapted(prepared, trace)
        self._warn_single(prepared)
        return self._adapt(prepared, trace=trace, drawn=drawn)

    def _refuse(self, options: Mapping[str, Any], *known: str) -> None:
        """Raises TypeError for a keyword that is none: models of images take others, so that the
        signatures allow any."""
        if options:
            names = ", ".join(self._step.model.input_names)
            also = f"; keywords: {', '.join(known)}" if known else ""
            raise TypeError(
                f"unexpected keyword {', '.join(options)}: inputs are given without names, in "
                f"the order {names}{also}"
            )

    def _unadapted(self, inputs: tuple[Tensor, ...], trace: bool) -> StepResult:
        """A step inside ``source()``."""
        self._ready()
        logits = self._step.predict(inputs)
        with torch.inference_mode(False):
            none = torch.zeros((), dtype=torch.int64, device=logits.device)
            return StepResult(
                logits=logits, logits_before=logits.clone(), n_used=none,
                grads={} if trace else None, trace={} if trace else None,
            )  # fmt: skip

    def _adapt(self, inputs: tuple[Tensor, ...], **given: Any) -> StepResult:
        return self._adapt_all((inputs,), **given)[0]

    @exclusive
    def _adapt_all(self, batches: Iterable[tuple[Tensor, ...]], **given: Any) -> list[StepResult]:
        """Steps on batches, all of them or none, and behind them the reset that the guard asks
        for."""
        self._ready()
        values, shifted, results = self._state.current.guard, False, []
        try:
            self._state.begin()
            for inputs in batches:
                result = self._step(inputs, **given)
                if self._guard is not None:
                    values, shifted = self._guard.after(values, result)
                    with torch.inference_mode(False):
                        result.stats["reset"] = torch.tensor(shifted, device=result.logits.device)
                results.append(result)
            if shifted:
                self._state.reset()
            else:
                self._state.commit(values)
        except BaseException:
            self._state.sync()
            raise
        return results

    def _ready(self) -> None:
        """Brings what calls run on to the state, where an interrupted call has left it apart."""
        self._wire()
        self._state.sync()

    def _wire(self) -> None:
        """Puts the source's weights, inside ``source()``, or the tuned ones where calls run."""
        source = self._in_source
        if self._wired == source:
            return
        self._wired = None
        for name, (module, leaf) in self._holders.items():
            weight = self._state.leaves[name]
            if source:
                value = self._step.model.source_value(self._state.source[name])
                weight = nn.Parameter(value, requires_grad=False)
            module._parameters[leaf] = weight
        self._wired = source

    @exclusive
    def predict(self, *inputs: Any, **options: Any) -> Any:
        """What a call returns, with the current state; adapts nothing."""
        self._refuse(options)
        self._ready()
        with self._outputs() as returned:
            return returned(self._step.predict(self._prepare(inputs)), -1)

    @contextlib.contextmanager
    def _outputs(self) -> Iterator[Callable[..., Any]]:
        """While it lasts, models that return more than logits keep what they return."""
        working = self._hidden[1]
        if not isinstance(working, ReturnsMore):
            yield lambda logits, number: logits
            return
        if working.rich and isinstance(self._step, GraphStep):
            raise ValueError(
                'engine="graph" returns logits, and this model returns more; call '
                'adapted.step(...).logits, or adapt with engine="eager"'
            )
        with surely(lambda: setattr(working, "outputs", None)):
            working.outputs = []
            yield working.returned

    @exclusive
    def _prepare(self, inputs: tuple) -> tuple[Tensor, ...]:
        """Checked inputs; the first batch also checks that the model was understood."""
        prepared = self._step.prepare(inputs)
        if (changed := self._watch.check()) is not None:
            self._known.compare_again()
            self._verified = False
        if not self._verified:
            with said_of(changed):
                verified = self._known.verify(prepared)
            if changed is not None and verified:
                self._watch.accept()
            method = self._step.method.fitted(self._known.model)  # to classes that are known now
            self.options = self._step.method = method
            self._verified = verified
        return prepared

    def stream(
        self, loader: Iterable, encode_batch: int | None = None, cache: Any = None
    ) -> Iterator[StepResult]:
        """Steps on every batch of a loader, in order, yielding a result each.

        Args:
            loader: yields one batch at a time as a tuple or list of the model's inputs (without
                labels), the input itself where there is one, or ``fasttta.data.Batch``. For a model
                on a GPU it may yield tensors in host memory; pinned ones it must not write to
                again before their result is there.
            encode_batch: samples that the frozen encoders take at a time, ahead of the steps that
                use them (on a GPU while the steps before run); None: as the batches come.
                Different batch shapes may change the numbers within float noise.
            cache: ``fasttta.data.FeatureCache``, where encoded features are looked for and kept.

        Methods that tune inside the encoders have nothing to encode ahead or to keep, and ignore
        both; so does a stream inside ``source()``.

        Returns:
            An iterator with the ``len`` of the loader, where that has one. Leaving it early loses
            no batch: of a loader that is an iterator itself, what was read ahead and not stepped
            on comes first in the next stream over that iterator, which any adapted model may make.

        Raises:
            ValueError, TypeError: a batch cannot be used; those before it have been adapted on, and
                the next stream over the same iterator begins behind it.
        """
        if encode_batch is not None and (not isinstance(encode_batch, int) or encode_batch < 1):
            raise ValueError(f"encode_batch={encode_batch!r}: needed a positive integer or None")
        if cache is not None and not hasattr(cache, "of"):
            raise TypeError(f"cache must be a fasttta.data.FeatureCache, found {cache!r}")
        if not self._step.method.frozen_encoder:
            encode_batch = cache = None
        kept = None if cache is None else cache.of(self._hidden[1], self.precision)
        return Stream(self._stream(loader, encode_batch, cache, kept), loader)

    def _lane(self) -> Lane | None:
        """What brings and encodes ahead of the steps, on a GPU."""
        device = self._step.device
        return Lane(device) if device.type == "cuda" else None

    def _stream(
        self, loader: Iterable, encode_batch: int | None, cache: Any, kept: Any
    ) -> Generator[StepResult]:
        lane, reader = self._lane(), Reader(loader)

        def read(batch: Any) -> tuple[tuple[Tensor, ...], list[str] | None]:
            named = getattr(batch, "_fields", None) == ("inputs", "ids")
            inputs = as_inputs(batch.inputs if named else batch)
            if lane is not None:
                inputs = tuple(lane.bring(x) if torch.is_tensor(x) else x for x in inputs)
            elif encode_batch:  # they wait for others: a loader may refill them
                inputs = tuple(copied(x) for x in inputs)
            reader.keep(batch._replace(inputs=inputs) if named else inputs)
            ids, inputs = batch.ids if named else None, self._prepare(inputs)
            return inputs, None if kept is None else kept.keys(inputs, ids)

        def batches() -> Iterator[tuple[tuple[Tensor, ...], list[str] | None]]:
            for batch in reader:
                try:
                    ready = read(batch)
                except Exception:
                    reader.refuse()
                    raise
                yield ready

        waiting = groups(batches(), encode_batch or 1)

        def make() -> tuple[list[tuple], Sequence[Tensor | None]] | None:
            group = next(waiting, None)
            if group is None:
                return None
            if self._in_source or not (encode_batch or kept):
                return group, [None] * len(group)
            try:
                return group, [*self._encode(group, encode_batch, kept)]
            except Exception:
                return group, [None] * len(group)  # one of them fails, at its turn

        def made() -> Iterator[tuple]:
            while True:
                found, done = (make(), None) if lane is None else lane.run(make)
                if found is None:
                    return
                yield *found, done

        def stepped(batch: tuple, features: Tensor | None) -> StepResult:
            inputs, _ = batch
            if self._in_source:
                return self.step(*inputs)
            if features is None and kept is not None:
                (features,) = self._encode([batch], encode_batch, kept)
            self._warn_single(inputs)
            return self._adapt(inputs, features=features)

        # without encode_batch a result does not wait for the next batch
        ahead = one_ahead if encode_batch and lane is not None else iter
        try:
            for group, features, done in ahead(made()):
                if lane is not None:
                    lane.receive(done, *features, *(x for inputs, _ in group for x in inputs))
                for batch, encoded in zip(group, features, strict=True):
                    if reader.ended:  # another stream over the same iterator has taken the rest
                        return
                    try:
                        result = stepped(batch, encoded)
                    except Exception:
                        reader.stepped()
                        raise
                    reader.stepped()
                    yield result
        finally:
            reader.close()
            if cache is not None:
                cache.flush()

    @exclusive
    @torch.inference_mode(False)
    @torch.no_grad()
    def _encode(self, group: list[tuple], size: int | None, kept: Any) -> list[Tensor]:
        """Features of several batches, encoded together ``size`` samples at a time (None: all)
        unless they are kept."""
        batches, keys = zip(*group, strict=True)
        joined = tuple(
            torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*batches, strict=True)
        )

        def encode(inputs: tuple[Tensor, ...]) -> Tensor:
            pieces = zip(*(x.split(size or len(x)) for x in inputs), strict=True)
            features = [self._step.encode(piece) for piece in pieces]
            return torch.cat(features) if len(features) > 1 else features[0]

        if kept is None:
            features = encode(joined)
        else:
            features = kept.features([key for part in keys for key in part], joined, encode)
        return list(features.split([len(inputs[0]) for inputs in batches]))

    def _warn_single(self, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].shape[0] > 1 or self._warned_single or self._state.method:
            return
        if message := self._step.method.single_sample:
            self._warned_single = True
            warn(message, UserWarning)

    # ------------------------------------------------------------------ state

    @property
    def tuned(self) -> dict[str, Tensor]:
        """Copies of what is adapted, by name."""
        with torch.inference_mode(False):
            return self._state.tuned()

    @exclusive
    def load_tuned(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets some or all of the tuned tensors; optimiser and method state stay. ``reset`` and a
        guard go back to what ``adapt`` made.

        Raises:
            ValueError, TypeError: an unknown name, wrong shape or type, non-finite values; then
                nothing is changed.
        """
        self._state.load_tuned(tensors)

    @exclusive
    def reset(self) -> None:
        """The state of a fresh ``adapt``, bit for bit."""
        self._state.reset()

    @contextlib.contextmanager
    def source(self) -> Iterator[Adapted]:
        """The untouched source model inside the block: calls predict with it and adapt nothing.
        Calls of other threads wait until the block ends."""
        with self._turn():
            if self._in_source:
                yield self
                return
            with surely(self._leave_source):
                self._in_source = True
                self._wire()
                yield self

    def _leave_source(self) -> None:
        self._in_source = False
        self._wire()

    def _state_now(self) -> Snapshot | Tensor:
        return self._state.current

    def _publish(self, state: Any) -> None:
        self._state.publish(state)

    def _saved(self) -> dict[str, Tensor]:
        return self._state.tensors()

    def _base(self) -> dict[str, Any]:
        return delta.fingerprint(self._known.model, self._state)

    def _guard_record(self) -> dict[str, Any] | None:
        if self._guard is None:
            return None
        values = {name: list(past) for name, past in self._state.current.guard.items()}
        return {**self._guard.settings(), "values": values}

    def _state_of(
        self, record: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> Snapshot | Tensor:
        delta.check_fingerprint(record["base"], self._known.model, self._state)
        values = {}
        if self._guard is not None:
            values = self._guard.check_values(record["guard"]["values"])
        step = self._step
        return restored(
            self._state, tensors, values, step.method, self._known.model, step.precision
        )

    @exclusive
    def unwrap(self, merge: bool = False) -> nn.Module:
        """A plain module: the user's own, or (merge) a copy of it with the adapted weights; where
        the method adds to the model (prompts) what it has no place for, a copy of what the method
        made of it. BriMPR's PromptVA has a place for prompts."""
        model, _, extended = self._hidden
        if not merge:
            return model
        self._watch.check()
        if extended is not None and self._known.merges(self._state.leaves):
            extended = None
        if extended is not None:
            model = extended
        with torch.inference_mode(False), torch.no_grad():
            try:
                merged = copy.deepcopy(model)
            except Exception as error:
                raise ValueError(
                    f"{type(model).__name__} cannot be copied, which merge=True needs: {error}"
                ) from error
            for name, value in self._state.parameters().items():
                if extended is None:
                    self._known.merge_into(merged, name, value)
                else:
                    merged.get_parameter(name).copy_(value)
        return merged

    # ------------------------------------------------------------------ nn.Module

    def _apply(self, fn, recurse: bool = True):
        # .to(), .cuda(), .half(): a no-op where nothing would change, else refused
        parameter = next(self._hidden[1].parameters())
        probe = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        moved = fn(probe)
        if moved.device != probe.device or moved.dtype != probe.dtype:
            raise RuntimeError(
                f"an adapted model stays on {probe.device} in its precision; move or convert the "
                "model first and call fasttta.adapt on it"
            )
        return self

    def extra_repr(self) -> str:
        tuned = sum(view.numel() for view in self._state.leaves.values())
        return f"{self.options}, precision={self.precision!r}, tuned={tuned:,} values"


def _refuse_tied(model: FusionModel, tuned: set[str]) -> None:
    """A tensor under several names would be adapted under one of them only."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter.data_ptr(), []).append(name)
    for same in names.values():
        if len(same) > 1 and tuned.intersection(same):
            raise ValueError(f"{' and '.join(same)} are one tensor (tied), which cannot be tuned")


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf
