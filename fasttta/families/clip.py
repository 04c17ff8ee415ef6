"""Vision-language models told by their structure, and compared with their own forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..models import CLIP
from ..models.clip.convert import convert_hugging_face, convert_open_clip, mask_length
from ..models.copies import own_buffers, structural_copy
from .dual import NEEDED, refusal, towers, traits
from .self_check import altered, hook_advice, refuse_backward_hooks, refuse_wrapper_hooks
from .weights import refuse_unusable
from .wrapped import adapters_hint, refuse_wrapped_layers

_HUGGING_FACE = ("text_model", "vision_model", "visual_projection", "text_projection")
_OPENAI = ("visual", "transformer", "token_embedding", "ln_final")
_CUSTOM_TEXT = ("visual", "text")
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}  # of the largest value; half: 2e-2


@dataclass
class RecognisedCLIP:
    """A user's module as episodic methods see it.

    Attributes:
        family: its name, for messages.
        clip: the model that fasttta runs; shares the module's weights.
        module: the part that was recognised, to be compared with; None if it is ``clip`` itself.
        outputs: (module, normalised pixels, ids) -> its image features and text features.
        structure: ``clip`` as it was when it was adapted, with buffers of its own.
    """

    family: str
    clip: CLIP
    module: nn.Module | None = field(default=None, repr=False)
    outputs: Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    structure: Any = field(default=None, repr=False)

    def compare_again(self) -> None:
        """Has the next ``verify`` compare: the module's hooks or classes are others by now."""
        if self.module is None:
            self.module = self.clip

    def keep_structure(self) -> None:
        """Has every later ``verify`` compare with what ``clip`` is now: a user's module may get
        other classes and buffers, which what adapts does not have."""
        self.structure = structural_copy(self.clip, lambda name, parameter: parameter)
        own_buffers(self.structure, None)

    @torch.no_grad()
    def verify(self, pixels: Tensor, ids: Tensor) -> None:
        """Compares features of an image [1, 3, R, R] and of up to two classes ids [C, L] with the
        module's own, in its own precision.

        Raises:
            ValueError: they differ by more than 1e-5 of the largest value (2e-2 in half
                precision), or its forward fails.
        """
        if self.module is None:
            return
        refuse_backward_hooks(self.family, self.module)
        clip = self.clip if self.structure is None else self.structure
        dtype = next(self.module.parameters()).dtype
        ids = ids[:2].to(pixels.device)
        x = clip._normalised(pixels).to(dtype)
        own = structural_copy(self.module, lambda name, parameter: parameter, hooks=True)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        ours = structural_copy(clip, lambda name, parameter: _as(parameter, wide))
        for name, buffer in ours.named_buffers():
            path, _, leaf = name.rpartition(".")
            if buffer.is_floating_point():
                ours.get_submodule(path)._buffers[leaf] = buffer.to(wide)
        found = [ours.encode_image(pixels.to(wide)), ours.encode_text(ids)]
        found = [y.double() / y.double().norm(dim=-1, keepdim=True) for y in found]
        try:
            if isinstance(own, CLIP):
                theirs = own.encode_image(pixels.to(dtype)), own.encode_text(ids)
                own.class_features = found[1].to(dtype)
                logits = own(pixels.to(dtype))
            else:
                assert self.outputs is not None
                theirs = self.outputs(own, x, ids)
                logits = _own_logits(own, x, ids)
        except Exception as error:
            raise ValueError(
                f"recognised as {self.family}, but its own forward fails: {error}"
            ) from error
        limit = _TOLERANCE.get(dtype, 2e-2)
        pairs = [
            (f"normalised {what} features", a, b.double() / b.double().norm(dim=-1, keepdim=True),
             limit)
            for what, a, b in zip(("image", "text"), found, theirs, strict=True)
        ]  # fmt: skip
        if logits is not None:
            scale = clip.logit_scale.double().exp()
            bound = limit * scale.item()
            pairs.append(("logits", scale * found[0] @ found[1].T, logits.double(), bound))
        for what, a, b, bound in pairs:
            off = (a - b).abs().max().item() if a.shape == b.shape else float("inf")
            if not off <= bound:
                raise ValueError(
                    f"recognised as {self.family}, but its own {what} differ from that "
                    f"architecture's by {off:.1e}, needed at most {float(bound):.0e}: is "
                    f"something in its forward patched?{hook_advice(self.module)}"
                )


