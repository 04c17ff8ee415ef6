"""CLIP in OpenAI's architecture: image tower (ViT or ResNet), text tower, joint space."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...views.views import shown
from ..blocks.layers import ACTIVATIONS, Linear, PackedAttention
from ..rational.models import RationalCLIP, fresh_head
from ..state_dicts import check_keys
from .checkpoint import infer_clip_sizes, read_clip_state
from .resnet import Conv, ModifiedResNet
from .text import Prompts
from .vision_transformer import (
    ROLLOUTS,
    AttentionMaps,
    PatchConv,
    Transformer,
    VisionTransformer,
    normalise_map,
)

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of OpenAI's pixel normalisation
STD = (0.26862954, 0.26130258, 0.27577711)
# Views in one pass. CPU: activations of a ViT-B/16 stay near the cache (and as many values of a
# smaller model: 256 views of 65 x 64 take 134 ms in one pass, 182 in pieces of 16); GPU: large
# products.
_VIEWS = {"cpu": 16, "cuda": 256}
_VALUES = 16 * 197 * 768


class CLIP(nn.Module):
    """Contrastive image-text model; pixels are in [0, 1] and normalised inside.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language
    Supervision", ICML 2021; parameter names are those of OpenAI's checkpoints.
    ``from_checkpoint`` is the usual way to make one.

    Args:
        embed_dim: E, of the joint space.
        vision: arguments of ``VisionTransformer``, or (with ``layers``) of ``ModifiedResNet``.
        text: ``dim``, ``depth``, ``heads``, ``hidden``, ``context_length``, ``vocabulary``.
        activation: ``"quick_gelu"`` (OpenAI) or ``"gelu"``, of both towers.
        mean, std: [3] of the pixel normalisation.
    """

    pixel_mean: Tensor  # [3, 1, 1]
    pixel_std: Tensor

    def __init__(
        self,
        embed_dim: int,
        vision: Mapping[str, Any],
        text: Mapping[str, Any],
        activation: str = "quick_gelu",
        mean: tuple[float, ...] = MEAN,
        std: tuple[float, ...] = STD,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            names = ", ".join(map(repr, ACTIVATIONS))
            raise ValueError(f"activation={activation!r} is unknown; known: {names}")
        self.visual: ModifiedResNet | VisionTransformer
        if "layers" in vision:
            self.visual = ModifiedResNet(**vision, embed_dim=embed_dim)
        else:
            self.visual = VisionTransformer(**vision, embed_dim=embed_dim, activation=activation)
        dim = text["dim"]
        self.token_embedding = nn.Embedding(text["vocabulary"], dim)
        self.positional_embedding = nn.Parameter(torch.zeros(text["context_length"], dim))
        self.transformer = Transformer(
            dim, text["depth"], text["heads"], text["hidden"], activation
        )
        self.ln_final = nn.LayerNorm(dim)
        self.text_projection = nn.Parameter(torch.zeros(dim, embed_dim))
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.mean, self.std = tuple(mean), tuple(std)
        self._set_pixel_scale(self.logit_scale.device)
        self.class_features: Tensor | None = None  # [C, E], normalised
        # ids [C, L] -> end positions [C]; None: that of the largest id
        self.find_end: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def from_checkpoint(cls, path_or_state_dict: str | os.PathLike | Mapping[str, Tensor]) -> CLIP:
        """The model of a checkpoint in OpenAI's names; every size follows from shapes.

        Args:
            path_or_state_dict: a TorchScript archive (as OpenAI publishes; opened for its weights),
                a safetensors or torch file of a state dict, or a state dict. Half-precision
                weights are widened to float32.

        Raises:
            FileNotFoundError, ValueError: no such file, or it is damaged or of another model;
                keys are missing, unknown or of a wrong shape (all named).
        """
        state = read_clip_state(path_or_state_dict)
        return cls.from_tensors(state, infer_clip_sizes(state))

    @classmethod
    def from_tensors(cls, state: Mapping[str, Tensor], sizes: Mapping[str, Any]) -> CLIP:
        """The model over these very tensors, named as in ``state_dict()``: nothing is copied.

        Raises:
            ValueError: keys are missing, unknown or of a wrong shape (all named).
        """
        with torch.device("meta"):
            model = cls(**sizes)
        for name, buffer in model.named_buffers():
            if name.endswith("num_batches_tracked"):
                path, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(path), leaf, torch.zeros_like(buffer, device="cpu"))
        shapes = {
            name: x.shape
            for name, x in model.state_dict().items()
            if not name.endswith("num_batches_tracked")
        }
        check_keys(state, shapes, "a CLIP checkpoint")
        model.load_state_dict(state, assign=True, strict=False)
        model._set_pixel_scale(model.positional_embedding.device)
        return model.eval().requires_grad_(False)

    def _set_pixel_scale(self, device: torch.device, dtype: torch.dtype = torch.float64) -> None:
        """Holds mean and standard deviation as buffers: on a GPU a tensor made of numbers of the
        host for each pass would wait for all work before it. They are float64, whatever type the
        model is converted to: one type and then another would round them twice. The working copy
        of a model has them in its precision."""
        with torch.inference_mode(False):
            for name, values in (("pixel_mean", self.mean), ("pixel_std", self.std)):
                x = torch.tensor(values, dtype=dtype, device=device)
                self.register_buffer(name, x[:, None, None], persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CLIP:
        super()._apply(fn, recurse)
        self._set_pixel_scale(self.pixel_mean.device)
        return self

    @property
    def resolution(self) -> int:
        """R: images are [N, 3, R, R]."""
        return self.visual.resolution

    @property
    def grid(self) -> int:
        """G: attention maps are [N, G, G]."""
        return self.visual.grid

    @property
    def context_length(self) -> int:
        """L, the most tokens that the text tower takes."""
        return self.positional_embedding.shape[0]

    @property
    def num_classes(self) -> int | None:
        """C, the number of classes; None: no classes are set."""
        return None if self.class_features is None else len(self.class_features)

    @property
    def map_kind(self) -> str:
        """Where attention maps come from: ``"rollout"`` (ViT) or ``"grad-cam"`` (ResNet)."""
        return "grad-cam" if isinstance(self.visual, ModifiedResNet) else "rollout"

    def check_pixels(self, pixels: Tensor) -> None:
        """Raises ValueError or TypeError unless images can be used: floating point [N, 3, R, R] on
        the model's device and, on a CPU, finite and within [0, 1], up to the rounding of a
        perturbed image.
        """
        size, device = self.resolution, self.positional_embedding.device
        if not isinstance(pixels, Tensor):
            raise TypeError(f"pixels must be a tensor, found {type(pixels).__name__}")
        if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size) or not len(pixels):
            raise ValueError(f"pixels must be [N, 3, {size}, {size}], found {list(pixels.shape)}")
        if not pixels.is_floating_point():
            raise TypeError(f"pixels must be floating point in [0, 1], found {pixels.dtype}")
        if pixels.device != device:
            raise ValueError(f"pixels is on {pixels.device}, the model on {device}")
        if device.type != "cpu":
            return
        low, high = (x.item() for x in pixels.detach().aminmax())
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # NaN fails too
            if not torch.isfinite(pixels).all():
                raise ValueError("pixels holds non-finite values (NaN or infinity)")
            raise ValueError(
                f"pixels runs {shown(low, high)}, needed [0, 1]: it looks like normalised "
                "input; CLIP normalises inside: give the image as before Normalize"
            )

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Features of images, not normalised; differentiable with respect to the pixels.

        Args:
            pixels: [N, 3, R, R] in [0, 1].

        Returns:
            [N, E].

        Raises:
            ValueError, TypeError: wrong shape, type or device; pixels outside [0, 1].
        """
        self.check_pixels(pixels)
        return self._pieces(self._encode, pixels)

    def _encode(self, pixels: Tensor) -> Tensor:
        return self.visual(self._normalised(pixels))

    def _normalised(self, pixels: Tensor) -> Tensor:
        master = self.positional_embedding.dtype
        if self.pixel_mean.device != pixels.device:  # weights were assigned to a model on meta
            self._set_pixel_scale(pixels.device, self.pixel_mean.dtype)
        mean, std = self.pixel_mean.to(master), self.pixel_std.to(master)
        return (pixels.to(master) - mean) / std

    def _pieces(self, function, pixels: Tensor, *rows: Tensor):
        """A function of views [N, 3, R, R] and rows [N, ...], a piece at a time without a graph."""
        size = _VIEWS["cuda" if pixels.is_cuda else "cpu"]
        if isinstance(self.visual, VisionTransformer):
            size = max(size, _VALUES // self.visual.positional_embedding.numel())
        if len(pixels) <= size or (torch.is_grad_enabled() and pixels.requires_grad):
            return function(pixels, *rows)
        parts = [
            function(*piece)
            for piece in zip(*(x.split(size) for x in (pixels, *rows)), strict=True)
        ]
        return torch.cat(parts) if isinstance(parts[0], Tensor) else type(parts[0]).cat(parts)

    def encode_text(self, ids: Tensor) -> Tensor:
        """Features of token ids [C, L] int64 (ending at their EOT), not normalised: [C, E].

        Raises:
            ValueError, TypeError: wrong shape, type, or longer than the context.
        """
        return self.prompts(ids).features()[0]

    def prompts(self, ids: Tensor, length: int = 0) -> Prompts:
        """The text tower on a list of classes, as a function of the prompt's embeddings.

        Args:
            ids: [C, L] int64 token ids; a row ends at its EOT, the largest id.
            length: tokens after SOT that the prompt replaces, which all rows must share.

        Raises:
            ValueError, TypeError: as said in the message.
        """
        if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
            kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
            raise TypeError(f"token ids must be an int64 tensor [C, L], found {kind}")
        if ids.ndim != 2 or not ids.numel():
            raise ValueError(f"token ids must be [C, L], found {list(ids.shape)}")
        ids = ids.detach().cpu()
        ends = ids.argmax(1) if self.find_end is None else self.find_end(ids)
        if ids.min() < 0 or ids.max() >= len(self.token_embedding.weight):
            raise ValueError(
                f"token ids run from {ids.min()} to {ids.max()}, the vocabulary has "
                f"{len(self.token_embedding.weight)}"
            )
        if ends.max() >= self.context_length:
            row = int(ends.argmax())
            raise ValueError(
                f"class {row} has {int(ends[row]) + 1} tokens, the context {self.context_length}: "
                "shorten its name or the prompt"
            )
        if ends.min() <= length:
            row = int(ends.argmin())
            raise ValueError(
                f"class {row} ends at token {int(ends[row])}, needed more than SOT and the "
                f"{length} tokens of the prompt"
            )
        if (ids[:, : 1 + length] != ids[:1, : 1 + length]).any():
            raise ValueError(
                f"prompt_length={length}: the classes differ within their first {1 + length} "
                "tokens (SOT and prompt), which they must share; give a smaller prompt_length"
            )
        return Prompts(self, ids, ends, length)

    def set_classes(self, ids: Tensor) -> CLIP:
        """Makes ``model(pixels)`` predict these classes: token ids [C, L] int64. Returns itself."""
        with torch.inference_mode(False), torch.no_grad():
            text = self.encode_text(ids)
            self.class_features = text / text.norm(dim=-1, keepdim=True)
        return self

    def identity(self) -> str:
        """A saved state depends on the weights alone."""
        return ""

    def head_options(self) -> dict[str, Any]:
        """Empty: its scores are cosine similarities."""
        return {}

    def rational(self, **options: Any) -> RationalCLIP:
        """A model over the same weights and the classes set whose scores a rational head weighs, as
        RAda tunes it; options as ``fresh_head`` takes them.

        Raises:
            ValueError: no classes are set.
        """
        text = self.classes()
        return RationalCLIP(self, fresh_head(text.shape[1], text, **options))

    def classes(self) -> Tensor:
        """The normalised features [C, E] of the classes that are set.

        Raises:
            ValueError: no classes are set.
        """
        if self.class_features is None:
            raise ValueError(
                "no classes are set: call model.set_classes(ids) first, or fasttta.adapt(model, "
                "classes=...)"
            )
        return self.class_features

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits [N, C] of images [N, 3, R, R] in [0, 1], over the classes set."""
        text = self.classes()
        features = self.encode_image(pixels)
        features = features / features.norm(dim=-1, keepdim=True)
        return self.logit_scale.exp() * features @ text.to(features).T

    def check_maps(self) -> None:
        """Raises ValueError where the image tower has no attention maps: it is too short."""
        if isinstance(self.visual, ModifiedResNet):
            return
        blocks = len(self.visual.transformer.blocks)
        if blocks < 2:
            raise ValueError(
                f"attention refinement needs an image tower of at least two blocks, found {blocks}"
            )

    def attention_maps(self, pixels: Tensor, text: Tensor, rollout: str = "code") -> AttentionMaps:
        """Attention [N, G, G] of every image to its own top class, with their features.

        Args:
            pixels: [N, 3, R, R] in [0, 1].
            text: [C, E] normalised text features.
            rollout: ``"code"``, ``"paper"``, ``"gar"`` (``rollout_code`` and so on); ResNets have
                Grad-CAM.

        Raises:
            ValueError: unknown rollout, or an image tower of a single block.
        """
        if rollout not in ROLLOUTS:
            raise ValueError(
                f"rollout={rollout!r} is unknown; known: {', '.join(map(repr, ROLLOUTS))}"
            )
        self.check_maps()
        scale = self.logit_scale.exp()
        maps = self._pieces(
            lambda x: self.visual.attention_maps(self._normalised(x), text, scale, rollout), pixels
        )
        # outliers are cut in the official code and nowhere else
        clip = 0.99 if rollout == "code" or self.map_kind == "grad-cam" else None
        maps.grid = normalise_map(maps.rows, clip).unflatten(1, (self.grid, self.grid))
        return maps

    def set_compute_dtype(self, dtype: torch.dtype | None) -> None:
        """Multiply in this precision (None: in that of the weights); frozen weights are converted.
        The residual stream, normalisations and projections to the joint space keep theirs."""
        for module in self.modules():
            if isinstance(module, (Linear, PackedAttention, PatchConv, Conv)):
                module.compute_dtype = dtype
                for name, parameter in module.named_parameters(recurse=False):
                    if dtype is not None and not parameter.requires_grad:
                        frozen = nn.Parameter(parameter.to(dtype), requires_grad=False)
                        setattr(module, name, frozen)
