"""The fine-tuned contrastive audio-visual masked autoencoder, cut into encode and fuse."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ... import trace
from ...ops.residual_layer_norm import KERNEL_DEVICES, fuses
from ...protocols import FusionDefaults, Slot
from ..blocks.layers import (
    Linear,
    ModalityBlock,
    PatchEmbed,
    QueriesAndKeys,
    advance_blocks,
    may_fuse,
    normed,
    run_blocks,
    samples_at_once,
)
from ..blocks.residual import added, mean_over_tokens
from ..rational.models import RationalCAVMAE, fresh_head
from ..state_dicts import check_keys
from . import checkpoint
from .prompted import PromptedCAVMAE

MODES = ("multimodal", "audioonly", "videoonly", "missingaudioonly", "missingvideoonly")
_PARTS = ("weight", "bias")


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class CAVMAE(FusionDefaults, nn.Module):
    """Fine-tuned CAV-MAE: two frozen encoders and a fusion block that attends over both.

    Source: Gong et al., "Contrastive Audio-Visual Masked Autoencoder", ICLR 2023; parameter names
    are those of the official checkpoints. ``from_checkpoint`` is the usual way to make one.

    Args:
        num_classes: C.
        dim: D, the width; num_heads must divide it.
        audio_tokens, video_tokens: Ta and Tv.
        depth: (audio blocks, video blocks, fusion blocks).
        hidden: width of the MLPs, 4 D unless given.
        patch_audio, patch_video: patch sizes (mel bins, frames) and (rows, columns).
    """

    def __init__(
        self,
        num_classes: int,
        *,
        dim: int = 768,
        num_heads: int = 12,
        audio_tokens: int = 512,
        video_tokens: int = 196,
        depth: tuple[int, int, int] = (11, 11, 1),
        hidden: int | None = None,
        patch_audio: tuple[int, int] = (16, 16),
        patch_video: tuple[int, int] = (16, 16),
        video_channels: int = 3,
    ) -> None:
        super().__init__()
        if depth[2] < 1:
            raise ValueError(f"depth={depth}: needed at least one fusion block")
        if not isinstance(num_heads, int) or num_heads < 1 or dim % num_heads:
            raise ValueError(
                f"num_heads={num_heads!r} does not divide the width {dim}; official CAV-MAE has "
                "num_heads=12 at width 768"
            )
        hidden = 4 * dim if hidden is None else hidden
        self.num_classes, self.dim, self.num_heads = num_classes, dim, num_heads
        self.patch_embed_a = PatchEmbed(1, patch_audio, dim)
        self.patch_embed_v = PatchEmbed(video_channels, patch_video, dim)
        self.modality_a = nn.Parameter(torch.zeros(1, 1, dim))
        self.modality_v = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed_a = nn.Parameter(torch.zeros(1, audio_tokens, dim))
        self.pos_embed_v = nn.Parameter(torch.zeros(1, video_tokens, dim))
        self.blocks_a, self.blocks_v, self.blocks_u = (
            nn.ModuleList(ModalityBlock(dim, num_heads, hidden) for _ in range(n)) for n in depth
        )
        self.norm_a, self.norm_v, self.norm = (nn.LayerNorm(dim) for _ in range(3))
        self.mlp_head = nn.Sequential(nn.LayerNorm(dim), Linear(dim, num_classes))
        # not in state_dict(), whose digest says to which model statistics and saved states belong
        self.register_buffer("prompts_audio", None, persistent=False)
        self.register_buffer("prompts_video", None, persistent=False)
        self.tuned_prompts = False

    @classmethod
    def from_checkpoint(
        cls,
        path_or_state_dict: str | os.PathLike | Mapping[str, Tensor],
        *,
        num_heads: int | None = None,
    ) -> CAVMAE:
        """The model of an official checkpoint.

        Every size but the head count follows from the tensors' shapes. Names may carry prefixes of
        wrappers (``module.``, ``_orig_mod.``, ``model.``, ``net.``, in any nesting) and lie under
        ``state_dict``, ``model_state_dict``, ``model`` or ``net`` of what a training script saved;
        files with 478 keys (CAV-MAE), 484 (READ) and 490 (ABPEM) can be read. The split q, k,
        v of the latter two are ignored, as the official code overwrites them with the rows of the
        packed qkv. Tuned prompts of BriMPR's ``PromptVA`` are kept (see ``take_prompts``).
        Weights stored in half precision are widened to float32.

        Args:
            path_or_state_dict: a safetensors file, a file of ``torch.save`` or ``torch.jit.save``
                (read for its tensors; no code in it is run), or a state dict.
            num_heads: heads of every attention layer, which weights do not tell. None: 12 of the
                published width 768; for any other width it is needed.

        Raises:
            FileNotFoundError, TypeError: there is no such file, or it is no path.
            ValueError: the file is damaged or holds more than tensors, or tensors that are not
                finite, not floating point, quantised, sparse or on meta; keys are missing, unknown
                or of a wrong shape (all named); num_heads is missing or does not divide the width.
        """
        state, prompts = checkpoint.split_prompts(checkpoint.read_state_dict(path_or_state_dict))
        if num_heads is None:
            num_heads = checkpoint.published_heads(checkpoint.infer_sizes(state)["dim"])
        return cls.from_tensors(state, num_heads=num_heads).take_prompts(prompts)

    @classmethod
    def from_tensors(cls, state: Mapping[str, Tensor], *, num_heads: int) -> CAVMAE:
        """The model over these very tensors, named as in ``state_dict()``: nothing is copied.

        Raises:
            ValueError: keys are missing, unknown or of a wrong shape (all named).
        """
        with torch.device("meta"):
            model = cls(**checkpoint.infer_sizes(state), num_heads=num_heads)
        shapes = {name: x.shape for name, x in model.state_dict().items()}
        check_keys(state, shapes, "a fine-tuned CAV-MAE checkpoint")
        model.load_state_dict(state, assign=True)
        return model.eval()

    def take_prompts(self, prompts: Mapping[str, Tensor]) -> CAVMAE:
        """Takes the prompts that a model came with (BriMPR's); returns itself.

        BriMPR starts from them, and ``reset`` returns to them. Tuned prompts also count in
        predictions of every method, as in the official ``PromptVA`` with ``prompt=True``. Fresh
        prompts (no value beyond 1e-4) of another shape are ignored. ``state_dict()`` holds none.

        Args:
            prompts: by modality, [blocks, n, D]; empty: none.

        Raises:
            ValueError: tuned prompts are of another shape than the encoders'.
        """
        ready, tuned = checkpoint.checked_prompts(prompts, self.feature_shapes(), self.norm.weight)
        if ready:
            self.prompts_audio, self.prompts_video = ready["audio"], ready["video"]
            self.tuned_prompts = tuned
        return self

    def start_prompts(self) -> dict[str, Tensor]:
        """The prompts [blocks, n, D] that the model came with, by modality; none: an empty dict."""
        prompts = {"audio": self.prompts_audio, "video": self.prompts_video}
        return {name: x for name, x in prompts.items() if x is not None}

    @property
    def spans(self) -> tuple[int, int]:
        """Token counts (Ta, Tv) of the fused sequence, audio first."""
        return self.pos_embed_a.shape[1], self.pos_embed_v.shape[1]

    @property
    def input_names(self) -> tuple[str, str]:
        """Names of the inputs, for messages."""
        return "audio", "video"

    def tunable(self, group: str) -> dict[str, Slot]:
        """What a method may tune: name -> where it lies among this module's parameters.

        ``"norm"``: the LayerNorms on the multi-modal path (the ``_a`` and ``_v`` ones never run
        there). ``"encoder_norm"``: of those, the ones in the encoders' blocks 0 to 8, SAR's choice.
        ``"fusion_qkv"``: the query, key and value projections of the first fusion block; of
        further ones (``modality_specific_depth=10`` has two) the official READ and ABPEM code
        tunes none.
        """
        if group in ("norm", "encoder_norm"):
            slots: dict[str, Slot] = {}
            for name, module in self.named_modules():
                path = name.split(".")
                early = path[0] in ("blocks_a", "blocks_v") and int(path[1] if path[1:] else 9) < 9
                shared = isinstance(module, nn.LayerNorm) and not path[-1].endswith(("_a", "_v"))
                if shared and (group == "norm" or early):
                    slots |= {f"{name}.{part}": Slot(f"{name}.{part}") for part in _PARTS}
            return slots
        if group == "fusion_qkv":
            path, dim = "blocks_u.0.attn", self.dim
            return {
                f"{path}.{which}.{part}": Slot(f"{path}.qkv.{part}", (row * dim, (row + 1) * dim))
                for part in _PARTS
                for row, which in enumerate("qkv")
            }
        raise ValueError(f'group={group!r} is unknown; known: "norm", "encoder_norm", "fusion_qkv"')

    def feature_shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes [blocks, D] of the features that ``SourceStats`` describe, and ``"joint"``."""
        audio, video = len(self.blocks_a), len(self.blocks_v)
        return {"audio": (audio, self.dim), "video": (video, self.dim), "joint": (1, self.dim)}

    def prompted(self, prompts: Mapping[str, Tensor]) -> PromptedCAVMAE:
        """A model over these weights; its encoder blocks take prompts, [blocks, n, D] each."""
        return PromptedCAVMAE(self, prompts)

    def head_options(self) -> dict[str, Any]:
        """Empty: its classifier is linear."""
        return {}

    def rational(self, **options: Any) -> RationalCAVMAE:
        """A model over the same weights whose linear classifier a rational head weighs, as RAda
        tunes it; options as ``fresh_head`` takes them."""
        linear = cast(nn.Linear, self.mlp_head[1])
        return RationalCAVMAE(self, fresh_head(self.dim, linear.weight, **options))

    def set_compute_dtype(self, dtype: torch.dtype | None) -> None:
        """Multiply in this precision (None: in that of the weights); frozen weights are converted.
        The residual stream, LayerNorms and the head keep theirs."""
        for module in self.modules():
            if isinstance(module, (Linear, PatchEmbed)) and module is not self.mlp_head[1]:
                module.compute_dtype = dtype
                holder = module.proj if isinstance(module, PatchEmbed) else module
                for name, parameter in holder.named_parameters(recurse=False):
                    if dtype is not None and not parameter.requires_grad:
                        frozen = nn.Parameter(parameter.to(dtype), requires_grad=False)
                        setattr(holder, name, frozen)

    def check_inputs(self, audio: Tensor, video: Tensor) -> None:
        """Raises if the two tensors cannot be one batch for this model.

        audio: [B, frames, mel bins], normalised log-mel features. video: [B, channels, rows,
        columns], one normalised RGB frame a sample.
        """
        self._check("audio", audio)
        self._check("video", video)
        if audio.shape[0] != video.shape[0]:
            raise ValueError(
                f"audio has {audio.shape[0]} samples, video {video.shape[0]}; needed equal batches"
            )

    def _check(self, name: str, x: Tensor) -> None:
        """Raises TypeError or ValueError if x cannot be this input; the message says why."""
        is_audio = name == "audio"
        layout = "[B, frames, mel bins]" if is_audio else "[B, channels, rows, columns]"
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor {layout}, found {type(x).__name__}")
        shape, rank, device = tuple(x.shape), 3 if is_audio else 4, self.modality_a.device
        if x.ndim != rank:
            raise ValueError(f"{name} must have {rank} dimensions {layout}, found shape {shape}")
        if not x.is_floating_point():
            raise TypeError(f"{name} must be floating point and normalised, found {x.dtype}")
        if x.device != device:
            move = f"{name}.to({str(device)!r})"
            raise ValueError(f"{name} is on {x.device}, the model on {device}; move one: {move}")
        if shape[0] == 0:
            raise ValueError(f"{name} is an empty batch, shape {shape}; needed at least 1 sample")
        if is_audio and shape[1:] == (128, 1024):
            # the patch count of the published size fits either way round
            raise ValueError(f"{name} of shape {shape} looks transposed, needed {layout}")
        patches = (self.patch_embed_a if is_audio else self.patch_embed_v).proj
        (ph, pw), tokens = patches.kernel_size, self.spans[not is_audio]
        # audio arrives as [frames, mel bins] and is cut as [mel bins, frames]
        h, w = (shape[2], shape[1]) if is_audio else shape[2:]
        channels, needed = 1 if is_audio else shape[1], patches.in_channels
        if channels != needed:
            raise ValueError(
                f"{name} has {channels} channels, needed {needed}; found shape {shape}"
            )
        if h % ph or w % pw or (h // ph) * (w // pw) != tokens:
            raise ValueError(
                f"{name} of shape {shape} gives {h / ph:g} x {w / pw:g} patches of {ph} x {pw}, "
                f"the checkpoint has positions for {tokens} tokens"
            )

    def embed_audio(self, audio: Tensor) -> Tensor:
        """Audio [B, frames, mel bins] -> what enters its encoder [B, Ta, D], frequency-major."""
        return added(*self._embedded("audio", audio))

    def embed_video(self, video: Tensor) -> Tensor:
        """Video [B, 3, rows, columns] -> what enters its encoder [B, Tv, D], row-major."""
        return added(*self._embedded("video", video))

    def _embedded(self, name: str, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What enters an encoder and what is still to be added to it, [B, T, D] each."""
        if name == "audio":
            embed, position, modality = self.patch_embed_a, self.pos_embed_a, self.modality_a
            x = x.unsqueeze(1).transpose(2, 3)
        else:
            embed, position, modality = self.patch_embed_v, self.pos_embed_v, self.modality_v
        x = embed(x)
        if may_fuse(position, embed) and fuses(position, x.dtype):
            return (position + modality).expand(len(x), -1, -1), x
        return x + position + modality, None

    def encode_audio(self, audio: Tensor, out: Tensor | None = None) -> Tensor:
        """Audio [B, frames, mel bins] -> tokens [B, Ta, D], frequency-major; in ``out`` if given,
        without gradients."""
        return run_blocks(self.blocks_a, *self._embedded("audio", audio), out)

    def encode_video(self, video: Tensor, out: Tensor | None = None) -> Tensor:
        """Video [B, 3, rows, columns] -> tokens [B, Tv, D], row-major; in ``out`` if given, without
        gradients."""
        return run_blocks(self.blocks_v, *self._embedded("video", video), out)

    def encode(self, audio: Tensor, video: Tensor) -> Tensor:
        """Both encoders: tokens [B, Ta + Tv, D], audio first; with the tuned prompts, if any, that
        the model came with."""
        with trace.span("encode"):
            if self.tuned_prompts:
                master = self.norm.weight.dtype
                prompts = {name: x.to(master) for name, x in self.start_prompts().items()}
                return self.prompted(prompts).layers(audio, video)[0]
            tokens, places = None, (None, None)
            on_gpu = audio.device.type in KERNEL_DEVICES
            if on_gpu and fuses(self.pos_embed_a, None) and not torch.is_grad_enabled():
                # each writes its part of the result
                tokens = self.pos_embed_a.new_empty(len(audio), sum(self.spans), self.dim)
                places = tokens.split(self.spans, dim=1)
            side = _side_stream(audio.device) if audio.is_cuda else None
            if side is None or not torch.cuda.is_current_stream_capturing():
                parts = self.encode_audio(audio, places[0]), self.encode_video(video, places[1])
            else:  # the encoders are independent branches of the captured graph
                here = torch.cuda.current_stream(audio.device)
                side.wait_stream(here)
                with torch.cuda.stream(side):
                    v = self.encode_video(video, places[1])
                parts = self.encode_audio(audio, places[0]), v
                here.wait_stream(side)
            return torch.cat(parts, dim=1) if tokens is None else tokens

    def pool(self, tokens: Tensor, modality: str = "") -> tuple[Tensor, QueriesAndKeys]:
        """Fusion blocks, final LayerNorm and mean over tokens: [B, T, D] -> [B, D].

        Also queries and keys of the last fusion block, from whose raw scores ABPEM takes its
        statistics (the published models have one block). Gradients flow from them to the block's
        weights; on a GPU the output does not depend on these tensors but on others of their values.
        """
        tokens, branch, attention = advance_blocks(self.blocks_u, tokens, modality=modality)
        assert attention is not None  # there is a fusion block
        norm = getattr(self, f"norm_{modality}") if modality else self.norm
        _, tokens = normed(norm, None, tokens, branch)
        fused = tokens.device.type in KERNEL_DEVICES
        return mean_over_tokens(tokens) if fused else tokens.mean(dim=1), attention

    def pieces(self, tokens: Tensor) -> Sequence[Tensor]:
        """Tokens in the portions that are best fused one after another: on a CPU one ViT-B sample
        at a time, which needs a quarter of a batch of 4's buffers and is no slower."""
        return tokens.split(samples_at_once(tokens))

    def fuse_attention(self, tokens: Tensor) -> tuple[Tensor, QueriesAndKeys]:
        """Tokens [B, Ta + Tv, D] -> logits [B, C] and the fusion attention's q and k."""
        with trace.span("fuse"):
            pooled, attention = self.pool(tokens)
            return self.mlp_head(pooled), attention

    def fuse(self, tokens: Tensor) -> Tensor:
        """Tokens [B, Ta + Tv, D] -> logits [B, C]."""
        return self.fuse_attention(tokens)[0]

    def forward(
        self, audio: Tensor | None, video: Tensor | None, mode: str = "multimodal"
    ) -> Tensor:
        """Logits [B, C].

        Args:
            audio: [B, frames, mel bins]; unused, and may be None, in the video modes.
            video: [B, 3, rows, columns]; unused, and may be None, in the audio modes.
            mode: ``"multimodal"``; ``"audioonly"`` / ``"videoonly"``: a model fine-tuned on one
                modality, through that modality's LayerNorms; ``"missingaudioonly"`` /
                ``"missingvideoonly"``: a model fine-tuned on both that gets only audio /
                video: the mean of both normalisations' features (official mode names).

        Raises:
            ValueError: an unknown mode, a needed input is None, or wrong shapes.
        """
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} is unknown; known: {', '.join(MODES)}")
        if mode == "multimodal":
            both = cast("tuple[Tensor, Tensor]", (audio, video))  # None is refused
            self.check_inputs(*both)
            return self.fuse(self.encode(*both))
        name, x = ("audio", audio) if "audio" in mode else ("video", video)
        if x is None:
            raise ValueError(f"mode={mode!r} needs {name}, found None")
        self._check(name, x)
        tokens = (self.encode_audio if name == "audio" else self.encode_video)(x)
        pooled, _ = self.pool(tokens, name[0])
        if mode.startswith("missing"):
            pooled = (self.pool(tokens)[0] + pooled) / 2
        return self.mlp_head(pooled)
