"""Weights that cannot be computed with here: quantised, sparse, sharded, not made yet."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .dual import refuse_meta

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WEIGHTS = ("weight", "bias", "in_proj_weight", "in_proj_bias")
_SHARDED = ("FullyShardedDataParallel", "FSDPModule", "XlaFullyShardedDataParallel")
_FLOAT_MODEL = "give the model as it was before: fasttta adapts in float32, float64 or bfloat16"


def refuse_unusable(model: nn.Module) -> None:
    """Checks that every weight is a plain floating point tensor, on one device.

    Raises:
        ValueError: one is not; names the module, what it is and what to do.
    """
    for name, module in model.named_modules():
        where = name or "the model"
        kind = type(module)
        if any(c.__name__ in _SHARDED for c in kind.__mro__):
            raise ValueError(
                f"{where} is sharded ({kind.__name__}): its weights lie in parts on several "
                "processes; gather them into a plain model first (the full state dict, loaded into "
                "a model that is not wrapped)"
            )
        if isinstance(module, torch.jit.ScriptModule) and name:
            raise ValueError(
                f"{where} is a TorchScript module, whose forward cannot run other weights; give "
                "the model as it was before torch.jit.script or torch.jit.trace"
            )
        if _quantised(module):
            raise ValueError(
                f"{where} ({kind.__module__}.{kind.__name__}) holds quantised weights, which have "
                f"no gradient; {_FLOAT_MODEL}"
            )
        for x in (*module._parameters.values(), *module._buffers.values()):
            if x is not None and is_lazy(x):
                raise ValueError(
                    f"{where} ({kind.__name__}) has no weights yet (a lazy module); run the model "
                    "once on a batch, which makes them, and then adapt"
                )
    refuse_meta(model)
    first: tuple[str, torch.device] | None = None
    for name, x, is_parameter in _tensors(model):
        reason = _reason(name, x, is_parameter)
        if reason is not None:
            raise ValueError(f"{name} {reason}")
        first = first or (name, x.device)
        if x.device != first[1]:
            raise ValueError(
                f"the model lies on several devices: {first[0]} on {first[1]}, {name} on "
                f"{x.device}; move it to one: model.to({str(first[1])!r})"
            )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    for name, parameter in model.named_parameters():
        yield name, parameter, True
    for name, buffer in model.named_buffers():
        yield name, buffer, False


def _quantised(module: nn.Module) -> bool:
    """PyTorch's quantised modules, dynamic ones too, and those that keep packed weights."""
    path = type(module).__module__
    if path.startswith(("torch.ao.nn.", "torch.nn.")) and "quantized" in path.split("."):
        return True
    return "_packed_params" in vars(module) or "_packed_params" in module._modules


def _reason(name: str, x: Tensor, is_parameter: bool) -> str | None:
    """Why a tensor cannot be computed with; None: it can."""
    if _is_distributed(x):
        return (
            "is a DTensor, which lies in parts on several processes; gather it first "
            "(x.full_tensor()) into a plain model"
        )
    if x.is_quantized:
        return f"is quantised ({x.dtype}), and has no gradient; {_FLOAT_MODEL}"
    if x.is_nested:
        return "is a nested tensor; needed plain tensors"
    if x.layout != torch.strided:
        return f"is sparse ({x.layout}); make it dense first: x.to_dense()"
    if type(x) not in (Tensor, nn.Parameter, nn.Buffer) and _dispatches(type(x)):
        return (
            f"is a {type(x).__module__}.{type(x).__name__}, not a plain tensor (quantised by a "
            f"library?); {_FLOAT_MODEL}"
        )
    if x.is_complex():
        return f"is complex ({x.dtype}); needed real weights"
    leaf = name.rpartition(".")[2]
    if x.is_floating_point() and x.dtype not in _FLOATS and (is_parameter or leaf in _WEIGHTS):
        return f"is stored in {x.dtype}, which needs scales to compute with; {_FLOAT_MODEL}"
    small = x.dtype in (torch.int8, torch.uint8)
    if not x.is_floating_point() and is_parameter and (leaf in _WEIGHTS or small):
        return f"is an integer weight ({x.dtype}), which has no gradient; {_FLOAT_MODEL}"
    return None


def _is_distributed(x: Tensor) -> bool:
    return any(c.__name__ == "DTensor" for c in type(x).__mro__)


def _dispatches(kind: type) -> bool:
    """Whether a subclass of Tensor computes in a way of its own."""
    return getattr(kind, "__torch_dispatch__", None) not in (
        getattr(Tensor, "__torch_dispatch__", None),
        getattr(nn.Parameter, "__torch_dispatch__", None),
    )
