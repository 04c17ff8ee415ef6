"""Why a model cannot be adapted, and what to do about it: what every family refuses.

In the order in which ``recognise`` asks: hooks on wrappers, weights that cannot be computed with,
layers that others have wrapped, and models that no family knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..engine.model_watch import global_hooks
from ..files.weights import STAND_INS
from ..models.computed_weights import has_adapters, wrapping
from ..models.copies import CALLED

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
_WEIGHTS = ("weight", "bias", "in_proj_weight", "in_proj_bias")
_SHARDED = ("FullyShardedDataParallel", "FSDPModule", "XlaFullyShardedDataParallel")
_FLOAT_MODEL = "give the model as it was before: fasttta adapts in float32, float64 or bfloat16"
_MERGE = "merge them into plain layers first: model = peft_model.merge_and_unload()"

NEEDED_OF_CLIP = (
    "needed CLIP's architecture: an image tower (ViT with a class token, or OpenAI's ResNet with "
    "attention pooling), a causal text tower read at its end token, a projection of each into a "
    "joint space, and one logit_scale. Methods for single images replace token embeddings of that "
    "text tower and read that image tower's attention"
)
_IMAGE_TOWERS = ("vision_model", "visual", "vision_encoder", "image_encoder", "visual_encoder",
                 "vision_tower", "image_tower")  # fmt: skip
_TEXT_TOWERS = ("text_model", "text", "text_encoder", "text_decoder", "text_tower", "textual",
                "language_model")  # fmt: skip
_TPT_PARTS = ("image_encoder", "text_encoder", "prompt_learner")  # of ClipTestTimeTuning


def parts_of(module: nn.Module) -> set[str]:
    """Names of what is registered in a module itself: modules, parameters, buffers. (A wrapper of
    torch.compile passes other attributes on.)"""
    return {*module._modules, *module._parameters, *module._buffers}


def _few(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def hooked_modules(module: nn.Module) -> list[str]:
    """Names of the submodules that have hooks, for messages."""
    names = [
        name or type(module).__name__
        for name, child in module.named_modules()
        if any(vars(child).get(kind) for kind in CALLED)
    ]
    return names + (["every module (global hooks)"] if global_hooks() else [])


def hook_advice(module: nn.Module) -> str:
    """The sentence about hooks in a message about results that differ; "" without hooks."""
    names = hooked_modules(module)
    if not names:
        return ""
    return f" Hooks are registered on {_few(names, 4)}: remove those that change results."


def altered(module: nn.Module) -> bool:
    """Whether one of fasttta's models may compute something that its class does not: it is of a
    user's subclass, or has hooks."""
    ours = type(module).__module__.split(".")[0] == "fasttta"
    return not ours or bool(hooked_modules(module))


def refuse_wrapper_hooks(wrapper: nn.Module) -> None:
    """Raises ValueError if a wrapper (DataParallel, DDP, torch.compile), which fasttta bypasses,
    has hooks."""
    if any(vars(wrapper).get(kind) for kind in CALLED):
        raise ValueError(
            f"hooks are registered on the {type(wrapper).__name__} around the model, which fasttta "
            "does not run; register them on the module inside, or remove them"
        )


def refuse_backward_hooks(family: str, module: nn.Module) -> None:
    """Raises ValueError if a module whose forward fasttta replaces has backward hooks."""
    for name, child in module.named_modules():
        if child._backward_hooks or child._backward_pre_hooks:
            raise ValueError(
                f"recognised as {family}, but {name or type(module).__name__} has backward hooks, "
                "which gradients would have to pass; remove them (handle.remove())"
            )


def refuse_replaced_forwards(model: nn.Module) -> None:
    """Raises ValueError if a forward is bound to the object: in a copy it would still run the
    original's weights."""
    for name, child in model.named_modules():
        forward = vars(child).get("forward")
        if forward is None or (isinstance(forward, MethodType) and forward.__self__ is child):
            continue
        raise ValueError(
            f"the forward of {name or type(model).__name__} is replaced on the object (by a "
            "patch, torch.compile or a hook library), so that a copy would run the original's "
            "weights; pass the module as it was before"
        )


