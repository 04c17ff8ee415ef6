"""Weights that a module does not keep as a plain parameter: what keeps them, and how to undo it."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn.utils import parametrize


def wrapping(module: nn.Module, part: str) -> str | None:
    """How a module makes its weight ``part``, and what to type to have a plain one; None: it is a
    plain parameter, or none at all."""
    if parametrize.is_parametrized(module, part):
        made = cast(nn.ModuleDict, module.parametrizations)[part]
        kinds = ", ".join(type(p).__name__.strip("_") for p in cast(nn.ModuleList, made))
        return (
            f"it is parametrised ({kinds}); "
            f'torch.nn.utils.parametrize.remove_parametrizations(module, "{part}") makes it plain'
        )
    for hook in module._forward_pre_hooks.values():
        kind, tensor = type(hook), getattr(hook, "name", getattr(hook, "_tensor_name", None))
        if tensor != part or not kind.__module__.startswith("torch.nn.utils."):
            continue
        if kind.__module__.endswith("prune"):
            return f'it is pruned; torch.nn.utils.prune.remove(module, "{part}") makes it plain'
        undo = {"WeightNorm": "remove_weight_norm", "SpectralNorm": "remove_spectral_norm"}
        call = f"torch.nn.utils.{undo.get(kind.__name__, 'parametrize.remove_parametrizations')}"
        return f"{kind.__name__} computes it before each call; {call}(module) makes it plain"
    if has_adapters(module):
        return (
            "its layer holds adapters (LoRA or the like, from peft); model = "
            "peft_model.merge_and_unload() makes plain layers of them"
        )
    return None


def has_adapters(module: nn.Module) -> bool:
    """Whether it is a layer of peft around a layer of the model."""
    kinds = (c.__module__.partition(".")[0] for c in type(module).__mro__)
    return "peft" in kinds or ("base_layer" in module._modules and "lora_A" in module._modules)


def how_to_unwrap(model: nn.Module, name: str) -> str:
    """Why a name ("layers.0.query.weight") is no parameter of a model, and what to do."""
    path, _, part = name.rpartition(".")
    try:
        holder = model.get_submodule(path)
    except AttributeError:
        return f"{type(model).__name__} has no module {path!r}"
    if (how := wrapping(holder, part)) is not None:
        return how
    for above in range(path.count(".") + 1, 0, -1):
        outer = model.get_submodule(".".join(path.split(".")[:above]))
        if has_adapters(outer):
            return wrapping(outer, part) or ""
    kind = type(holder).__name__
    value = getattr(holder, part, None)
    if isinstance(value, Tensor):
        same = [n for n, p in model.named_parameters() if p is value]
        if same:
            return f"it is the same parameter as {same[0]} (tied), which cannot be tuned"
        return f"{kind} computes it rather than keeps it as a parameter"
    if callable(value):
        return f"{kind} keeps it in another form (quantised or packed weights?)"
    return f"{kind} has no parameter {part!r}"
