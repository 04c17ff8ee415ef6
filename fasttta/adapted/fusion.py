"""A fusion model, of audio and video or other modalities, or a head over features, that adapts."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..engine import record as records
from ..engine.graph import GraphStep
from ..engine.interrupts import surely
from ..engine.precision import Precision, working_copy
from ..engine.result import StepResult, warn
from ..engine.shift_detector import Guard
from ..engine.state import Snapshot, State, restored
from ..engine.step import Step
from ..engine.streaming import Lane, Pipeline, as_inputs, copied
from ..families import FusionFamily
from ..methods.base import Method, WeightedMethod, runs_episodes
from ..methods.special_bases import DrawingMethod, ExtendingMethod
from ..protocols import FusionModel, ReturnsMore
from .base import Adapted, exclusive


class AdaptedFusion(Adapted):
    """A fusion model, adapting to what it is called on. Made by ``fasttta.adapt``; see
    ``fasttta.Adapted``."""

    _family: FusionFamily

    def __init__(
        self,
        model: nn.Module,
        family: FusionFamily,
        method: Method,
        precision: Precision,
        *,
        engine: str,
        seed: int,
        constants: Mapping[str, Tensor],
        guard: Guard | None = None,
        verify_model: str = "first",
    ) -> None:
        source = family.model
        method = method.fitted(source)
        if guard is not None and runs_episodes(method):
            raise ValueError(
                f"guard: {method.name!r} begins every image anew, so that there is nothing to reset"
            )
        with torch.inference_mode(False):
            fusion = source
            if isinstance(method, ExtendingMethod):
                fusion = method.extend(source, seed)
        device = next(fusion.parameters()).device
        slots = method.tuned(fusion)
        if method.group is not None and not slots:
            raise ValueError(
                f"{type(method).__name__} finds nothing to tune in this model (it looks for "
                f"{method.group}); fasttta inspect shows what each method would tune"
            )
        names = {slot.parameter for slot in slots.values()}
        _refuse_tied(fusion, names)
        with torch.inference_mode(False), torch.no_grad():
            working, leaves = working_copy(fusion, names, precision)
            fixed = {
                name: x.detach().to(device=device, dtype=precision.master, copy=True)
                for name, x in constants.items()
            }
            state = State(leaves, slots, method, fixed, seed)
        if fusion is source:
            family.tuned = frozenset(state.leaves)
            family.all_used = method.group == "fusion_qkv"
        super().__init__(
            model, cast(nn.Module, working), family, method, precision,
            engine=engine, seed=seed, guard=guard, verify_model=verify_model,
            extended=None if fusion is source else cast(nn.Module, fusion),
            copies=family.copied_parameters(model),
        )  # fmt: skip
        self._state = state
        self._holders = {name: _owner(self._hidden[1], name) for name in leaves}
        self._wired: bool | None = False  # the weights that calls run: the source's; None: neither

    @functools.cached_property
    def _step(self) -> Step:
        """What runs the method on the model; made when the first batch comes."""
        working: Any = self._hidden[1]
        device = next(working.parameters()).device
        parts = working, self.options, self._state, self._numbers, device
        if self.engine == "graph":
            return GraphStep(*parts, False, falls_back=self._asked == "auto")
        return Step(*parts, device.type != "cuda")

    @exclusive
    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Adapts on this batch and predicts it: logits [B, C], or what the wrapped model returns
        where that is more (tuple, dict, ModelOutput), with the prediction's logits in it."""
        self._refuse(options)
        prepared = self._prepare(inputs)
        with self._outputs() as returned:
            logits = self._step_on(prepared).logits
            before = self._step.method.score_at == "before" and not self._in_source
            return returned(logits, self._step.first_passes - 1 if before else -1)

    @exclusive
    def step(self, *inputs: Any, **options: Any) -> StepResult:
        """Adapts on this batch and predicts it.

        Args:
            inputs: one batch, as the wrapped model takes it.
            trace: a keyword; also return gradients and the method's intermediates.
            keep: a keyword, for methods that mask tokens at random (BriMPR): the ids [B, K] of
                those that each modality keeps, in place of random ones.

        Returns:
            With a guard its ``.stats["reset"]``, 0-d bool, says whether the state was reset after
            this batch.

        Raises:
            ValueError, TypeError: the inputs cannot be used; the state is as before.
        """
        trace, keep = options.pop("trace", False), options.pop("keep", None)
        self._refuse(options, "trace", "keep")
        prepared, drawn = self._prepare(inputs), None
        if keep is not None:
            if not isinstance(self.options, DrawingMethod):
                kind = type(self.options).__name__
                raise TypeError(f"keep: {kind} masks no tokens; only brimpr does")
            drawn = self._step.draw(prepared, keep)
        return self._step_on(prepared, trace=trace, drawn=drawn)

    @exclusive
    def predict(self, *inputs: Any, **options: Any) -> Any:
        """What a call returns, with the current state; adapts nothing."""
        self._refuse(options)
        self._ready()
        with self._outputs() as returned:
            return returned(self._step.predict(self._prepare(inputs)), -1)

    def _refuse(self, options: Mapping[str, Any], *keywords: str) -> None:
        """Raises TypeError for an unexpected keyword. The signatures allow any, because models of
        images take others."""
        if options:
            names = ", ".join(self._step.model.input_names)
            also = f"; keywords: {', '.join(keywords)}" if keywords else ""
            raise TypeError(
                f"unexpected keyword {', '.join(options)}: inputs are given without names, in "
                f"the order {names}{also}"
            )

    def _prepare(self, inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """Checked inputs; the first batch also checks that fasttta's model computes the user's."""
        prepared = self._step.prepare(inputs)

        def compare() -> bool:
            verified = self._family.verify(prepared)
            # the first batch has shown the number of classes
            self.options = self._step.method = self._step.method.fitted(self._family.model)
            return verified

        self._verify(compare)
        return prepared

    def _step_on(self, inputs: tuple[Tensor, ...], **options: Any) -> StepResult:
        """A step on prepared inputs; inside ``source()`` only their prediction."""
        if self._in_source:
            return self._unadapted(inputs, options.get("trace", False))
        alone = inputs[0].shape[0] == 1 and not (self._warned_single or self._state.method)
        method = self._step.method
        if alone and isinstance(method, WeightedMethod) and (message := method.single_sample()):
            self._warned_single = True
            warn(message, UserWarning)
        return self._adapt(inputs, **options)

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

    def _adapt(self, inputs: tuple[Tensor, ...], **options: Any) -> StepResult:
        return self._adapt_all((inputs,), **options)[0]

    def _adapt_all(self, batches: Iterable[tuple[Tensor, ...]], **options: Any) -> list[StepResult]:
        """Steps on all of the batches or on none, then resets if the guard asks for it."""
        self._ready()
        values, shifted, results = self._state.current.guard, False, []
        try:
            self._state.begin()
            for inputs in batches:
                result = self._step(inputs, **options)
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
        source = self._in_source
        if self._wired != source:
            self._wired = None
            for name, (module, leaf) in self._holders.items():
                weight = self._state.leaves[name]
                if source:
                    value = self._step.model.source_value(self._state.source[name])
                    weight = nn.Parameter(value, requires_grad=False)
                module._parameters[leaf] = weight
            self._wired = source
        self._state.sync()

    @contextlib.contextmanager
    def _outputs(self) -> Iterator[Callable[..., Any]]:
        """Inside the block, models that return more than logits record what they return."""
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

    def _pipeline(self, encode_batch: int | None, cache: Any) -> Pipeline:
        if encode_batch is not None and (not isinstance(encode_batch, int) or encode_batch < 1):
            raise ValueError(f"encode_batch={encode_batch!r}: needed a positive integer or None")
        if cache is not None and not hasattr(cache, "of"):
            raise TypeError(f"cache must be a fasttta.data.FeatureCache, found {cache!r}")
        if not self._step.method.frozen_encoder:
            encode_batch = cache = None
        features = None if cache is None else cache.of(self._hidden[1], self.precision)
        lane = self._lane()

        def bring(batch: Any) -> Any:
            named = _has_ids(batch)
            inputs = as_inputs(batch.inputs if named else batch)
            if lane is not None:
                inputs = tuple(lane.bring(x) if torch.is_tensor(x) else x for x in inputs)
            elif encode_batch:
                # clone batches that wait for their group: the loader may reuse its buffers
                inputs = tuple(copied(x) for x in inputs)
            return batch._replace(inputs=inputs) if named else inputs

        def read(batch: Any) -> tuple[tuple[Tensor, ...], list[str] | None]:
            ids, inputs = (batch.ids, batch.inputs) if _has_ids(batch) else (None, batch)
            with self._lock():
                prepared = self._prepare(inputs)
            return prepared, None if features is None else features.keys(prepared, ids)

        def encode(group: list[Any]) -> list[Tensor | None]:
            if self._in_source or not (encode_batch or features):
                return [None] * len(group)
            return [*self._encode(group, encode_batch, features)]

        def step(batch: Any, encoded: Tensor | None) -> StepResult:
            inputs, _ = batch
            if encoded is None and features is not None and not self._in_source:
                (encoded,) = self._encode([batch], encode_batch, features)
            with self._lock():
                return self._step_on(inputs, features=encoded)

        return Pipeline(
            step, read, bring, encode, samples=lambda batch: len(batch[0][0]),
            size=encode_batch or 1, lane=lane, end=lambda: None if cache is None else cache.flush(),
        )  # fmt: skip

    def _lane(self) -> Lane | None:
        """The side stream of a GPU on which batches are copied and encoded ahead of the steps."""
        device = self._step.device
        return Lane(device) if device.type == "cuda" else None

    @exclusive
    @torch.inference_mode(False)
    @torch.no_grad()
    def _encode(self, group: list[tuple], size: int | None, cached: Any) -> list[Tensor]:
        """Features of several batches, encoded together ``size`` samples at a time (None: all)
        unless they are cached."""
        batches, keys = zip(*group, strict=True)
        joined = tuple(
            torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*batches, strict=True)
        )

        def encode(inputs: tuple[Tensor, ...]) -> Tensor:
            pieces = zip(*(x.split(size or len(x)) for x in inputs), strict=True)
            features = [self._step.encode(piece) for piece in pieces]
            return torch.cat(features) if len(features) > 1 else features[0]

        if cached is None:
            features = encode(joined)
        else:
            features = cached.features([key for part in keys for key in part], joined, encode)
        return list(features.split([len(inputs[0]) for inputs in batches]))

    @property
    def tuned(self) -> dict[str, Tensor]:
        """Copies of what is adapted, by name."""
        with torch.inference_mode(False):
            return self._state.tuned()

    def _state_now(self) -> Snapshot:
        return self._state.current

    def _first_state(self) -> Snapshot:
        return self._state.fresh()

    def _with_tuned(self, values: Mapping[str, Tensor]) -> Snapshot:
        return self._state.with_tuned(values)

    def _publish(self, state: Snapshot) -> None:
        self._state.publish(state)

    def _saved(self) -> dict[str, Tensor]:
        return self._state.tensors()

    def _base(self) -> dict[str, Any]:
        return records.fingerprint(self._family.model, self._state.source)

    def _guard_record(self) -> dict[str, Any] | None:
        if self._guard is None:
            return None
        values = {name: list(past) for name, past in self._state.current.guard.items()}
        return {**self._guard.settings(), "values": values}

    def _state_of(self, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Snapshot:
        source, values = self._family.model, {}
        records.check_fingerprint(record["base"], source, self._state.source)
        if self._guard is not None:
            values = self._guard.check_values(record["guard"]["values"])
        step = self._step
        return restored(self._state, tensors, values, step.method, source, self._numbers)

    def _merged(self) -> nn.Module:
        model, _, extended = self._hidden
        self._watch.check()
        if extended is not None and self._family.merges(self._state.leaves):
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
                    self._family.merge_into(merged, name, value)
                else:
                    merged.get_parameter(name).copy_(value)
        return merged

    def extra_repr(self) -> str:
        """The method's options, the precision and the count of tuned values, for ``print``."""
        tuned = sum(view.numel() for view in self._state.leaves.values())
        return f"{self.options}, precision={self.precision!r}, tuned={tuned:,} values"


def _has_ids(batch: Any) -> bool:
    """Whether a batch is a ``fasttta.data.Batch``."""
    return getattr(batch, "_fields", None) == ("inputs", "ids")


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
