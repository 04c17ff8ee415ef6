"""CLIPs: fasttta's own, Hugging Face's, open_clip's and OpenAI's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..engine.precision import Precision, working_copy
from ..engine.step import environment
from ..models import CLIP
from ..models.clip.convert import convert_hugging_face, convert_open_clip, mask_length
from ..models.copies import replace_parameters, structural_copy
from ..protocols import FusionModel
from .base import Family, FusionFamily
from .class_names import token_ids
from .refusals import (
    NEEDED_OF_CLIP,
    altered,
    differences_from_clip,
    hook_advice,
    refuse_backward_hooks,
    refuse_wrapped_layers,
)

#: parts of a CLIP: Hugging Face's, OpenAI's (fasttta's too), open_clip's with a custom text tower
HUGGING_FACE = ("text_model", "vision_model", "visual_projection", "text_projection")
OPENAI = ("visual", "transformer", "token_embedding", "ln_final", "logit_scale")
CUSTOM_TEXT = ("visual", "text.transformer", "text.token_embedding", "text.ln_final", "logit_scale")
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}  # of the largest value; half: 2e-2

_Outputs = Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass
class ClipFamily(Family):
    """A CLIP. Methods adapt to each image separately.

    Attributes:
        outputs: (module, normalised pixels, ids) -> its image features and text features; None: the
            module is a ``fasttta.models.CLIP``.
    """

    model: CLIP
    outputs: _Outputs | None = None

    methods: ClassVar[tuple[str, ...]] = ("vision-language",)
    default_method: ClassVar[str] = "a-tpt"
    takes_classes: ClassVar[bool] = True

    @classmethod
    def of(cls, module: nn.Module, prefix: str) -> ClipFamily:
        """The family of a module with the parts of a CLIP.

        Raises:
            ValueError: it cannot be converted; the message says how it differs from a CLIP.
        """
        if isinstance(module, CLIP):
            name = "fasttta.models.CLIP"
            return cls(name, module, prefix, module if altered(module) else None, takes_images=True)
        hugging_face = "vision_model" in module._modules
        name = "Hugging Face CLIPModel" if hugging_face else "open_clip or OpenAI CLIP"
        refuse_wrapped_layers(module, name)
        try:
            clip = convert_hugging_face(module) if hugging_face else convert_open_clip(module)
        except (ValueError, AttributeError, KeyError) as error:
            differences = ", ".join(differences_from_clip(module))
            more = f". It is no CLIP: found {differences}; {NEEDED_OF_CLIP}" if differences else ""
            raise ValueError(
                f"{type(module).__name__} looks like {name}, but {error}{more}"
            ) from error
        return cls(
            name,
            clip,
            prefix,
            module,
            outputs=_hugging_face if hugging_face else _open_clip,
            takes_images=True,
        )

    def with_classes(
        self, classes: Any, prompt: str, precision: Precision, resources: Mapping[str, Any]
    ) -> ClipWithClasses:
        """The CLIP over the same weights with classes set, for methods that run on its features.

        Args:
            classes: names, or token ids [C, L].
            prompt: what stands around a name.
            precision: that class features are computed in.
            resources: ``"tokenizer"``, for names.

        Raises:
            ValueError, TypeError: the classes cannot be used.
        """
        ids = token_ids(classes, prompt, self.model.context_length, resources.get("tokenizer"))
        with torch.inference_mode(False), torch.no_grad():
            encoder, _ = working_copy(self.model, set(), precision)
            clip = structural_copy(self.model)
            with environment(self.model.positional_embedding.device, precision, grad=False):
                text = encoder.encode_text(ids)
                clip.class_features = text / text.norm(dim=-1, keepdim=True)
        fusion = cast(FusionModel, clip)  # "rada" turns it into one
        return ClipWithClasses(self.name, fusion, self.prefix, self.module, clip=self, ids=ids)

    @torch.no_grad()
    def verify(self, inputs: tuple[Tensor, ...]) -> bool:
        """Compares features of an image [1, 3, R, R] and of up to two classes ids [C, L] with the
        module's own, in its own precision.

        Returns, Raises: as ``Family.verify``; they differ by more than 1e-5 of the largest value
            (2e-2 in half precision).
        """
        if self.module is None:
            return True
        pixels, ids = inputs
        refuse_backward_hooks(self.name, self.module)
        clip = self._compared
        dtype = next(self.module.parameters()).dtype
        ids = ids[:2].to(pixels.device)
        x = clip._normalised(pixels).to(dtype)
        twin = structural_copy(self.module, hooks=True)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        ours = structural_copy(clip)
        replace_parameters(
            ours, lambda _, x: nn.Parameter(x.detach().to(wide), requires_grad=False)
        )
        for name, buffer in ours.named_buffers():
            path, _, leaf = name.rpartition(".")
            if buffer.is_floating_point():
                ours.get_submodule(path)._buffers[leaf] = buffer.to(wide)
        features = [ours.encode_image(pixels.to(wide)), ours.encode_text(ids)]
        features = [y.double() / y.double().norm(dim=-1, keepdim=True) for y in features]
        try:
            if isinstance(twin, CLIP):
                theirs = twin.encode_image(pixels.to(dtype)), twin.encode_text(ids)
                twin.class_features = features[1].to(dtype)
                logits = twin(pixels.to(dtype))
            else:
                assert self.outputs is not None
                theirs = self.outputs(twin, x, ids)
                logits = _own_logits(twin, x, ids)
        except Exception as error:
            raise ValueError(
                f"recognised as {self.name}, but its own forward fails: {error}"
            ) from error
        limit = _TOLERANCE.get(dtype, 2e-2)
        pairs = [
            (f"normalised {what} features", a, b.double() / b.double().norm(dim=-1, keepdim=True),
             limit)
            for what, a, b in zip(("image", "text"), features, theirs, strict=True)
        ]  # fmt: skip
        if logits is not None:
            scale = clip.logit_scale.double().exp()
            bound = limit * scale.item()
            pairs.append(("logits", scale * features[0] @ features[1].T, logits.double(), bound))
        for what, a, b, bound in pairs:
            off = (a - b).abs().max().item() if a.shape == b.shape else float("inf")
            if not off <= bound:
                raise ValueError(
                    f"recognised as {self.name}, but its own {what} differ from that "
                    f"architecture's by {off:.1e}, needed at most {float(bound):.0e}: is "
                    f"something in its forward patched?{hook_advice(self.module)}"
                )
        return True


@dataclass
class ClipWithClasses(FusionFamily):
    """A CLIP whose classes are set: images in, logits out. Compared as the CLIP is, by features.

    Attributes:
        clip: the CLIP without classes.
        ids: of the classes, [C, L].
    """

    clip: ClipFamily = field(kw_only=True)
    ids: Tensor = field(kw_only=True)

    def verify(self, inputs: tuple[Tensor, ...]) -> bool:
        """As ``ClipFamily.verify``, of the first image of a batch."""
        exact = Precision("exact", torch.float32, torch.float32)
        with environment(inputs[0].device, exact, grad=False):
            return self.clip.verify((inputs[0][:1], self.ids))

    def compare_again(self) -> None:
        """Makes the next ``verify`` compare the CLIP again."""
        self.clip.compare_again()


def _own_logits(module: nn.Module, pixels: Tensor, ids: Tensor) -> Tensor | None:
    """Logits [1, 2] of a call of the module; None if it takes or returns something else."""
    if type(module).forward is nn.Module.forward:  # it has none
        return None
    names = inspect.signature(module.forward).parameters
    if "pixel_values" in names and "input_ids" in names:
        return getattr(module(pixel_values=pixels, input_ids=ids), "logits_per_image", None)
    return None


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
    """Features of ids by the parts of a text tower whose mask is cut. Its encode_text adds all
    positions and fails, so users of such a model run the parts."""
    x = text.token_embedding(ids).to(text.ln_final.weight.dtype)
    x = x + text.positional_embedding[: ids.shape[1]].to(x)
    first = text.transformer.resblocks[0].attn.batch_first
    x = text.transformer(x if first else x.transpose(0, 1))
    x = x[0] if isinstance(x, tuple) else x
    x = text.ln_final(x if first else x.transpose(0, 1))
    x = x[torch.arange(len(ids), device=ids.device), ids.argmax(1)]
    return x @ text.text_projection.to(x)
