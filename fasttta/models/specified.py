"""Any fusion transformer as methods see it, by a ModelSpec over the user's own forward."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..protocols import Slot
from ..trace import span
from .projections import Projections, resolve, without_fast_path
from .replay import Replay
from .scores import check_scores
from .spec import ModelSpec
from .trees import described, rebuilt, tensors
from .watch import watch

_ANY = 16  # inputs that a forward(*args) may take
_PARTS = ("weight", "bias")


class _Found:
    """What the first batch tells; one object for all copies of a model."""

    replay: Replay | None = None
    num_classes: int | None = None
    sequence_first: bool = False  # the projections' results are [T, B, H d]
    rich: bool = False  # the module returns more than logits


class SpecifiedModel(nn.Module):
    """A user's module, cut and opened where a ModelSpec says. Its weights are the module's own.

    What is kept between ``encode`` and ``fuse`` is packed into one tensor [B, values].

    Raises:
        ValueError: the spec does not fit the module.
    """

    def __init__(self, module: nn.Module, spec: ModelSpec) -> None:
        super().__init__()
        self.module = module
        self.spec = spec
        self.projections: tuple[Projections, ...] = resolve(module, spec)
        self.num_heads = self.projections[-1].num_heads
        self.compute_dtype: torch.dtype | None = None
        self.outputs: list[Any] | None = None
        self._found = _Found()

    # ------------------------------------------------------------------ protocol

    @property
    def num_classes(self) -> int | None:
        """C, None before the first batch."""
        return self._found.num_classes

    @property
    def spans(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.spec.spans.values())

    @property
    def rich(self) -> bool:
        """Whether the module returns more than logits; False before the first batch."""
        return self._found.rich

    def identity(self) -> str:
        """What besides weights a saved state depends on."""
        encode = "functions" if self._pair else self.spec.encode
        return f"{self.projections} {self.spec.spans} {encode}"

    @property
    def _pair(self) -> tuple[Callable, Callable] | None:
        """The cut as two functions."""
        encode = self.spec.encode
        return encode if encode and callable(encode[0]) else None

    @property
    def _stop(self) -> int:
        return max(stop for _, stop in self.spec.spans.values())

    @property
    def input_names(self) -> tuple[str, ...]:
        return self._signature()[0]

    @property
    def required_inputs(self) -> int:
        return self._signature()[1]

    def _signature(self) -> tuple[tuple[str, ...], int]:
        parameters = inspect.signature(self.module.forward).parameters.values()
        named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        required = sum(p.default is p.empty for p in named)
        names = [p.name for p in named]
        if any(p.kind is p.VAR_POSITIONAL for p in parameters):
            names += [f"input {i}" for i in range(len(names), _ANY)]
            required = max(1, required)
        return tuple(names), required

    def check_inputs(self, *inputs: Tensor) -> None:
        """Raises unless the inputs are tensors with one batch dimension on the model's device."""
        device = next(self.parameters()).device
        first = None
        for name, x in zip(self.input_names, inputs, strict=False):
            if not isinstance(x, Tensor):
                raise TypeError(f"{name} must be a tensor [B, ...], found {type(x).__name__}")
            if x.ndim == 0 or x.shape[0] == 0:
                raise ValueError(f"{name} needs at least one sample, found shape {tuple(x.shape)}")
            if x.device != device:
                raise ValueError(
                    f"{name} is on {x.device}, the model on {device}; move one: "
                    f"{name}.to({str(device)!r})"
                )
            first = first or (name, x.shape[0])
            if x.shape[0] != first[1]:
                raise ValueError(
                    f"{first[0]} has {first[1]} samples, {name} {x.shape[0]}; needed equal batches"
                )

    def tunable(self, group: str) -> dict[str, Slot]:
        """What a method may tune, by its name in the user's module.

        ``"fusion_qkv"``: the projections of the fusion modules. ``"norm"``: LayerNorm, GroupNorm
        and RMSNorm weights (BatchNorm keeps its source statistics and is left out).
        ``"encoder_norm"``: of those, the ones in the modules that ``encode`` names, in blocks 0
        to 8 where these are numbered.
        """
        if group == "fusion_qkv":
            slots = {}
            for projections in self.projections:
                slots |= projections.slots(self.module)
        elif group == "norm":
            slots = self._norms(lambda path: True)
        elif group == "encoder_norm":
            names = self.spec.encode or ()
            if not names or not all(isinstance(n, str) for n in names):
                raise ValueError(
                    "this method tunes the encoders' normalisation layers, and the spec does not "
                    'name the encoders; add them: ModelSpec(..., encode=("audio_encoder", ...))'
                )
            slots = self._norms(lambda path: _early(path, names))
        else:
            raise ValueError(
                f'group={group!r} is unknown; known: "norm", "encoder_norm", "fusion_qkv"'
            )
        return {name: Slot(f"module.{s.parameter}", s.rows) for name, s in slots.items()}

    def _norms(self, wanted) -> dict[str, Slot]:
        slots = {}
        for path, module in self.module.named_modules():
            kind = isinstance(module, (nn.LayerNorm, nn.GroupNorm)) or any(
                c.__name__.endswith(("RMSNorm", "LayerNorm")) for c in type(module).__mro__
            )
            if kind and wanted(path):
                names = [
                    f"{path}.{part}" for part in _PARTS if module._parameters.get(part) is not None
                ]
                slots |= {name: Slot(name) for name in names}
        return slots

    def set_compute_dtype(self, dtype: torch.dtype | None) -> None:
        """Multiply in this precision (None: in the weights' own), by autocast."""
        self.compute_dtype = dtype

    # ------------------------------------------------------------------ computation

    @contextmanager
    def _running(self):
        device = next(self.parameters()).device.type
        cast = nullcontext()
        if self.compute_dtype is not None:
            # without its cache, which would outlive the update of a tuned weight
            cast = torch.autocast(device, dtype=self.compute_dtype, cache_enabled=False)
        with without_fast_path(), cast:
            yield

    def learn(self, inputs: tuple[Tensor, ...], check: bool = False) -> Any:
        """Watches passes over two samples, once; later calls follow what was seen.

        Args:
            inputs: one batch; its first two samples are used (one is taken twice).
            check: also compare the projections with the scores that the fusion module computes
                (in float64).

        Returns:
            What the module's own forward returned for the two.

        Raises:
            ValueError: the spec does not fit what was seen.
        """
        two = tuple(torch.cat((x, x)) if len(x) == 1 else x[:2].clone() for x in inputs)
        captured: list[tuple[Tensor, Tensor]] = []
        last, pair = self.projections[-1], self._pair
        with self._running(), torch.no_grad():
            capture = last.capture(self.module, captured) if last.modules else nullcontext()
            if pair:
                tokens = [pair[0](self.module, *(x[:n].clone() for x in two)) for n in (1, 2)]
                run = functools.partial(pair[1], self.module)
                with capture:
                    for x in tokens:
                        seen = watch(self.module, run, (x,))
                output, replay = self.module(*two), None
            else:
                with capture:
                    replay, seen = Replay.find(
                        self.module,
                        two,
                        tuple(p.path for p in self.projections),
                        {name for p in self.projections for name in (p.modules or (p.path,))},
                        self.spec.encode,
                    )
                output = seen.output
        if captured:
            # of one sample, then of two: which axis grows is that of the batch
            one, q = (captured[i][0].shape for i in (len(captured) // 2 - 1, -1))
            self._found.sequence_first = len(one) == 3 and one[0] == q[0] and one[1] != q[1]
        if captured and check:
            heads = [last.heads(x, 2, self._stop, self._found.sequence_first) for x in captured[-1]]
            check_scores(last, seen, *heads)
        self._found.replay = replay
        return output

    def encode(self, *inputs: Tensor) -> Tensor:
        """One batch -> what ``fuse`` needs of it, [B, values] (a pair of functions: as it says)."""
        if self._found.num_classes is None:
            self.learn(inputs)
        with span("encode"), self._running():
            if self._pair:  # what it does in place must not reach the caller's inputs
                return self._pair[0](self.module, *(x.clone() for x in inputs))
            return self._found.replay.encode(self.module, inputs)

    def fuse_attention(self, features: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, float]]:
        """Features -> logits [B, C] and (q [B,H,T,d], k, scale) over the tokens of all spans."""
        found: list[tuple[Tensor, Tensor]] = []
        with span("fuse"), self._running(), ExitStack() as stack:
            captured = None
            for projections in self.projections:
                captured = [] if projections is self.projections[-1] else found
                stack.enter_context(projections.capture(self.module, captured))
            if self._pair:
                output = self._pair[1](self.module, features.clone())
            else:
                inputs = stack.enter_context(self._found.replay.given(self.module, features))
                output = self.module(*inputs)
        if not captured:
            raise ValueError(f"{self.projections[-1].path} was not called by the fusion part")
        logits = self._logits(output)
        self._found.rich = output is not logits
        if self.outputs is not None:
            kept = {id(x): x.detach() for x in tensors(output)}
            theirs = kept.get(id(logits))
            self.outputs.append((len(features), theirs, rebuilt(output, lambda x: kept[id(x)])))
        logits = logits.to(torch.promote_types(logits.dtype, next(self.parameters()).dtype))
        return logits, self._attention(*captured[-1], len(features))

    def fuse(self, features: Tensor) -> Tensor:
        """Features -> logits [B, C]."""
        return self.fuse_attention(features)[0]

    def _attention(self, q: Tensor, k: Tensor, batch: int) -> tuple[Tensor, Tensor, float]:
        last, spans = self.projections[-1], list(self.spec.spans.values())
        sequence_first = bool(last.modules) and self._found.sequence_first
        q, k = (last.heads(x, batch, self._stop, sequence_first) for x in (q, k))
        joined = all(a[1] == b[0] for a, b in itertools.pairwise(spans))
        if joined:
            q, k = (x[:, :, spans[0][0] : spans[-1][1]] for x in (q, k))
        else:
            q, k = (torch.cat([x[:, :, a:b] for a, b in spans], dim=2) for x in (q, k))
        return q, k, q.shape[-1] ** -0.5 if last.scale is None else last.scale

    def _logits(self, output: Any) -> Tensor:
        where = self.spec.logits
        try:
            if callable(where):
                logits = where(output)
            elif isinstance(where, str):
                keyed = isinstance(output, dict) and where in output
                logits = output[where] if keyed else getattr(output, where)
            elif where is not None:
                logits = output[where]
            elif isinstance(output, (tuple, list)) and not hasattr(output, "logits"):
                logits = output[0]
            elif isinstance(output, dict) and "logits" in output:
                logits = output["logits"]
            else:
                logits = getattr(output, "logits", output)
        except (KeyError, IndexError, AttributeError, TypeError) as error:
            raise ValueError(
                f"logits={where!r} does not fit what the model returns, {described(output)}: "
                f"{error}"
            ) from error
        if not isinstance(logits, Tensor) or logits.ndim != 2 or not logits.is_floating_point():
            raise ValueError(
                f"needed logits [B, C], found {described(logits)} in {described(output)}; say "
                'where they are: ModelSpec(..., logits="key"), an index, or a function of it'
            )
        self._found.num_classes = logits.shape[1]
        return logits

    def own_logits(self, output: Any) -> Tensor:
        """The logits in what the module returned."""
        return self._logits(output)

    # ------------------------------------------------------------------ what the module returns

    def returned(self, logits: Tensor, number: int) -> Any:
        """What the module returned, as it returns it, for the prediction ``logits`` [B, C].

        Args:
            number: of the pass that made it (or ended with it), since ``outputs`` was set to [].
        """
        if not self.outputs:
            return logits
        samples, theirs, output = self.outputs[number]

        def fresh(x: Tensor) -> Tensor:
            if x is theirs:
                return logits
            x = x.detach()
            # a pass over a window of batches ends with the current one
            return (x[-len(logits) :] if x.ndim and len(x) == samples else x).clone()

        return rebuilt(output, fresh)


def _early(path: str, encoders: tuple[str, ...]) -> bool:
    for name in encoders:
        if path.startswith(name + "."):
            numbers = [int(x) for x in path[len(name) + 1 :].split(".") if x.isdigit()]
            return not numbers or numbers[0] < 9
    return False
