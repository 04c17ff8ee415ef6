"""The linear modules that a fusion attention's q, k and v come from."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ...protocols import Slot
from .attention_calls import Attending
from .parts import Parts

PACKED = ("qkv", "in_proj", "qkv_proj", "Wqkv", "to_qkv", "c_attn", "query_key_value")
SEPARATE = (
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"),
    ("to_q", "to_k", "to_v"), ("wq", "wk", "wv"), ("q_lin", "k_lin", "v_lin"),
    ("linear_q", "linear_k", "linear_v"), ("W_q", "W_k", "W_v"),
)  # fmt: skip
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead")
_PARTS = ("weight", "bias")


@dataclass(frozen=True)
class Projections:
    """Of one fusion attention.

    Attributes:
        path: its name in the model.
        modules: names of the linear modules, one packed or three; () for nn.MultiheadAttention.
        num_heads: H.
        scale: factor of q·k, None for d ** -0.5.
    """

    path: str
    modules: tuple[str, ...]
    num_heads: int
    scale: float | None

    def slots(self, model: nn.Module) -> dict[str, Slot]:
        """Tuned name -> where it lies among the model's parameters."""
        if len(self.modules) == 3:
            names = [f"{name}.{part}" for name in self.modules for part in _PARTS]
            return {n: Slot(n) for n in names if _parameter(model, n) is not None}
        slots = {}
        for part in _PARTS:
            packed = f"{self.modules[0]}.{part}" if self.modules else f"{self.path}.in_proj_{part}"
            rows = _parameter(model, packed)
            if rows is None:
                continue
            width = len(rows) // 3
            for i, which in enumerate("qkv"):
                slots[f"{self.path}.{which}.{part}"] = Slot(packed, (i * width, (i + 1) * width))
        return slots

    def attending(self, model: nn.Module) -> Attending:
        """While it lasts, q and k of every call are kept, [.., T, H d] each."""
        return Attending(model, self.path, self.modules)

    def heads(self, x: Tensor, batch: int, stop: int, sequence_first: bool) -> Tensor:
        """[B, T, H d] (or [T, B, H d]) -> [B, H, T, d].

        Raises:
            ValueError: the shape is neither, H does not divide it, or T < stop, the end of the
                last span.
        """
        if x.ndim == 3 and sequence_first:
            x = x.transpose(0, 1)
        if x.ndim != 3 or x.shape[0] != batch:
            raise ValueError(
                f"the projections of {self.path} give {list(x.shape)} for a batch of {batch}, "
                "needed [batch, tokens, width]"
            )
        if x.shape[1] < stop:
            raise ValueError(
                f"spans end at {stop}, but {self.path} attends over {x.shape[1]} tokens; correct "
                "spans, or see what ModelSpec.detect(model, *inputs) finds"
            )
        if x.shape[2] % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide the width {x.shape[2]} of "
                f"{self.path}; give the right one, ModelSpec(..., num_heads=...)"
            )
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


def _parameter(model: nn.Module, name: str) -> Tensor | None:
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf, None)


def resolve(model: nn.Module, spec: Parts) -> tuple[Projections, ...]:
    """The projections that a spec means, checked against the model.

    Raises:
        ValueError: a name that is not there, or modules of another kind; says what is there.
    """
    fusions = cast("tuple[str | nn.Module, ...]", spec.fusion)  # as __post_init__ leaves it
    return tuple(_one(model, spec, fusion) for fusion in fusions)


def _one(model: nn.Module, spec: Parts, fusion: str | nn.Module) -> Projections:
    path = _path(model, fusion)
    attention = model.get_submodule(path)
    scale = spec.scale
    if isinstance(attention, nn.MultiheadAttention) and (
        spec.qkv is None or (isinstance(spec.qkv, str) and spec.qkv.startswith("in_proj"))
    ):
        if (
            attention.in_proj_weight is None
            or attention.bias_k is not None
            or attention.add_zero_attn
        ):
            raise ValueError(
                f"{path} is an nn.MultiheadAttention with kdim, vdim, add_bias_kv or "
                "add_zero_attn; needed plain self-attention"
            )
        width = attention.embed_dim // attention.num_heads
        for name, actual in (("num_heads", attention.num_heads), ("scale", width**-0.5)):
            value = getattr(spec, name)
            if value is not None and abs(value - actual) > 1e-6 * actual:
                raise ValueError(f"{name}={value}, but that of {path} is {actual:g}; leave it out")
        return Projections(path, (), attention.num_heads, scale)
    names = (spec.qkv,) if isinstance(spec.qkv, str) else spec.qkv or _usual(attention, path)
    modules = tuple(_inside(model, path, name) for name in names)
    _check_rows(model, modules)
    holder = model.get_submodule(modules[0].rpartition(".")[0])
    heads = spec.num_heads or has_heads(attention) or has_heads(holder)
    if not heads:
        raise ValueError(
            f"{path} ({type(attention).__name__}) does not say how many heads it has (looked for "
            f"{', '.join(_HEADS)}); give it: ModelSpec(..., num_heads=...)"
        )
    for module in (attention, holder):
        for name in ("scale", "scaling"):
            value = getattr(module, name, None)
            if scale is None and isinstance(value, (int, float)) and math.isfinite(value):
                scale = float(value)
    return Projections(path, modules, heads, scale)


