"""Layers of a recognised architecture that are wrapped by others: adapters, parametrisations."""

from __future__ import annotations

from torch import nn

from ..models.computed_weights import has_adapters, wrapping

_MERGE = "merge them into plain layers first: model = peft_model.merge_and_unload()"


def adapters_hint(model: nn.Module) -> str | None:
    """What to do with a model in a wrapper of peft; None: it is in none."""
    peft = any(c.__module__.partition(".")[0] == "peft" for c in type(model).__mro__)
    if peft or hasattr(model, "merge_and_unload"):
        return (
            f"it is wrapped by {type(model).__name__} with adapters (LoRA or the like); {_MERGE}. "
            "Or, to keep them unmerged and frozen, describe the model with a ModelSpec whose "
            "names begin with base_model.model"
        )
    return None


def refuse_wrapped_layers(model: nn.Module, family: str) -> None:
    """Checks that a module whose weights fasttta runs in its own architecture has plain layers.

    Raises:
        ValueError: names the layers that are not, and says how to make them plain.
    """
    names = [name for name, module in model.named_modules() if name and has_adapters(module)]
    if names:
        raise ValueError(
            f"{type(model).__name__} looks like {family}, but {_few(names)} hold adapters (LoRA or "
            f"the like); {_MERGE}"
        )
    for name, module in model.named_modules():
        if name and type(module).__name__ == "OptimizedModule":
            raise ValueError(
                f"{type(model).__name__} looks like {family}, but {name} is compiled on its own "
                f"(torch.compile); put back what is inside, model.{name}._orig_mod, or compile the "
                "whole model"
            )
        for part in ("weight", "bias", "in_proj_weight"):
            if (how := wrapping(module, part)) is not None:
                raise ValueError(
                    f"{type(model).__name__} looks like {family}, but {name}.{part} is no plain "
                    f"parameter: {how}"
                )


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
