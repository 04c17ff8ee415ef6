"""The calls of a fusion attention: their queries, keys and scores, and whether a mask hides any."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .outputs import tensors

SOFTMAX = {nnf.softmax, torch.softmax, Tensor.softmax, torch.special.softmax}
_FUSED = nnf.scaled_dot_product_attention
_FUSED_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


@dataclass
class Softmax:
    """What is kept of the scores that a module gives to its softmax, [.., T, T].

    Attributes:
        shape, dtype: of the scores.
        rows: their sum (float32 or wider) or minimum (half precision) over keys, [.., T].
    """

    shape: torch.Size
    dtype: torch.dtype
    rows: Tensor


@dataclass
class Attended:
    """One call of a fusion attention.

    Attributes:
        parts: what its projections gave, by their number; of an nn.MultiheadAttention empty.
        inputs: inputs of the projections of queries and keys, by the projection's number.
        module: the nn.MultiheadAttention, whose queries and keys are projected a second time.
        hidden: 0-d bool tensors, or bools: whether a mask hides something.
        seen: how many times the call gave scores to a softmax or to fused attention.
        softmax: the scores among them that are tensors.
    """

    parts: dict[int, Tensor] = field(default_factory=dict)
    inputs: dict[int, Tensor] = field(default_factory=dict)
    module: nn.MultiheadAttention | None = None
    hidden: list[Tensor | bool] = field(default_factory=list)
    seen: int = 0
    softmax: list[Softmax] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether the call's queries and keys were recorded."""
        return self.module is not None or len(self.parts) == 1 or {0, 1} <= self.parts.keys()

    def projected(self, packed: bool) -> tuple[Tensor, Tensor]:
        """q and k, [.., T, H d] each. Called behind the pass: what is computed inside it would be
        missing where gradient checkpointing computes the pass again."""
        if self.module is not None:
            return _second_projection(self.module, self.inputs[0], self.inputs[1])
        if packed:
            q, k, _ = self.parts[0].chunk(3, dim=-1)
            return q, k
        return self.parts[0], self.parts[1]

    @torch.no_grad()
    def crosses(self) -> bool:
        """Whether queries and keys are projected from different tokens."""
        if len(self.inputs) < 2 or self.inputs[0] is self.inputs[1]:
            return False
        a, b = self.inputs[0], self.inputs[1]
        return a.shape != b.shape or not torch.equal(a, b)


class Attending(TorchFunctionMode):
    """While it lasts, keeps what every call of one attention module attends with.

    Args:
        model: where the module lies.
        path: the attention module's name.
        projections: names of its linear modules, one packed or three (queries first); () for
            nn.MultiheadAttention, whose queries and keys are projected a second time from what it
            is called with, so that its own forward runs as it is.
    """

    def __init__(self, model: nn.Module, path: str, projections: tuple[str, ...]) -> None:
        super().__init__()
        self.calls: list[Attended] = []
        self._module, self._path = model.get_submodule(path), path
        self._projections = [model.get_submodule(name) for name in projections[:2]]
        self._packed = len(projections) == 1
        self._inside: list[Attended] = []
        self._pending: list[Attended] = []  # of projections that run outside the module
        self._hooks = ExitStack()

    def __enter__(self) -> Attending:
        module = self._module
        start = module.register_forward_pre_hook(self._start, with_kwargs=True)
        self._hooks.callback(start.remove)
        stop = module.register_forward_hook(self._stop, always_call=True)
        self._hooks.callback(stop.remove)
        for which, projection in enumerate(self._projections):
            handle = projection.register_forward_hook(self._projected(which), with_kwargs=True)
            self._hooks.callback(handle.remove)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hooks.close()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._inside:
            if func is _FUSED:
                self._fused(dict(zip(_FUSED_NAMES, args, strict=False)) | kwargs)
            elif func in SOFTMAX:
                self._softmax(args[0] if args else kwargs["input"])
        return func(*args, **kwargs)

    def _start(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        call = self._pending.pop() if self._pending else Attended()
        self._inside.append(call)
        self.calls.append(call)
        if not self._projections:
            _multihead(self._path, cast(nn.MultiheadAttention, module), call, args, kwargs)

    def _stop(self, *_: Any) -> None:
        self._inside.pop()

    def _projected(self, which: int):
        def hook(_module, args, kwargs, output):
            if self._inside:
                call = self._inside[-1]
            else:  # the projections run before the module that attends
                if not self._pending:
                    self._pending.append(Attended())
                call = self._pending[-1]
            call.parts[which] = output
            tokens = next(tensors((args, kwargs)), None)
            if tokens is not None:
                call.inputs[which] = tokens

        return hook

    @torch.no_grad()
    def _fused(self, arguments: dict[str, Any]) -> None:
        call, mask = self._inside[-1], arguments.get("attn_mask")
        call.seen += 1
        if arguments.get("is_causal") and arguments["query"].shape[-2] > 1:
            call.hidden.append(True)
        if isinstance(mask, Tensor):
            call.hidden.append(~mask.all() if mask.dtype == torch.bool else (mask != 0).any())

    @torch.no_grad()
    def _softmax(self, scores: Tensor) -> None:
        call = self._inside[-1]
        call.seen += 1
        if scores.ndim < 2 or not scores.is_floating_point():
            return
        half = scores.dtype in (torch.float16, torch.bfloat16)
        rows = scores.detach()
        rows = rows.amin(dim=-1) if half else rows.sum(dim=-1)
        call.softmax.append(Softmax(scores.shape, scores.dtype, rows))


def plain_multihead(module: nn.Module) -> bool:
    """Whether it computes as nn.MultiheadAttention does; a subclass may do otherwise."""
    return type(module).forward is nn.MultiheadAttention.forward


def _multihead(
    path: str, module: nn.MultiheadAttention, call: Attended, args: tuple, kwargs: dict
) -> None:
    """Queries and keys of an nn.MultiheadAttention, from what it is called with."""
    names = inspect.signature(nn.MultiheadAttention.forward).parameters
    arguments = dict(zip(list(names)[1:], args, strict=False)) | kwargs
    query, key = arguments.get("query"), arguments.get("key")
    if not isinstance(query, Tensor) or not isinstance(key, Tensor) or query.ndim != 3:
        raise ValueError(
            f"{path} ({type(module).__name__}) is called with something else than batches of "
            "queries and keys [B, T, D]; needed self-attention over the tokens of all modalities"
        )
    call.module, call.inputs = module, {0: query, 1: key}
    call.seen += plain_multihead(module)
    for name in ("key_padding_mask", "attn_mask"):
        mask = arguments.get(name)
        if isinstance(mask, Tensor):
            call.hidden.append((mask if mask.dtype == torch.bool else mask != 0).any())
    if arguments.get("is_causal") and arguments.get("attn_mask") is None:
        call.hidden.append(True)


def _second_projection(
    module: nn.MultiheadAttention, query: Tensor, key: Tensor
) -> tuple[Tensor, Tensor]:
    """q and k [B, T, H d] of what an nn.MultiheadAttention was called with."""
    width, weight, bias = module.embed_dim, module.in_proj_weight, module.in_proj_bias
    rows = slice(0, width), slice(width, 2 * width)
    if not module.batch_first:
        same = query is key
        query = query.transpose(0, 1)
        key = query if same else key.transpose(0, 1)
    if query is key:
        both = slice(0, 2 * width)
        q, k = nnf.linear(query, weight[both], None if bias is None else bias[both]).chunk(2, -1)
        return q, k
    q, k = (
        nnf.linear(x, weight[part], None if bias is None else bias[part])
        for x, part in zip((query, key), rows, strict=True)
    )
    return q, k