def _own_logits(module: nn.Module, pixels: Tensor, ids: Tensor) -> Tensor | None:
    """Logits [1, 2] of a module's own call; None where it returns something else, or takes it."""
    if type(module).forward is nn.Module.forward:  # it has none
        return None
    names = inspect.signature(module.forward).parameters
    if "pixel_values" in names and "input_ids" in names:
        return getattr(module(pixel_values=pixels, input_ids=ids), "logits_per_image", None)
    return None


def _as(parameter: nn.Parameter | None, dtype: torch.dtype) -> nn.Parameter | None:
    if parameter is None:
        return None
    return nn.Parameter(parameter.detach().to(dtype), requires_grad=False)


def recognise_clip(model: object) -> RecognisedCLIP | None:
    """The model as episodic methods see it: ``fasttta.models.CLIP``, Hugging Face's ``CLIPModel``,
    open_clip's or OpenAI's CLIP; in DataParallel, DDP or torch.compile or not. None: none of them.

    Raises:
        ValueError: it has the parts of one but cannot be converted; says what it has otherwise.
        TypeError: a TorchScript module; another dual encoder (SigLIP, ALIGN, ...).
    """
    while isinstance(model, nn.Module):
        if isinstance(model, CLIP):
            refuse_unusable(model)
            return RecognisedCLIP("fasttta.models.CLIP", model, model if altered(model) else None)
        if _has(model, _HUGGING_FACE) and hasattr(model, "config"):
            family, convert, outputs = "Hugging Face CLIPModel", convert_hugging_face, _hugging_face
            break
        text = getattr(model, "text", None)
        custom = (
            _has(model, _CUSTOM_TEXT) and isinstance(text, nn.Module) and _has(text, _OPENAI[1:])
        )
        if (_has(model, _OPENAI) or custom) and hasattr(model, "logit_scale"):
            family, convert, outputs = "open_clip or OpenAI CLIP", convert_open_clip, _open_clip
            break
        inner = "module" if isinstance(
            model, (nn.DataParallel, nn.parallel.DistributedDataParallel)
        ) else "_orig_mod" if type(model).__name__ == "OptimizedModule" else None  # fmt: skip
        if inner is not None:
            refuse_wrapper_hooks(model)
        if inner is None:
            if hint := adapters_hint(model):
                raise TypeError(f"{type(model).__name__} is not a model that fasttta knows: {hint}")
            if reason := refusal(model):
                raise TypeError(reason)
            return None
        model = getattr(model, inner)
    else:
        return None
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "a TorchScript CLIP cannot be adapted as it is; take its weights: "
            "fasttta.models.CLIP.from_checkpoint(model.state_dict())"
        )
    refuse_unusable(model)
    refuse_wrapped_layers(model, family)
    try:
        clip = convert(model)
    except (ValueError, AttributeError, KeyError) as error:
        others = traits(model) if towers(model) else []
        found = f". It is no CLIP: found {', '.join(others)}; {NEEDED}" if others else ""
        raise ValueError(
            f"{type(model).__name__} looks like {family}, but {error}{found}"
        ) from error
    return RecognisedCLIP(family, clip, model, outputs)


def _has(module: nn.Module, parts: tuple[str, ...]) -> bool:
    return all(part in module._modules or part in module._parameters for part in parts)


def _feature(x: Any) -> Tensor:
    """transformers 5 returns an output object where 4 returned the tensor."""
    return x if isinstance(x, Tensor) else x.pooler_output


def _hugging_face(module: Any, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    image = module.get_image_features(pixel_values=pixels)
    return _feature(image), _feature(module.get_text_features(input_ids=ids))


def _open_clip(module: Any, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    # those modules take ids of the whole context only
    text: Any = getattr(module, "text", module)
    if (cut := mask_length(text)) is not None:
        return module.encode_image(pixels), _cut_text(text, ids[:, :cut])
    length = text.positional_embedding.shape[0]
    ids = torch.nn.functional.pad(ids[:, :length], (0, max(0, length - ids.shape[1])))
    return module.encode_image(pixels), module.encode_text(ids)


def _cut_text(text: Any, ids: Tensor) -> Tensor:
    """Features of ids by the parts of a text tower whose mask is cut: its own encode_text adds all
    positions and fails, its users run the parts."""
    x = text.token_embedding(ids).to(text.ln_final.weight.dtype)
    x = x + text.positional_embedding[: ids.shape[1]].to(x)
    first = text.transformer.resblocks[0].attn.batch_first
    x = text.transformer(x if first else x.transpose(0, 1))
    x = x[0] if isinstance(x, tuple) else x
    x = text.ln_final(x if first else x.transpose(0, 1))
    x = x[torch.arange(len(ids), device=ids.device), ids.argmax(1)]
    return x @ text.text_projection.to(x)
