"""Where the parts of a fusion transformer are, as a user says it, checked."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Parts:
    """The fields of a ``ModelSpec``, checked.

    Raises:
        TypeError, ValueError: a value of the wrong kind, overlapping spans.
    """

    fusion: str | nn.Module | Sequence[str | nn.Module]
    spans: Mapping[str, tuple[int, int]]
    qkv: str | Sequence[str] | None = None
    logits: str | int | Callable[[Any], Any] | None = None
    encode: str | Sequence[str] | tuple[Callable, Callable] | None = None
    num_heads: int | None = field(default=None, kw_only=True)
    scale: float | None = field(default=None, kw_only=True)

    def __hash__(self) -> int:
        spans = frozenset(self.spans.items())  # as ==, in any order
        return hash((self.fusion, spans, self.qkv, self.logits, self.encode, self.num_heads,
                     self.scale))  # fmt: skip

    def __post_init__(self) -> None:
        fusion = self.fusion if isinstance(self.fusion, (list, tuple)) else (self.fusion,)
        if not fusion or not all(isinstance(x, (str, nn.Module)) for x in fusion):
            raise TypeError(
                f"fusion must be a module's dotted name, a module or a list of them, found "
                f'{self.fusion!r}; for example fusion="fusion.layers.0.self_attn"'
            )
        object.__setattr__(self, "fusion", tuple(fusion))
        object.__setattr__(self, "spans", _checked_spans(self.spans))
        if isinstance(self.qkv, (list, tuple)):
            object.__setattr__(self, "qkv", tuple(self.qkv))
            if len(self.qkv) != 3 or not all(isinstance(x, str) for x in self.qkv):
                raise ValueError(
                    f"qkv={self.qkv!r}: needed one name or three, of the query, key and value "
                    'projections; for example qkv=("q_proj", "k_proj", "v_proj")'
                )
        elif self.qkv is not None and not isinstance(self.qkv, str):
            raise TypeError(f"qkv must be a name or three names, found {self.qkv!r}")
        if isinstance(self.logits, bool) or not (
            self.logits is None or isinstance(self.logits, (str, int)) or callable(self.logits)
        ):
            raise TypeError(
                f"logits must be a key, an index or a function of what the model returns, found "
                f"{self.logits!r}"
            )
        _check_encode(self.encode)
        if isinstance(self.encode, (str, list)):
            encode = (self.encode,) if isinstance(self.encode, str) else tuple(self.encode)
            object.__setattr__(self, "encode", encode)
        heads = self.num_heads
        if heads is not None and (isinstance(heads, bool) or not isinstance(heads, Integral)):
            raise TypeError(f"num_heads must be an int, found {heads!r}")
        if heads is not None and heads < 1:
            raise ValueError(f"num_heads={heads}: needed at least 1")
        if self.scale is not None and not isinstance(self.scale, (int, float)):
            raise TypeError(f"scale must be a number, found {self.scale!r}")

    def source(self) -> str:
        """The spec as Python, to be pasted. Functions and modules cannot be printed.

        Raises:
            ValueError: it holds functions or modules.
        """
        lines = []
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in ("fusion", "encode") and isinstance(value, tuple) and len(value) == 1:
                value = value[0]
            parts = value if isinstance(value, tuple) else (value,)
            if any(callable(part) for part in parts):
                raise ValueError(f"{f.name} holds a function or a module, which has no source text")
            if value is not None:
                lines.append(f"    {f.name}={_literal(value)},")
        return "\n".join(("fasttta.ModelSpec(", *lines, ")"))


def _literal(value: object) -> str:
    """Python text with double quotes, as the rest of a user's file has."""
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(k)}: {_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, tuple):
        inner = ", ".join(map(_literal, value))
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    return repr(value)


def _checked_spans(spans: object) -> dict[str, tuple[int, int]]:
    example = 'for example spans={"audio": (0, 512), "video": (512, 708)}'
    if not isinstance(spans, Mapping) or not spans:
        raise TypeError(
            f"spans must be a dict modality -> (start, stop), found {spans!r}; {example}"
        )
    checked = {}
    for name, span in spans.items():
        pair = tuple(span) if isinstance(span, (list, tuple)) else (span,)
        if len(pair) != 2 or not all(
            isinstance(x, Integral) and not isinstance(x, bool) for x in pair
        ):
            raise TypeError(f"spans[{name!r}] must be (start, stop), found {span!r}; {example}")
        start, stop = int(pair[0]), int(pair[1])
        if start < 0 or stop - start < 2:
            raise ValueError(
                f"spans[{name!r}]=({start}, {stop}): needed 0 <= start and at least 2 tokens "
                "(the standard deviation of one score is undefined)"
            )
        checked[str(name)] = (start, stop)
    ordered = sorted(checked.items(), key=lambda item: item[1])
    for (a, (_, stop)), (b, (start, _)) in itertools.pairwise(ordered):
        if start < stop:
            raise ValueError(f"spans of {a} and {b} overlap: {checked[a]} and {checked[b]}")
    return checked


def _check_encode(encode: object) -> None:
    if encode is None or isinstance(encode, str):
        return
    if isinstance(encode, (list, tuple)) and encode:
        if all(isinstance(x, str) for x in encode):
            return
        if len(encode) == 2 and all(callable(x) and not isinstance(x, nn.Module) for x in encode):
            return
    raise TypeError(
        "encode must be names of modules or a pair of functions (encode(model, *inputs) -> tensor, "
        f"fuse(model, tokens) -> output), found {encode!r}; leave it out to have the cut found"
    )
