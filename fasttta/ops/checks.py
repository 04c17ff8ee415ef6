"""Checks of callers' arguments. Errors name the argument, what was found and what was needed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from ..files.weights import STAND_INS

FORMS = ("mean", "softmax-sum")
HEADS = ("mean", "each")
PAIRS = ("key", "query")

_LAYOUTS = {
    "sparse_coo": "a sparse COO tensor",
    "sparse_csr": "a sparse CSR tensor",
    "sparse_csc": "a sparse CSC tensor",
    "sparse_bsr": "a sparse BSR tensor",
    "sparse_bsc": "a sparse BSC tensor",
    "_mkldnn": "an MKLDNN tensor",
    "jagged": "a nested tensor",
}
_PAD = "torch.nested.to_padded_tensor(x, 0), or give equal lengths"
# subclasses of plain values, which only remember what these belong to
_MARKED = ("torchvision.tv_tensors",)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def all_finite(*tensors: Tensor) -> Tensor:
    """Whether all values of the tensors are finite: 0-d bool on their device. Decided by the
    largest magnitudes, in which infinity and NaN remain: each tensor is read once, where
    ``isfinite`` is five kernels and reads or writes 17 bytes a value of float32."""
    floating = [x.detach() for x in tensors if x.is_floating_point() and x.numel()]
    if not floating:
        return torch.ones((), dtype=torch.bool, device=tensors[0].device)
    largest = torch._foreach_norm(floating, math.inf)
    return (torch.stack(largest).amax() if len(largest) > 1 else largest[0]) < math.inf


def dense(name: str, x: Tensor) -> Tensor:
    """A tensor's values as a plain dense ``torch.Tensor``, so that states keep no caller's class.

    ``nn.Parameter``, torchvision's ``tv_tensors`` and subclasses that change no operation become
    ``torch.Tensor`` over the same memory.

    Raises:
        TypeError: it is sparse, nested, quantised, complex, of a subclass with other operations,
            fake or inside a transform of ``torch.func``; says which and what to call.
    """
    kind = type(x)
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        raise _refusal(
            name, "inside torch.func (vmap, grad, ...)", "call it outside of the transform"
        )
    if x.layout != torch.strided or x.is_nested:
        layout = "jagged" if x.is_nested else str(x.layout).removeprefix("torch.")
        advice = _PAD if x.is_nested else ".to_dense()"
        raise _refusal(name, _LAYOUTS.get(layout, f"of layout {layout}"), f"call {advice}")
    if kind in STAND_INS:
        return x
    if kind is not Tensor and kind is not nn.Parameter:
        if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
            advice = "call .full_tensor()" if kind.__name__ == "DTensor" else "give its values"
            raise _refusal(name, f"a {kind.__name__} ({kind.__module__})", advice)
        other = _function_of(kind) is not _function_of(Tensor)
        if other and not kind.__module__.startswith(_MARKED):
            raise _refusal(
                name, f"a {kind.__name__} ({kind.__module__}), whose operations are its own",
                "call .as_subclass(torch.Tensor)",
            )  # fmt: skip
    if kind is not Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            x = x.as_subclass(Tensor)
    if torch._is_functional_tensor(x):
        raise _refusal(name, "inside torch.func.functionalize", "call it outside of the transform")
    if x.is_quantized:
        raise _refusal(name, f"a quantised tensor ({x.dtype})", "call .dequantize()")
    if x.is_complex():
        raise _refusal(name, f"complex ({x.dtype})", "give its real part, .real, or .abs()")
    return x.resolve_neg()


def _function_of(kind: type) -> Any:
    """The function behind a class' ``__torch_function__``, a class method."""
    method: Any = kind.__torch_function__  # type: ignore[attr-defined]
    return getattr(method, "__func__", method)


def _refusal(name: str, kind: str, advice: str) -> TypeError:
    return TypeError(f"{name} is {kind}; needed a dense torch.Tensor; {advice}")


def class_labels(labels: Any, samples: int | None, classes: int) -> Tensor:
    """Labels as plain int64 [n], on the device that they are on.

    Args:
        samples: n; None: any number.
        classes: labels are 0 to this number less one.

    Raises:
        TypeError: no dense tensor of integers.
        ValueError: another shape than [n], or a label outside of the classes.
    """
    size = "n" if samples is None else samples
    needed = f"must be a tensor [{size}] of integers from 0 to {classes - 1}"
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels {needed}, found {labels!r:.80}")
    labels = dense("labels", labels).detach()
    if labels.ndim == 2 and labels.shape[1] == classes:
        raise ValueError(
            f"labels {needed}, found shape {list(labels.shape)}: of one-hot rows or probabilities "
            "take labels.argmax(1)"
        )
    if labels.dtype not in _INTEGERS:
        raise TypeError(f"labels {needed}, found {labels.dtype}; of whole numbers: labels.long()")
    if labels.ndim != 1 or (samples is not None and len(labels) != samples):
        raise ValueError(f"labels {needed}, one a sample, found shape {list(labels.shape)}")
    if len(labels):
        low, high = (int(x) for x in torch.aminmax(labels))
        if low < 0 or high >= classes:
            raise ValueError(
                f"labels must lie in 0 to {classes - 1}, there are {classes} classes; found {low} "
                f"to {high}"
            )
    return labels.long()