def refuse_unusable_weights(model: nn.Module) -> None:
    """Checks that every weight is a plain floating point tensor, on one device.

    Raises:
        ValueError: one is not; the message names the module and says what to do.
    """
    kinds: set[type] = set()
    for path, module in model.named_modules():
        packed = "_packed_params" in vars(module) or "_packed_params" in module._modules
        if packed or type(module) not in kinds:
            kinds.add(type(module))
            if (reason := _unusable_module(path, module, packed)) is not None:
                raise ValueError(reason)
    first: tuple[str, torch.device] | None = None
    for name, x, is_parameter in _tensors(model):
        plain = type(x) in (*_PLAIN, *STAND_INS)
        plain = plain and x.dtype in _FLOATS and x.layout == torch.strided
        reason = None if plain and not x.is_nested else _unusable_tensor(name, x, is_parameter)
        if reason is not None:
            raise ValueError(f"{name} {reason}")
        if x.is_meta:
            raise ValueError(_without_values(model))
        first = first or (name, x.device)
        if x.device != first[1]:
            raise ValueError(
                f"the model lies on several devices: {first[0]} on {first[1]}, {name} on "
                f"{x.device}; move it to one: model.to({str(first[1])!r})"
            )


def _tensors(model: nn.Module) -> list[tuple[str, Tensor, bool]]:
    """Names and values of a model's tensors, and whether they are parameters."""
    parameters = [(name, x, True) for name, x in model.named_parameters()]
    return parameters + [(name, x, False) for name, x in model.named_buffers()]


def _unusable_module(path: str, module: nn.Module, packed: bool) -> str | None:
    """Why fasttta cannot compute with the weights of a module, whatever its tensors are;
    ``packed``: it keeps them in a separate object."""
    where, kind = path or "the model", type(module)
    if any(c.__name__ in _SHARDED for c in kind.__mro__):
        return (
            f"{where} is sharded ({kind.__name__}): its weights lie in parts on several "
            "processes; gather them into a plain model first (the full state dict, loaded into "
            "a model that is not wrapped)"
        )
    if isinstance(module, torch.jit.ScriptModule):
        return (
            f"{where} is a TorchScript module, whose forward cannot run other weights; give "
            "the model as it was before torch.jit.script or torch.jit.trace. A CLIP can be made of "
            "its weights: fasttta.models.CLIP.from_checkpoint(model.state_dict())"
        )
    quantised = "quantized" in kind.__module__.split(".") and kind.__module__.startswith(
        ("torch.ao.nn.", "torch.nn.")
    )
    if quantised or packed:
        return (
            f"{where} ({kind.__module__}.{kind.__name__}) holds quantised weights, which have "
            f"no gradient; {_FLOAT_MODEL}"
        )
    return None


def _without_values(model: nn.Module) -> str:
    tensors = (*model.named_parameters(), *model.named_buffers())
    empty = [name for name, x in tensors if x.is_meta]
    return (
        f"{type(model).__name__} has {len(empty)} of its {len(tensors)} tensors on the meta "
        f"device, {empty[0]} first: they hold no values; load its weights before: "
        'model.to_empty(device="cpu"), then model.load_state_dict(...)'
    )


