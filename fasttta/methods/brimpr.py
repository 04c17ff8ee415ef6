"""BriMPR: bridging modalities via progressive re-alignment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Self, cast

import torch
from torch import Tensor

from ..ops.checks import dense
from ..protocols import FusionModel, Promptable, Prompted
from ..source_stats import SourceStats
from . import brimpr_losses
from .base import Objective, WeightedMethod, sample_weight, samples_used
from .options import AtLeast, Finite, Positive, Range, check_option, require
from .special_bases import DrawingMethod, ExtendingMethod, StatefulMethod

_INIT = 1e-4  # prompts start in U(-1e-4, 1e-4)


@dataclass(frozen=True)
class BriMPR(ExtendingMethod, DrawingMethod, StatefulMethod, WeightedMethod):
    """Tune deep prompts of both encoders so that the moments of features match source data,
    predictions stay the same with half of a modality masked, and modalities agree on each sample.

    total = alignment_weight * alignment + recombination_weight * recombination + contrast_weight *
    contrast. Needs statistics of source data: ``adapt(..., source_stats=...)``, made by
    ``fasttta.collect_stats(model, loader)`` or read by ``fasttta.SourceStats.from_official(path)``.

    Args:
        prompts: prompts a block, audio and video.
        mask_ratio: share of each modality's tokens that is masked, drawn at random for each batch;
            0: nothing is masked. ``step(..., keep=(audio_ids, video_ids))`` sets the ids [B, K] of
            the kept tokens.
        temperature: of the contrast.
        teacher_scale, teacher_offset: a and b of the teacher's temperature
            1 + a / (1 + exp(b - discrepancy of the joint feature)).
        alignment_weight, recombination_weight, contrast_weight: of the three terms; where one is
            0 no gradient is computed for it.
        lr: Adam's learning rate.

    Tuned: ``"prompts.audio"``, ``"prompts.video"`` [blocks, prompts, D], drawn from U(-1e-4, 1e-4)
    by the seed; a model that came with prompts (BriMPR's ``PromptVA``, or a checkpoint of one)
    keeps these and their number. With fresh prompts predictions differ from the source model's
    (LayerNorm magnifies the prompts).
    ``losses``: ``"alignment"``, ``"recombination"``, ``"contrast"``, ``"total"``. ``stats``, 0-d:
    ``"discrepancy.audio"``, ``".video"``, ``".joint"``, ``"teacher_temperature"``. The prediction
    is the one before the update. A batch of one sample has no spread and no contrast: alignment
    uses the source means only, contrast is 0, and the first such batch warns.

    Source: Li and Feng, "Bridging Modalities via Progressive Re-alignment for Multimodal Test-Time
    Adaptation", AAAI 2026, and its official code, whose version is used where the two differ
    (features under the next block's LayerNorm, eps in distances, the start of prompts). Presets:
    ``"one-corrupted"`` and ``"both-corrupted"`` (modalities), batch 64. The official code runs in
    fp16 with a loss scaler that skips updates; here master precision, and none is skipped.
    """

    name: ClassVar[str] = "brimpr"
    captured_by_default: ClassVar[bool] = True
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "one-corrupted": {"temperature": 0.07},
        "both-corrupted": {"temperature": 0.25},
    }
    RESOURCES: ClassVar[tuple[str, ...]] = ("source_stats",)
    group: ClassVar[str | None] = "prompts"
    frozen_encoder: ClassVar[bool] = False

    prompts: tuple[int, int] = (10, 10)
    mask_ratio: Annotated[float, Range(at_least=0, below=1)] = 0.5
    temperature: Annotated[float, Positive()] = 0.07
    teacher_scale: Annotated[float, Range(above=-1)] = 0.2
    teacher_offset: Annotated[float, Finite()] = 5.0
    alignment_weight: Annotated[float, Finite()] = 1.0
    recombination_weight: Annotated[float, Finite()] = 1.0
    contrast_weight: Annotated[float, Finite()] = 1.0
    lr: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        pair = isinstance(self.prompts, (tuple, list)) and len(self.prompts) == 2
        require(pair, "prompts", self.prompts, "two integers (audio, video)")
        object.__setattr__(self, "prompts", tuple(self.prompts))
        for count in self.prompts:
            check_option("prompts", count, AtLeast(1, most=10_000), int)

    def weights(self) -> tuple[float, ...]:
        """Of the three terms."""
        return self.alignment_weight, self.recombination_weight, self.contrast_weight

    def single_sample(self) -> str:
        """A warning: one sample has no spread."""
        return (
            "BriMPR on a single sample: it has no spread to align and nothing to be contrasted "
            "with; only its mean is aligned. Give larger batches"
        )

    def fitted(self, model: FusionModel) -> Self:
        """Takes the number of prompts of a model that came with tuned ones.

        Raises:
            ValueError: the encoders take no prompts, the mask leaves no token of a modality, or
                ``prompts`` differs from the tuned prompts of the model.
        """
        if not isinstance(model, Promptable):
            raise ValueError(
                f"BriMPR puts prompts into the encoders' blocks, which are not known of "
                f"{type(model).__name__}; needed a CAV-MAE"
            )
        for name, (blocks, _) in model.feature_shapes().items():
            require(blocks > 0, f"{name} blocks", blocks, "at least 1 for its prompts")
        for name, tokens in zip(model.input_names, model.spans, strict=True):
            require(self._kept(tokens) > 0, "mask_ratio", self.mask_ratio,
                    f"less, so that one of {tokens} {name} tokens is kept")  # fmt: skip
        start = model.start_prompts()
        if not start:
            return self
        audio, video = (start[name].shape[1] for name in model.input_names)
        counts = audio, video
        if self.prompts in (counts, type(self).__dataclass_fields__["prompts"].default):
            return replace(self, prompts=counts)
        if model.tuned_prompts:
            raise ValueError(
                f"prompts={self.prompts}: the model came with {counts} tuned prompts, audio and "
                "video; leave the option out to go on with them, or pass the model without them "
                "(PromptVA's va_model)"
            )
        return self  # fresh prompts are random: others serve as well

    def extend(self, model: FusionModel, seed: int) -> FusionModel:
        """The model with the prompts that it came with, if their number fits, else with fresh
        ones."""
        assert isinstance(model, Promptable)  # fitted
        # not the sequence from which masks are drawn
        generator = torch.Generator().manual_seed((seed + 0x5EED) % 2**63)
        weight = next(model.parameters())
        shapes, prompts = model.feature_shapes(), {}
        start = model.start_prompts()
        if start and all(start[n].shape[1] == c for n, c in zip(start, self.prompts, strict=True)):
            return model.prompted({name: x.detach().clone() for name, x in start.items()})
        for name, count in zip(model.input_names, self.prompts, strict=True):
            blocks, dim = shapes[name]
            # explicit type and device: the process's defaults must not change the numbers of a seed
            drawn = torch.rand(
                (blocks, count, dim), generator=generator, dtype=torch.float32, device="cpu"
            )
            prompts[name] = ((2 * drawn - 1) * _INIT).to(weight)
        return model.prompted(prompts)

    def constants(self, model: FusionModel, resources: Mapping[str, Any]) -> dict[str, Tensor]:
        """Source moments of every feature, ``"<name>.std"`` and ``"<name>.mean"`` [blocks, D].

        Raises:
            TypeError, ValueError: ``source_stats`` is missing or of another model.
        """
        self.fitted(model)  # adapt asks for constants first
        assert isinstance(model, Promptable)
        source_stats = resources.get("source_stats")
        if source_stats is None:
            raise ValueError(
                "brimpr needs source_stats, found None; make them from a few clean batches: "
                "source_stats=fasttta.collect_stats(model, loader), or read the official ones: "
                "fasttta.SourceStats.from_official(path)"
            )
        if not isinstance(source_stats, SourceStats):
            kind = type(source_stats).__name__
            raise TypeError(f"source_stats must be fasttta.SourceStats, found {kind}")
        return source_stats.features(model.feature_shapes())

    def check_saved(
        self, model: FusionModel, constants: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> None:
        """Checks the source moments; there is no state."""
        assert isinstance(model, Promptable)  # fitted
        shapes = model.feature_shapes()
        needed = {f"{name}.{part}" for name in shapes for part in ("std", "mean")}
        if constants.keys() != needed:
            odd = sorted(constants.keys() ^ needed)[0]
            raise ValueError(f"constant.{odd} is missing, or of another method or model")
        pairs = {n: (constants[f"{n}.std"], constants[f"{n}.mean"]) for n in shapes}
        stats = SourceStats(
            audio=pairs.get("audio"), video=pairs.get("video"), joint=pairs.get("joint")
        )
        stats.features(shapes)

    def _kept(self, tokens: int) -> int:
        return int(tokens * (1 - self.mask_ratio))

    def draw(
        self,
        model: FusionModel,
        inputs: tuple[Tensor, ...],
        generator: torch.Generator,
        keep: Any = None,
    ) -> tuple[Tensor, ...]:
        """Ids [B, K] of the tokens that each modality keeps, in random order, or ``keep``."""
        if keep is not None:
            return self._checked(model, inputs, keep)
        if not self.mask_ratio:
            return ()
        drawn, device = [], inputs[0].device
        for tokens in model.spans:
            noise = torch.rand(
                (len(inputs[0]), tokens), generator=generator, dtype=torch.float32,
                device=generator.device,
            )  # fmt: skip
            ids = noise.argsort(dim=1)[:, : self._kept(tokens)]
            if device.type == "cuda":  # a copy from pageable memory waits for the device
                ids = ids.contiguous().pin_memory()
            drawn.append(ids.to(device, non_blocking=True))
        return tuple(drawn)

    def _checked(
        self, model: FusionModel, inputs: tuple[Tensor, ...], keep: Any
    ) -> tuple[Tensor, ...]:
        """Token ids that a caller gives, as ``draw`` returns them."""
        names, batch = model.input_names, len(inputs[0])
        if not isinstance(keep, (tuple, list)) or len(keep) != len(names):
            raise TypeError(f"keep must be token ids of each modality ({', '.join(names)})")
        checked = []
        for name, ids, tokens in zip(names, keep, model.spans, strict=True):
            ids = dense(f"keep of {name}", ids) if isinstance(ids, Tensor) else ids
            if not isinstance(ids, Tensor) or ids.dtype not in (
                torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
            ):  # fmt: skip
                kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
                raise TypeError(f"keep of {name} must be an integer tensor [B, K], found {kind}")
            if ids.ndim != 2 or len(ids) != batch or not 1 <= ids.shape[1] <= tokens:
                raise ValueError(
                    f"keep of {name} has shape {list(ids.shape)}, needed [{batch}, K] with K from "
                    f"1 to {tokens}"
                )
            ids = ids.detach().to("cpu", torch.int64)
            ordered = ids.sort(dim=1).values
            if ordered.min() < 0 or ordered.max() >= tokens:
                raise ValueError(
                    f"keep of {name} has ids from {int(ordered.min())} to {int(ordered.max())}, "
                    f"needed 0 to {tokens - 1}"
                )
            if (ordered.diff(dim=1) == 0).any():
                raise ValueError(f"keep of {name} has an id twice in a sample")
            with torch.inference_mode(False):
                checked.append(ids.to(inputs[0].device, copy=True))
        return tuple(checked)

    def logits(self, model: FusionModel, features: tuple[Tensor, ...]) -> Tensor:
        """The prediction [B, C] from all tokens of the inputs."""
        return model.fuse(model.encode(*features[: len(model.input_names)]))

    def objective(
        self,
        model: FusionModel,
        features: Any,
        *,
        state: Mapping[str, Tensor],
        constants: Mapping[str, Tensor],
        valid: Tensor,
    ) -> Objective:
        """Alignment, recombination and contrast of one batch."""
        names, weight, grad = model.input_names, sample_weight(valid), torch.is_grad_enabled()
        streams = cast(Prompted, model).streams(*features)

        def moved(name: str, of: Tensor) -> Tensor:
            source = constants[f"{name}.std"], constants[f"{name}.mean"]
            return brimpr_losses.discrepancy(of, *source, weight).mean()

        with torch.set_grad_enabled(grad and self.alignment_weight != 0):
            distances = [moved(n, x) for n, x in zip(names, streams.features, strict=True)]
            alignment = torch.stack(distances).sum()
        joint = moved("joint", streams.joint.unsqueeze(1))
        temperature = 1 + self.teacher_scale / (1 + torch.exp(self.teacher_offset - joint))
        target, terms, masked = brimpr_losses.teacher(streams.logits, temperature), [], []

        def recombined(share: Tensor) -> Callable[[Tensor, slice], Tensor]:
            return lambda logits, rows: brimpr_losses.recombination(
                target, logits, share, weight, rows
            )

        with torch.set_grad_enabled(grad and self.recombination_weight != 0):
            for i, share in enumerate(brimpr_losses.shares(distances)):
                term, logits = streams.masked(i, recombined(share))
                terms.append(term)
                masked.append(logits)
        with torch.set_grad_enabled(grad and self.contrast_weight != 0):
            contrast, alone = streams.alone(
                lambda alone: brimpr_losses.contrast(alone, self.temperature, weight)
            )
        losses = {
            "alignment": alignment,
            "recombination": torch.stack(terms).sum(),
            "contrast": contrast,
        }
        terms = [w * x for w, x in zip(self.weights(), losses.values(), strict=True) if w != 0]
        losses["total"] = sum(terms, start=torch.zeros_like(alignment.detach()))
        by_name = zip(names, distances, strict=True)
        return Objective(
            losses=losses,
            logits=streams.logits,
            n_used=samples_used(valid, streams.logits),
            stats={f"discrepancy.{name}": x for name, x in by_name}
            | {"discrepancy.joint": joint, "teacher_temperature": temperature},
            trace={f"features.{n}": x for n, x in zip(names, streams.features, strict=True)}
            | {f"masked_logits.{n}": x for n, x in zip(names, masked, strict=True)}
            | {f"representation.{n}": x for n, x in zip(names, alone, strict=True)}
            | {"features.joint": streams.joint},
        )  # fmt: skip
