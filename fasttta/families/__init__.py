"""Recognises the family of a user's model by its structure, without importing its code."""

from __future__ import annotations

from torch import nn

from ..methods import Episodic, Method, RAda, Source, names
from ..models import ModelWithHead
from ..models.copies import own_buffers, structural_copy
from ..models.specified.spec import ModelSpec
from . import cavmae, clip
from .base import Family, FusionFamily
from .cavmae import CavmaeFamily
from .clip import ClipFamily
from .rational import RationalFamily
from .refusals import parts_of, refuse_unknown, refuse_unusable_weights, refuse_wrapper_hooks
from .specified import SpecifiedFamily

__all__ = ["Family", "FusionFamily", "adapted_as", "recognise"]


def recognise(model: nn.Module, spec: ModelSpec | None = None) -> Family:
    """The family of a model: ``fasttta.models.CAVMAE``, a FeatureClassifier or CLIP, any module
    with the parts of an official CAV-MAE or of a CLIP, or with a spec any fusion transformer; in
    DataParallel, DDP or torch.compile or not. Prompts of BriMPR's PromptVA are kept.

    Raises:
        TypeError: it belongs to no family; the message says what was looked for and found.
        ValueError: it looks like one but cannot be converted, or the spec does not fit.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, found {type(model).__name__}")
    inner, prefix, holder = _unwrapped(model, prompted=spec is None)
    refuse_unusable_weights(model)
    family: Family
    if spec is not None:
        family = SpecifiedFamily.of(inner, prefix, spec)
    elif isinstance(inner, ModelWithHead):
        family = RationalFamily.of(inner, prefix)
    elif _has(inner, cavmae.PARTS):
        family = CavmaeFamily.of(inner, prefix, holder)
    elif any(_has(inner, parts) for parts in (clip.OPENAI, clip.CUSTOM_TEXT)) or (
        _has(inner, clip.HUGGING_FACE) and hasattr(inner, "config")
    ):
        family = ClipFamily.of(inner, prefix)
    else:
        refuse_unknown(model, inner, cavmae.PARTS)
    family.structure = structural_copy(family.model)
    own_buffers(family.structure, None)
    return family


def adapted_as(family: Family, method: Method) -> str:
    """How models of a family run a method: ``"batches"``, a stream of them; ``"images"``, each an
    episode; ``"head"``, images or batches of them under a head over their features.

    Raises:
        ValueError: the family does not run the method; the message says which methods it runs.
    """
    kind = type(method)
    if family.takes_images and isinstance(method, RAda):
        return "head"
    if not set(family.methods).intersection(kind.families):
        runs = {name: None for each in family.methods for name in names(each)}
        raise ValueError(
            f"{method.name!r} adapts {' and '.join(kind.families)} models, found {family.name}; "
            f"for it: {', '.join(map(repr, runs))}"
        )
    if isinstance(family, FusionFamily):
        return "batches"
    if isinstance(method, Episodic) or kind is Source:
        return "images"
    raise ValueError(
        f"{kind.__name__} is not run on {family.name}: every image is an episode there, "
        "and the objective of a step is not called; derive it from fasttta.methods.Episodic and "
        "define predict(self, model, seen, state) -> Prediction"
    )


def _unwrapped(
    model: nn.Module, prompted: bool
) -> tuple[nn.Module, str, tuple[nn.Module, str] | None]:
    """The model inside its wrappers, its place, and BriMPR's PromptVA with its place, if that is
    among the wrappers (looked for with ``prompted`` only).

    Raises:
        ValueError: a wrapper has hooks.
    """
    inner, prefix, holder = model, "", None
    while True:
        kind = type(inner)
        plain = any(
            isinstance(inner, wrapper) and kind.forward is wrapper.forward  # not overridden
            for wrapper in (nn.DataParallel, nn.parallel.DistributedDataParallel)
        )
        if plain:
            name = "module"
        elif kind.__name__ == "OptimizedModule":  # torch.compile
            name = "_orig_mod"
        elif prompted and _has(inner, cavmae.PROMPTED_PARTS):
            name, holder = "va_model", (inner, prefix)
        else:
            return inner, prefix, holder
        refuse_wrapper_hooks(inner)
        inner, prefix = getattr(inner, name), f"{prefix}{name}."


def _has(module: nn.Module, parts: tuple[str, ...]) -> bool:
    """Whether a module has parts of these names, dotted ones inside others."""
    names = parts_of(module)
    for name, held in module._modules.items():
        if held is not None and any(part.startswith(f"{name}.") for part in parts):
            names |= {f"{name}.{inner}" for inner in parts_of(held)}
    return names.issuperset(parts)