def _unusable_tensor(name: str, x: Tensor, is_parameter: bool) -> str | None:
    """Why fasttta cannot compute with a tensor; None if it can."""
    kind = type(x)
    if is_lazy(x):
        return (
            "holds no weights yet (it is of a lazy module); run the model once on a batch, which "
            "makes them, and then adapt"
        )
    if any(c.__name__ == "DTensor" for c in kind.__mro__):
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
    dispatch = getattr(kind, "__torch_dispatch__", None)  # a subclass that overrides operations
    if kind not in _PLAIN and dispatch not in (
        getattr(plain, "__torch_dispatch__", None) for plain in _PLAIN
    ):
        return (
            f"is a {kind.__module__}.{kind.__name__}, not a plain tensor (quantised by a "
            f"library?); {_FLOAT_MODEL}"
        )
    if x.is_complex():
        return f"is complex ({x.dtype}); needed real weights"
    weight = name.rpartition(".")[2] in _WEIGHTS
    if x.is_floating_point() and x.dtype not in _FLOATS and (is_parameter or weight):
        return f"is stored in {x.dtype}, which needs scales to compute with; {_FLOAT_MODEL}"
    small = x.dtype in (torch.int8, torch.uint8)
    if not x.is_floating_point() and is_parameter and (weight or small):
        return f"is an integer weight ({x.dtype}), which has no gradient; {_FLOAT_MODEL}"
    return None


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
    """Checks that a module whose weights fasttta runs in its architecture has plain layers.

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


def refuse_unknown(model: nn.Module, inner: nn.Module, cavmae_parts: Sequence[str]) -> NoReturn:
    """Says why a model belongs to no family.

    Args:
        model: as the user gave it; inner: what its wrappers hold.
        cavmae_parts: names of the parts of a CAV-MAE, to say which of them are missing.

    Raises:
        TypeError: always.
    """
    kind = type(model).__name__
    if hint := adapters_hint(inner):
        raise TypeError(f"{kind} is not a model that fasttta knows: {hint}")
    parts = parts_of(inner)
    if set(_TPT_PARTS) <= parts:
        raise TypeError(
            f"{type(inner).__name__} is a wrapper of TPT's line ({', '.join(_TPT_PARTS)}), which "
            "does not hold the CLIP's token embeddings. Pass the CLIP that it was made of, and of "
            "learner = wrapper.prompt_learner the classes: fasttta.adapt(clip, method, "
            "classes=learner.tokenized_prompts, prompt_length=learner.n_ctx); a prompt that was "
            'learned goes on by adapted.load_tuned({"prompt": learner.ctx})'
        )
    if towers := _towers(parts):
        differences = differences_from_clip(inner) or ["none of the parameters of CLIP's towers"]
        raise TypeError(
            f"{type(inner).__name__} is a dual encoder ({', '.join(towers)}), not a CLIP: found "
            f"{', '.join(differences)}; {NEEDED_OF_CLIP}. If its modalities meet in a fusion "
            "transformer, describe that: fasttta.adapt(model, "
            "spec=fasttta.ModelSpec.detect(model, *inputs))"
        )
    has = [part for part in cavmae_parts if part in parts]
    lacks = [part for part in cavmae_parts if part not in has]
    near = f"; of a CAV-MAE it has {', '.join(has)} but not {', '.join(lacks)}" if has else ""
    children = ", ".join(name for name, _ in list(inner.named_children())[:8]) or "none"
    raise TypeError(
        f"{kind} is not a model that fasttta knows; looked for "
        f"fasttta.models.CAVMAE or a module with its parts, found children {children}{near}. Any "
        "other fusion transformer needs to be told where its parts are: fasttta.adapt(model, "
        "spec=fasttta.ModelSpec.detect(model, *inputs)), or a ModelSpec written by hand; fasttta "
        "inspect package.module:name --input SHAPE --input SHAPE --emit-spec prints one"
    )


def _towers(parts: set[str]) -> list[str]:
    """Names of the image and text towers among a dual encoder's parts; empty: it is none."""
    image = [name for name in _IMAGE_TOWERS if name in parts]
    text = [name for name in _TEXT_TOWERS if name in parts]
    if not text and {"token_embedding", "transformer"} <= parts:
        text = ["token_embedding, transformer"]
    return [*image, *text] if image and text else []


def differences_from_clip(model: nn.Module) -> list[str]:
    """How a dual encoder differs from CLIP, in words; empty if it is no dual encoder, or has
    none of these differences."""
    parts = parts_of(model)
    if not _towers(parts):
        return []
    names = [f".{name}." for name, _ in model.named_parameters()]

    def has(*pieces: str) -> bool:
        return any(piece in name for name in names for piece in pieces)

    lacks = sorted({"visual_projection", "text_projection"} - parts)
    differences = (
        ("logit_bias" in parts, "a logit_bias (a sigmoid loss, as SigLIP has)"),
        ("temperature" in parts, "a temperature (as ALIGN has)"),
        ("logit_scale" not in parts, "no logit_scale"),
        (has(".word_embeddings."),
         "a text tower with word_embeddings (BERT's, which is not causal)"),
        (has(".head.probe.", ".attn_pool.", ".head.attention."),
         "an image tower pooled by attention, without a class token"),
        (has(".trunk."), "an image tower of timm (trunk)"),
        (has("depthwise_conv", "image_model.encoder.blocks"), "a convolutional image tower"),
        ("text_decoder" in parts, "a text_decoder (as CoCa has)"),
        ("vision_model" in parts and bool(lacks), f"no {' and no '.join(lacks)}"),
    )  # fmt: skip
    return [words for present, words in differences if present]
