"""What public functions ask of their arguments; errors name the argument, and what was needed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral

from torch import Tensor

FORMS = ("mean", "softmax-sum")
HEADS = ("mean", "each")
PAIRS = ("key", "query")


def one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} is unknown; known: {', '.join(map(repr, known))}")


def same(kind: type[Exception], what: str, a: Tensor, b: Tensor, names: str) -> None:
    found = getattr(a, what), getattr(b, what)
    if found[0] != found[1]:
        raise kind(f"{names} must have one {what}, found {found[0]} and {found[1]}")


def floating(name: str, x: Tensor, rank: int, layout: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor {layout}, found {type(x).__name__}")
    if x.ndim != rank:
        raise ValueError(f"{name} must be {layout}, found shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, found {x.dtype}")


def scores(
    q: Tensor, k: Tensor, spans: Sequence[int], scale: float | None, heads: str
) -> tuple[list[int], float, bool]:
    for name, x in (("q", q), ("k", k)):
        floating(name, x, 4, "[batch, heads, tokens, head dim]")
    same(ValueError, "shape", q, k, "q and k")
    same(TypeError, "dtype", q, k, "q and k")
    same(ValueError, "device", q, k, "q and k")
    if q.shape[1] < 1 or q.shape[3] < 1:
        raise ValueError(f"q needs at least one head and one channel, found {tuple(q.shape)}")
    spans = integers("spans", spans)
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale={scale} must be finite")
    if sum(spans) != q.shape[2] or not spans:
        raise ValueError(
            f"spans={spans} must sum to the token count {q.shape[2]} of q, they sum to {sum(spans)}"
        )
    if min(spans) < 2:
        raise ValueError(
            f"spans={spans}: a modality needs at least 2 tokens, the unbiased standard deviation "
            "of a single score is undefined"
        )
    one_of("heads", heads, HEADS)
    return spans, float(q.shape[3] ** -0.5 if scale is None else scale), heads == "each"


def flat(q: Tensor, k: Tensor, v: Tensor, scale: float) -> float:
    for name, x in (("q", q), ("k", k), ("v", v)):
        floating(name, x, 4, "[batch, heads, tokens, head dim]")
    for name, x in (("q", q), ("v", v)):
        same(TypeError, "dtype", x, k, f"{name} and k")
        same(ValueError, "device", x, k, f"{name} and k")
    same(ValueError, "shape", v, k, "v and k")
    if not k.numel():
        raise ValueError(f"k needs something in every dimension, found shape {tuple(k.shape)}")
    if q.shape != k.shape and q.shape != (1, *k.shape[1:]):
        raise ValueError(
            f"q must be {list(k.shape)} like k, or [1, ...] where the batch shares it, found "
            f"{list(q.shape)}"
        )
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale} must be finite")
    return float(scale)


def integers(name: str, values: Sequence[int]) -> list[int]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a sequence of integers, found {values!r}")
    values = list(values)
    if not all(isinstance(n, Integral) and not isinstance(n, bool) for n in values):
        raise TypeError(f"{name} must be integers, found {values}")
    return [int(n) for n in values]


def shared_prefix(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, lengths: list[int],
    heads: int, scale: float | None,
) -> float:  # fmt: skip
    tensors = {"q": q, "k": k, "v": v, "prefix_k": prefix_k, "prefix_v": prefix_v}
    for name, x in tensors.items():
        floating(name, x, 3, "[batch, tokens, heads * head dim]")
    for name, x in tensors.items():
        same(TypeError, "dtype", x, k, f"{name} and k")
        same(ValueError, "device", x, k, f"{name} and k")
        if (len(x), x.shape[2]) != (len(k), k.shape[2]):
            raise ValueError(
                f"{name} must be [{len(k)}, tokens, {k.shape[2]}] like k, found {list(x.shape)}"
            )
    same(ValueError, "shape", v, k, "v and k")
    same(ValueError, "shape", prefix_v, prefix_k, "prefix_v and prefix_k")
    if isinstance(heads, bool) or not isinstance(heads, Integral) or heads < 1:
        raise ValueError(f"heads={heads!r} must be a positive integer")
    if not k.shape[2] or k.shape[2] % heads:
        raise ValueError(f"heads={heads} must divide the {k.shape[2]} channels of k")
    if not lengths or min(lengths) < 1 or sum(lengths) != k.shape[1]:
        raise ValueError(
            f"lengths must be positive and sum to the {k.shape[1]} tokens of k, found {lengths}"
        )
    if q.shape[1] not in (k.shape[1], len(lengths)):
        raise ValueError(
            f"q must be of all {k.shape[1]} tokens or of the {len(lengths)} sequences' last ones, "
            f"found {q.shape[1]}"
        )
    scale = (k.shape[2] // heads) ** -0.5 if scale is None else scale
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale} must be finite")
    return float(scale)


def logits_shape(logits: Tensor, rows: int = 0) -> None:
    floating("logits", logits, 2, "[samples, classes]")
    if logits.shape[0] < rows or logits.shape[1] < 1:
        raise ValueError(
            f"logits need at least {rows} sample and 1 class, found shape {tuple(logits.shape)}"
        )


def k_and_eps(logits: Tensor, k: int, eps: float) -> None:
    if isinstance(k, bool) or not isinstance(k, Integral):
        raise TypeError(f"k must be an int, found {k!r}")
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"k={k} is out of range, needed 1 to {logits.shape[1]} (the class count)")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps={eps} must be finite and not negative")


def sample_weight(logits: Tensor, weight: Tensor | None) -> None:
    if weight is None:
        return
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor [samples], found {type(weight).__name__}")
    if weight.shape != logits.shape[:1]:
        raise ValueError(
            f"weight must be [{logits.shape[0]}], one a sample, found {tuple(weight.shape)}"
        )
    same(ValueError, "device", logits, weight, "logits and weight")


def map_shape(maps: Tensor, count: int = 0) -> None:
    floating("maps", maps, 3, "[maps, height, width]")
    if maps.shape[0] < count or min(maps.shape[1:]) < 1:
        raise ValueError(
            f"maps need at least {count} map of 1 x 1, found shape {tuple(maps.shape)}"
        )


def temperature_of(value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"temperature={value} must be finite and above 0")
    return float(value)