def class_count(classes: Any) -> int:
    """Checks a number of classes and returns it.

    Raises:
        TypeError, ValueError: it is no positive integer.
    """
    if isinstance(classes, bool) or not isinstance(classes, int):
        raise TypeError(f"classes must be their number, found {classes!r:.80}")
    if classes < 1:
        raise ValueError(f"classes={classes}: needed at least 1")
    return classes


def one_of(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuses a value that is none of the choices.

    Raises:
        ValueError: lists them.
    """
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; known: {', '.join(map(repr, choices))}")


def same(kind: type[Exception], what: str, a: Tensor, b: Tensor, names: str) -> None:
    """Refuses two tensors whose attribute ``what`` (shape, dtype, device) differs.

    Args:
        kind: of the error. names: of the tensors, as in "q and k".
    """
    one, other = getattr(a, what), getattr(b, what)
    if one != other:
        raise kind(f"{names} must have one {what}, found {one} and {other}")


def floating(name: str, x: Tensor, rank: int, layout: str) -> None:
    """Refuses what is no floating point tensor of this rank; ``layout`` names its dimensions.

    Raises:
        TypeError: no tensor, or not floating point.
        ValueError: another rank.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor {layout}, found {type(x).__name__}")
    if x.ndim != rank:
        raise ValueError(f"{name} must be {layout}, found shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, found {x.dtype}")


def floating_tensors(**tensors: Tensor) -> None:
    """Raises TypeError for an argument that is no floating point tensor, by its name."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} must be a floating point tensor, found {kind}")


def anchor(moments: tuple[Tensor, Tensor], shape: tuple[int, ...]) -> None:
    """Raises ValueError for means or standard deviations of another shape."""
    for name, x in zip(("mean", "std"), moments, strict=True):
        if x.shape != shape:
            raise ValueError(f"anchor.{name} must be {list(shape)}, found {list(x.shape)}")


def scores(
    q: Tensor, k: Tensor, spans: Sequence[int], scale: float | None, heads: str
) -> tuple[list[int], float, bool]:
    """Checks the arguments of operations on score statistics.

    Args:
        q, k: [B, H, T, d]. spans: token counts of modalities, which must sum to T, at least 2 each.
        scale: None: d ** -0.5. heads: one of HEADS.

    Returns:
        The spans as a list, the scale, and whether statistics are of each head.

    Raises:
        ValueError, TypeError: they do not fit.
    """
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
    """Checks the arguments of ``flat_attention``: q [B or 1, H, K, d], k and v [B, H, K, d].

    Returns:
        The scale.

    Raises:
        ValueError, TypeError: they do not fit.
    """
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
    """A sequence of integers as a list of ``int``.

    Raises:
        TypeError: it is something else.
    """
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
    """Checks the arguments of ``functional.shared_prefix_attention``, whose shapes these are.

    Returns:
        The scale: for None, (channels of a head) ** -0.5.

    Raises:
        ValueError, TypeError: they do not fit.
    """
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
    """Refuses what are no logits [samples, classes] of at least ``rows`` samples and one class."""
    floating("logits", logits, 2, "[samples, classes]")
    if logits.shape[0] < rows or logits.shape[1] < 1:
        raise ValueError(
            f"logits need at least {rows} sample and 1 class, found shape {tuple(logits.shape)}"
        )


def k_and_eps(logits: Tensor, k: int, eps: float) -> None:
    """Refuses a k outside of 1 to C of logits [n, C], and an eps below 0 or not finite."""
    if isinstance(k, bool) or not isinstance(k, Integral):
        raise TypeError(f"k must be an int, found {k!r}")
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"k={k} is out of range, needed 1 to {logits.shape[1]} (the class count)")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps={eps} must be finite and not negative")


def sample_weight(logits: Tensor, weight: Tensor | None) -> None:
    """Refuses a weight that is not [n] on the device of logits [n, C]; None passes."""
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
    """Refuses what are no maps [maps, height, width] of at least ``count`` maps of one pixel."""
    floating("maps", maps, 3, "[maps, height, width]")
    if maps.shape[0] < count or min(maps.shape[1:]) < 1:
        raise ValueError(
            f"maps need at least {count} map of 1 x 1, found shape {tuple(maps.shape)}"
        )


def maps_and_logits(maps: Tensor, logits: Tensor) -> None:
    """Refuses maps [N, height, width] and logits [N, classes] of different views or devices."""
    map_shape(maps, count=1)
    logits_shape(logits, rows=1)
    if maps.shape[0] != logits.shape[0]:
        raise ValueError(
            f"logits must be of the {maps.shape[0]} maps' views, found {logits.shape[0]} rows"
        )
    same(ValueError, "device", maps, logits, "maps and logits")


def temperature_of(value: float) -> float:
    """A temperature as ``float``.

    Raises:
        ValueError: it is not above 0, or not finite.
    """
    if not 0 < value < math.inf:
        raise ValueError(f"temperature={value} must be finite and above 0")
    return float(value)