def has_heads(module: nn.Module) -> int:
    """The number of heads that a module says it has, 0 for none."""
    values = [getattr(module, name, None) for name in _HEADS]
    return next((x for x in values if isinstance(x, int) and x > 0), 0)


def _path(model: nn.Module, fusion: str | nn.Module) -> str:
    names = {id(module): name for name, module in model.named_modules()}
    if isinstance(fusion, nn.Module):
        if id(fusion) not in names or not names[id(fusion)]:
            raise ValueError(
                f"fusion: this {type(fusion).__name__} is no submodule of "
                f"{type(model).__name__}; name one of it, or give the module itself"
            )
        return names[id(fusion)]
    every = {name for name, _ in model.named_modules(remove_duplicate=False)}
    for name in (fusion, fusion.removeprefix("module.")):
        if name and name in every:
            return names[id(model.get_submodule(name))]  # an alias' first name
    attentions = [name for name, module in model.named_modules() if name and attends(module)]
    raise ValueError(
        f"fusion={fusion!r} is no submodule of {type(model).__name__}; what looks like attention "
        f"there: {', '.join(attentions[:8]) or 'nothing'}"
    )


def attends(module: nn.Module) -> bool:
    """Whether a module looks like attention: by its class, or by the names of its children."""
    return isinstance(module, nn.MultiheadAttention) or bool(usual_names(module))


def usual_names(module: nn.Module) -> tuple[str, ...]:
    """Children of a module that are projections by their usual names: one, three or none."""
    children = dict(module.named_children())
    for name in PACKED:
        weight = getattr(children.get(name), "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[0] % 3 == 0:
            return (name,)
    for names in SEPARATE:
        if all(isinstance(getattr(children.get(n), "weight", None), Tensor) for n in names):
            return names
    return ()


def _usual(attention: nn.Module, path: str) -> tuple[str, ...]:
    names = usual_names(attention)
    if not names:
        children = ", ".join(name for name, _ in attention.named_modules() if name) or "none"
        raise ValueError(
            f"{path} ({type(attention).__name__}) has no projections of a usual name (qkv; q_proj "
            f"k_proj v_proj; query key value; ...); its modules: {children}. Name them: "
            'ModelSpec(..., qkv="name") for a packed one, qkv=("q", "k", "v") for three'
        )
    return names


def _inside(model: nn.Module, path: str, name: str) -> str:
    for full in (f"{path}.{name}", name):
        try:
            model.get_submodule(full)
        except AttributeError:
            continue
        return full
    children = ", ".join(n for n, _ in model.get_submodule(path).named_modules() if n) or "none"
    raise ValueError(f"qkv: {path} has no module {name!r}; its modules: {children}")


def _check_rows(model: nn.Module, modules: tuple[str, ...]) -> None:
    shapes = []
    for name in modules:
        module = model.get_submodule(name)
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            raise ValueError(
                f"qkv: {name} is {type(module).__name__}, needed a linear module with a weight "
                "[out, in]. If it wraps one (LoRA), merge the adapter into the linear module first"
            )
        if type(module).__name__ == "Conv1D":  # transformers' linear with weight [in, out]
            raise ValueError(f"qkv: {name} keeps its weight as [in, out], needed [out, in]")
        shapes.append(tuple(weight.shape))
    if len(modules) == 1 and shapes[0][0] % 3:
        raise ValueError(f"qkv: {modules[0]} has {shapes[0][0]} rows, needed q, k and v alike")
    if len(modules) == 3 and shapes[0][0] != shapes[1][0]:
        raise ValueError(
            f"qkv: queries have width {shapes[0][0]}, keys {shapes[1][0]} (grouped heads); needed "
            "equal ones"
        )


@contextlib.contextmanager
def without_fast_path() -> Iterator[None]:
    """Switches off nn.TransformerEncoderLayer's fused inference, which calls no submodules."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
