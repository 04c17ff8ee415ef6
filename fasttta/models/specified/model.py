"""Any fusion transformer as methods see it, by a ModelSpec over the user's own forward."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import set_checkpoint_early_stop

from ... import trace
from ...protocols import FusionDefaults, Slot
from .attention_calls import Attended, plain_multihead
from .forward_pass import ForwardPass, record_pass
from .kept_results import KeptResults
from .outputs import logits_in, rebuilt, tensors
from .parts import Parts
from .projections import Projections, resolve, without_fast_path
from .score_checks import check_scores, hidden

_ANY = 16  # inputs that a forward(*args) may take
_PARTS = ("weight", "bias")


class _Learnt:
    """What the first batch shows of a model; all its copies share one object."""

    kept: KeptResults | None = None
    num_classes: int | None = None
    sequence_first: bool = False  # the projections' results are [T, B, H d]
    rich: bool = False  # the module returns more than logits
    crosses: bool = False  # queries and keys are of different tokens


class SpecifiedModel(FusionDefaults, nn.Module):
    """A user's module, cut and opened where a ModelSpec says. Its weights are the module's own.

    What is kept between ``encode`` and ``fuse`` is packed into one tensor [B, values].

    Raises:
        ValueError: the spec does not fit the module.
    """

    def __init__(self, module: nn.Module, spec: Parts) -> None:
        super().__init__()
        self.module = module
        self.spec = spec
        self.projections: tuple[Projections, ...] = resolve(module, spec)
        self.num_heads = self.projections[-1].num_heads
        self._refuse_keywords()
        self.compute_dtype: torch.dtype | None = None
        self.outputs: list[Any] | None = None
        self._learnt = _Learnt()

    @property
    def num_classes(self) -> int | None:
        """C, None before the first batch."""
        return self._learnt.num_classes

    @property
    def spans(self) -> tuple[int, ...]:
        """The number of tokens of each modality, in the order of the spec."""
        return tuple(stop - start for start, stop in self.spec.spans.values())

    @property
    def rich(self) -> bool:
        """Whether the module returns more than logits; False before the first batch."""
        return self._learnt.rich

    def identity(self) -> str:
        """What besides weights a saved state depends on."""
        encode = "functions" if self._pair else self.spec.encode
        return f"{self.projections} {self.spec.spans} {encode}"

    @property
    def _pair(self) -> tuple[Callable, Callable] | None:
        """The cut as two functions."""
        encode = self.spec.encode
        if encode and callable(encode[0]) and callable(encode[1]):
            return encode[0], encode[1]
        return None

    @property
    def _stop(self) -> int:
        return max(stop for _, stop in self.spec.spans.values())

    @property
    def input_names(self) -> tuple[str, ...]:
        """The names of the arguments of the module's forward."""
        return self._signature()[0]

    @property
    def required_inputs(self) -> int:
        """How many of them have no default."""
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

    def _refuse_keywords(self) -> None:
        parameters = inspect.signature(self.module.forward).parameters.values()
        by_name = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
        if by_name or not self.input_names:
            kind = type(self.module).__name__
            names = ", ".join(by_name) or ", ".join(p.name for p in parameters) or "none"
            raise ValueError(
                f"forward of {kind} takes inputs by keyword only ({names}), and an adapted model "
                "gives them in order; wrap it in a module whose forward takes them so: "
                "def forward(self, audio, video): return self.model(audio=audio, video=video)"
            )

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
        slots: dict[str, Slot] = {}
        if group == "fusion_qkv":
            for projections in self.projections:
                slots |= projections.slots(self.module)
        elif group == "norm":
            slots = self._norms(lambda path: True)
        elif group == "encoder_norm":
            names = tuple(n for n in self.spec.encode or () if isinstance(n, str))
            if not names:
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
        slots: dict[str, Slot] = {}
        for path, module in self.module.named_modules():
            kind = isinstance(module, (nn.LayerNorm, nn.GroupNorm)) or any(
                c.__name__.endswith(("RMSNorm", "LayerNorm")) for c in type(module).__mro__
            )
            if kind and wanted(path):
                # one that is computed (parametrised) is named too, to be refused and not dropped
                parts = [p for p in _PARTS if isinstance(getattr(module, p, None), Tensor)]
                slots |= {f"{path}.{part}": Slot(f"{path}.{part}") for part in parts}
        return slots

    def set_compute_dtype(self, dtype: torch.dtype | None) -> None:
        """Multiply in this precision (None: in the weights' own), by autocast."""
        self.compute_dtype = dtype

    @contextmanager
    def _running(self):
        device = next(self.parameters()).device.type
        cast = nullcontext()
        if self.compute_dtype is not None:
            # without its cache, which would outlive the update of a tuned weight
            cast = torch.autocast(device, dtype=self.compute_dtype, cache_enabled=False)
        # a checkpoint around kept results computes them anew in the backward: more tensors than the
        # forward saved, which is noticed only where it does not stop at their number
        with without_fast_path(), cast, set_checkpoint_early_stop(False):
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
        last, pair = self.projections[-1], self._pair
        attending = last.attending(self.module)
        with self._running(), torch.no_grad():
            if pair:
                tokens = [pair[0](self.module, *(x[:n].clone() for x in two)) for n in (1, 2)]
                run = functools.partial(pair[1], self.module)
                with attending:
                    for x in tokens:
                        seen = record_pass(self.module, run, (x,))
                output, kept = self.module(*two), None
            else:
                with attending:
                    kept, seen = KeptResults.find(
                        self.module,
                        two,
                        tuple(p.path for p in self.projections),
                        {name for p in self.projections for name in (p.modules or (p.path,))},
                        cast("tuple[str, ...] | None", self.spec.encode),
                    )
                output = seen.output
        self._learn_attention(attending.calls, seen, check)
        self._learnt.kept = kept
        return output

    def _learn_attention(self, calls: list[Attended], seen: ForwardPass, check: bool) -> None:
        """From the calls of passes over one sample, then over two."""
        last = self.projections[-1]
        calls = [call for call in calls if call.complete]
        if not calls:
            return
        two = calls[-1]
        if last.modules:
            # which axis grows is that of the batch
            one, q = calls[len(calls) // 2 - 1].parts[0].shape, two.parts[0].shape
            self._learnt.sequence_first = len(one) == 3 and one[0] == q[0] and one[1] != q[1]
        self._learnt.crosses = two.crosses()
        if not last.modules:
            if self._learnt.crosses:
                raise ValueError(
                    "fusion: this nn.MultiheadAttention is called with different queries and keys "
                    "(cross-attention); needed self-attention over the tokens of all modalities"
                )
            if any(bool(mask) for mask in two.hidden):
                raise ValueError(
                    "fusion: this nn.MultiheadAttention is called with a mask, under which "
                    "statistics of raw scores would count hidden tokens; needed attention over "
                    "all tokens"
                )
            if plain_multihead(self.module.get_submodule(last.path)):
                return
        if check and not self._learnt.crosses:
            check_scores(last, seen, *self._heads(two, 2))

    def encode(self, *inputs: Tensor) -> Tensor:
        """One batch -> what ``fuse`` needs of it, [B, values] (a pair of functions: as it says)."""
        if self._learnt.num_classes is None:
            self.learn(inputs)
        with trace.span("encode"), self._running():
            if self._pair:  # what it does in place must not reach the caller's inputs
                return self._pair[0](self.module, *(x.clone() for x in inputs))
            assert self._learnt.kept is not None  # learnt from the first batch
            return self._learnt.kept.encode(self.module, inputs)

    def _pass(self, features: Tensor) -> Tensor:
        """Logits of the fusion part, in the wider of their type and the weights'."""
        with ExitStack() as stack:
            if self._pair:
                output = self._pair[1](self.module, features.clone())
            else:
                assert self._learnt.kept is not None
                inputs = stack.enter_context(self._learnt.kept.put_back(self.module, features))
                output = self.module(*inputs)
        logits = self.own_logits(output)
        self._learnt.rich = output is not logits
        if self.outputs is not None:
            kept = {id(x): x.detach() for x in tensors(output)}
            theirs = kept.get(id(logits))
            self.outputs.append((len(features), theirs, rebuilt(output, lambda x: kept[id(x)])))
        return logits.to(torch.promote_types(logits.dtype, next(self.parameters()).dtype))

    def fuse_attention(self, features: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, float]]:
        """Features -> logits [B, C] and (q [B,H,T,d], k, scale) over the tokens of all spans.

        Raises:
            ValueError: queries and keys are of different tokens, or a mask hides some of them.
                (On a GPU all results of such a batch are NaN: the step skips its update.)
        """
        last = self.projections[-1]
        attending = last.attending(self.module)
        with trace.span("fuse"), self._running(), attending:
            logits = self._pass(features)
            calls = [call for call in attending.calls if call.complete]
            heads = self._heads(calls[-1], len(features)) if calls else None
        if heads is None:
            names = ", ".join(last.modules) or last.path
            raise ValueError(
                f"{names} was not called by the fusion part: does {last.path} use its weights "
                "without calling it? Needed projections that are called as modules"
            )
        if self._learnt.crosses:
            raise ValueError(
                f"{last.path} projects queries and keys of different tokens (cross-attention), so "
                "that its scores have no self-attention blocks; needed attention over the tokens "
                "of all modalities, or a method that needs no scores (read, tent, eata, source)"
            )
        flag = hidden(last, calls[-1], *heads)
        q, k, scale = self._of_spans(*heads)
        if flag.device.type != "cpu":  # not asked for, which would wait for the device
            logits, q, k = (torch.where(flag, torch.nan, x) for x in (logits, q, k))
        return logits, (q, k, scale)

    def fuse(self, features: Tensor) -> Tensor:
        """Features -> logits [B, C]."""
        with trace.span("fuse"), self._running():
            return self._pass(features)

    @property
    def _sequence_first(self) -> bool:
        return bool(self.projections[-1].modules) and self._learnt.sequence_first

    def _heads(self, call: Attended, batch: int) -> tuple[Tensor, Tensor]:
        """q and k of a call, [B, H, T, d]."""
        last = self.projections[-1]
        q, k = (
            last.heads(x, batch, self._stop, self._sequence_first)
            for x in call.projected(len(last.modules) == 1)
        )
        return q, k

    def _of_spans(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, float]:
        """q and k [B, H, T, d] of the spans' tokens, in their order, and the scale."""
        last, spans = self.projections[-1], list(self.spec.spans.values())
        joined = all(a[1] == b[0] for a, b in itertools.pairwise(spans))
        if joined:
            q, k = (x[:, :, spans[0][0] : spans[-1][1]] for x in (q, k))
        else:
            q, k = (torch.cat([x[:, :, a:b] for a, b in spans], dim=2) for x in (q, k))
        return q, k, q.shape[-1] ** -0.5 if last.scale is None else last.scale

    def own_logits(self, output: Any) -> Tensor:
        """The logits [B, C] in what the module returned.

        Raises:
            ValueError: there are none where the spec says.
        """
        logits = logits_in(output, self.spec.logits)
        self._learnt.num_classes = logits.shape[1]
        return logits

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
