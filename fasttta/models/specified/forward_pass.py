"""A record of one forward pass: which submodules ran when, and who used their results."""

from __future__ import annotations

from collections.abc import Callable, Set
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .attention_calls import SOFTMAX
from .outputs import tensors

# asking a tensor for these reads none of its values
_METADATA = {
    "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_cpu", "is_leaf",
    "is_nested", "is_sparse", "is_quantized", "is_meta", "is_mps", "itemsize", "nbytes", "names",
}  # fmt: skip
_QUESTIONS = {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_floating_point,
    Tensor.is_complex, Tensor.is_contiguous, Tensor.__len__, Tensor.get_device,
}  # fmt: skip


@dataclass(eq=False)
class Call:
    """One call of a submodule: its ``index``-th in the pass, from event ``start`` to ``stop``."""

    name: str
    index: int
    start: int
    stack: tuple[Call, ...]
    stop: int | None = None
    output: Any = None
    versions: tuple[int, ...] = ()  # of the output's tensors; in-place changes count them up


@dataclass(eq=False)
class ForwardPass(TorchFunctionMode):
    """One forward pass of a module, while it runs and afterwards.

    Attributes:
        calls: of all submodules, in order of their start.
        uses: (calls that were going on, identities of the ``tensors`` that a torch function took).
        tensors: the inputs and all calls' results by identity; they live as long as this.
        scores: (calls that were going on, the function, its arguments) of softmaxes and fused
            attention.
        output: what the module returned.
    """

    calls: list[Call] = field(default_factory=list)
    uses: list[tuple[tuple[Call, ...], set[int]]] = field(default_factory=list)
    tensors: dict[int, Tensor] = field(default_factory=dict)
    scores: list[tuple[tuple[Call, ...], Any, tuple, dict]] = field(default_factory=list)
    output: Any = None
    stack: tuple[Call, ...] = ()
    clock: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(getattr(func, "__self__", None), "__name__", "")
        if func not in _QUESTIONS and not (func.__name__ == "__get__" and name in _METADATA):
            used = {id(x) for x in tensors((args, kwargs)) if self.tensors.get(id(x)) is x}
            if used:
                self.uses.append((self.stack, used))
        if func in SOFTMAX or func is nnf.scaled_dot_product_attention:
            self.scores.append((self.stack, func, args, kwargs))
        return func(*args, **kwargs)

    def _start(self, name: str, counts: dict[str, int]):
        def hook(_module, _inputs):
            call = Call(name, counts.get(name, 0), self.clock, self.stack)
            counts[name] = call.index + 1
            self.clock += 1
            self.calls.append(call)
            self.stack = (*self.stack, call)

        return hook

    def _stop(self, _module, _inputs, output):
        call = self.stack[-1]
        call.stop, call.output = self.clock, output
        call.versions = tuple(x._version for x in tensors(output))
        self.tensors |= {id(x): x for x in tensors(output)}
        self.clock += 1
        self.stack = self.stack[:-1]

    def used(self, skipped: set[Call], output: Any) -> set[int]:
        """Identities of tensors whose values are used outside the skipped calls."""
        used = {id(x) for x in tensors(output)}
        for stack, identities in self.uses:
            if not skipped.intersection(stack):
                used |= identities
        return used


def record_pass(
    module: nn.Module, run: Callable[..., Any], inputs: tuple[Tensor, ...]
) -> ForwardPass:
    """Runs ``run``, the module or what calls it, on inputs once, without gradients, and records the
    pass."""
    seen = ForwardPass(tensors={id(x): x for x in inputs})
    counts: dict[str, int] = {}
    with ExitStack() as hooks, torch.no_grad():
        for name, child in module.named_modules():
            if name:
                for handle in (
                    child.register_forward_pre_hook(seen._start(name, counts)),
                    child.register_forward_hook(seen._stop),
                ):
                    hooks.callback(handle.remove)
        with seen:
            seen.output = run(*inputs)
    return seen


def cut(seen: ForwardPass, fusion: tuple[str, ...]) -> int:
    """When the block starts that holds the first call of a fusion module; when that call itself
    does, if nothing has returned before the block.

    Raises:
        ValueError: no fusion module was called.
    """
    for call in seen.calls:
        if call.name in fusion:
            block = call.stack[-1].start if call.stack else call.start
            before = any(c.stop is not None and c.stop < block for c in seen.calls)
            return block if before else call.start
    raise ValueError(
        f"fusion: {', '.join(fusion)} is not called in the model's forward; is it another branch?"
    )


def finished(
    seen: ForwardPass,
    time: int,
    keep: set[str],
    names: tuple[str, ...] | None,
    without: Set[tuple[str, int]] = frozenset(),
) -> list[Call]:
    """The outermost calls that had returned by a time, without those of modules in ``keep`` and
    of modules that hold these.

    Args:
        names: only these modules' calls; None: all.
        without: (name, index) of calls to look into, and not to choose themselves.

    Raises:
        ValueError: a module of ``names`` was not called, or not before that time.
    """
    chosen: list[Call] = []
    for call in seen.calls:
        around = [call, *(c for c in call.stack if (c.name, c.index) in without)]
        wanted = (call.name, call.index) not in without and (
            names is None or any(c.name in names for c in around)
        )
        held = any(k == call.name or k.startswith(call.name + ".") for k in keep)
        stop = call.stop
        if held or not wanted or stop is None or not stop < time:
            continue
        if not any(c.start < call.start and stop < (c.stop or 0) for c in chosen):
            chosen.append(call)
    for name in names or ():
        calls = [c for c in seen.calls if c.name == name]
        if not calls or any(c.stop is None or c.stop >= time for c in calls):
            when = "still running, or called, after the fusion started" if calls else "not called"
            raise ValueError(
                f"encode: {name} is {when}; needed modules that have returned when the fusion "
                "starts"
            )
    return chosen
