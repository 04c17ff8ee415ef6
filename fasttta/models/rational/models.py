"""Models that end in RAda's head: a classifier of features, CLIP, and CAV-MAE."""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from ...files import check_weights
from ...protocols import FusionDefaults, FusionModel, Slot, VisionLanguageModel
from .head import RationalHead

# Values of [B, K, D] at a time where no graph is kept: of 1000 classes at width 512 32 images, and
# 64 MiB each of the several tensors of this size that a head computes
_TOGETHER = 2**24


def fresh_head(
    dim: int,
    like: Tensor,
    *,
    seed: int = 0,
    heads: int = 8,
    temperature: float = 1.0,
    scale_multiplier: float = 1.0,
) -> RationalHead:
    """A head that changes no prediction yet, on a tensor's device, in float32 or wider.

    Args:
        dim: D. like: says device and type. seed: of its other projections' start.
        heads, temperature, scale_multiplier: as ``RationalHead`` takes them.
    """
    cpu = torch.device("cpu")  # the same start on every device
    with cpu, torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = RationalHead(dim, heads, temperature, scale_multiplier, dtype=torch.float32)
    dtype = torch.promote_types(like.dtype, torch.float32)
    return head.to(like.device, dtype).requires_grad_(False)


class ModelWithHead(FusionDefaults, nn.Module):
    """Features of an encoder, scored against class features by a rational head.

    Subclasses say what ``encode`` takes. All of them are what ``fasttta.adapt`` takes for "rada".

    Args:
        head: the rational head; fresh, it leaves the source scores as they are.
        text: [K, D]: class texts, prototypes (means of features) or rows of a linear classifier.
        scale: factor of the logits.
        bias: added to the logits; None: nothing.
    """

    text: Tensor

    def __init__(
        self, head: RationalHead, text: Tensor, scale: float = 100.0, bias: float | None = None
    ) -> None:
        super().__init__()
        check_weights({"text": text}, type(self).__name__)
        self.head, self.scale, self.bias = head, float(scale), bias
        self.register_buffer("text", text.detach().clone())
        self.num_classes = len(text)
        with torch.no_grad():
            head(text[:1], text, scale)  # raises what does not fit

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, for messages."""
        raise NotImplementedError

    @property
    def num_heads(self) -> int:
        """Heads of an attention over tokens; 0: there is none."""
        return 0

    @property
    def spans(self) -> tuple[int, ...]:
        """Token counts of the modalities that such an attention sees; here none."""
        return ()

    def check_inputs(self, *inputs: Any, **named: Any) -> None:
        """Raises ValueError or TypeError, naming the input, if a batch cannot be used."""
        raise NotImplementedError

    def encode(self, *inputs: Any, **named: Any) -> Tensor:
        """Inputs -> features [B, D]."""
        raise NotImplementedError

    def head_options(self) -> dict[str, Any]:
        """``heads``, ``temperature`` and ``scale_multiplier`` of its head."""
        names = ("heads", "temperature", "scale_multiplier")
        return {name: getattr(self.head, name) for name in names}

    def rational(self, **options: Any) -> ModelWithHead:
        """The model itself: it has a head, and ``options`` are those of a fresh one."""
        return self

    def tunable(self, group: str) -> dict[str, Slot]:
        """``"head"``: all parameters of the head; ``"head_out"``: its last projection."""
        names = [f"head.{name}" for name, _ in self.head.named_parameters()]
        if group == "head_out":
            names = [name for name in names if ".out_proj." in name]
        elif group != "head":
            raise ValueError(f'a head over features has no {group}; it has "head", for "rada"')
        return {name.removeprefix("head."): Slot(name) for name in names}

    def set_compute_dtype(self, dtype: torch.dtype | None) -> None:
        """Multiply in this precision in the encoder; the head keeps that of its weights."""

    def fuse(self, features: Tensor) -> Tensor:
        """Features [B, D] -> logits [B, K]; without gradients some of the samples at a time."""
        size = len(features)
        if not torch.is_grad_enabled():
            size = max(1, _TOGETHER // self.text.numel())
        parts = [self.scored(part, self.text)[0] for part in features.split(size)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def scored(self, features: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, D] and class features [K, D] -> logits [B, K] and mask [B, K, D]."""
        return self.head(features, text, self.scale, self.bias, return_mask=True)

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """Inputs -> logits [B, K]."""
        return self.fuse(self.encode(*inputs, **named))


class FeatureClassifier(ModelWithHead):
    """A head over features that an encoder has made before. Arguments as of ``ModelWithHead``."""

    @property
    def input_names(self) -> tuple[str, ...]:
        """The one input."""
        return ("features",)

    def check_inputs(self, features: Tensor) -> None:
        """Raises ValueError or TypeError unless features are floating point [B, D]."""
        if isinstance(features, Tensor):
            if features.device != self.text.device:
                raise ValueError(f"features are on {features.device}, text on {self.text.device}")
            if not features.is_floating_point():
                raise TypeError(f"features must be floating point, found {features.dtype}")
            features = features.to(self.text.dtype)
        self.head._check(features, self.text, self.scale)

    def encode(self, features: Tensor) -> Tensor:
        """The features [B, D] themselves."""
        return features


class ClassifyingCLIP(VisionLanguageModel, Protocol):
    """The parts of a ``CLIP`` that its form with a head uses."""

    class_features: Tensor | None

    def classes(self) -> Tensor:
        """Normalised features [C, E] of the classes; ValueError where none are set."""

    def check_pixels(self, pixels: Tensor) -> None:
        """Raises ValueError or TypeError unless images can be used."""

    def set_compute_dtype(self, dtype: torch.dtype | None) -> None:
        """Multiply in this precision."""


class PooledCAVMAE(FusionModel, Protocol):
    """The parts of a ``CAVMAE`` that its form with a head uses."""

    mlp_head: nn.Sequential

    def pool(self, tokens: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, float]]:
        """Tokens [B, T, D] -> what the classifier reads [B, D]; and q, k, scale."""


class RationalCLIP(ModelWithHead):
    """CLIP whose scores over a list of classes a rational head weighs: pixels in, logits out.

    Args:
        model: with classes set (``set_classes``).
        head: fresh, it leaves CLIP's scores as they are.

    Source: Chen et al., ICCV 2025 (``RationalHead``).
    """

    def __init__(self, model: ClassifyingCLIP, head: RationalHead) -> None:
        text = model.classes()
        scale = model.logit_scale.detach().double().exp().item()
        super().__init__(head, text.to(head.out_proj.weight), scale)
        self.model = model

    @property
    def input_names(self) -> tuple[str, ...]:
        """The one input."""
        return ("images",)

    def check_inputs(self, images: Tensor) -> None:
        """images: [N, 3, R, R] in [0, 1]."""
        self.model.check_pixels(images)

    def set_compute_dtype(self, dtype: torch.dtype | None) -> None:
        """Multiply in this precision in the encoder; the head keeps that of its weights."""
        self.model.set_compute_dtype(dtype)

    def encode(self, images: Tensor) -> Tensor:
        """Pixels [N, 3, R, R] -> features [N, E]."""
        return self.model.encode_image(images).to(self.text.dtype)


class RationalCAVMAE(ModelWithHead):
    """CAV-MAE whose linear classifier a rational head weighs: audio and video in, logits out.

    A linear classifier's logit is |x| |w_k| cos(x, w_k) + b_k: the mask weighs the terms of the
    cosine, lengths and bias stay, so that a fresh head changes no bit of a prediction. Inside the
    attention the scale is the usual length of x (from the LayerNorm before it) times the mean
    |w_k|.

    Args:
        model: frozen up to and with the LayerNorm of its classifier.
        head: of the model's width.

    Source: the head is that of Chen et al., ICCV 2025, who have it on cosine scores only.
    """

    def __init__(self, model: PooledCAVMAE, head: RationalHead) -> None:
        norm, linear = (cast(Any, layer) for layer in model.mlp_head)
        weight = linear.weight.detach()
        length = norm.weight.detach().double().square() + norm.bias.detach().double().square()
        scale = length.sum().sqrt() * weight.double().norm(dim=-1).mean()
        super().__init__(head, weight.to(head.out_proj.weight), scale.item())
        self.model = model

    @property
    def spans(self) -> tuple[int, ...]:
        """Token counts (Ta, Tv) of the fused sequence."""
        return self.model.spans

    @property
    def num_heads(self) -> int:
        """Heads of the fusion attention."""
        return self.model.num_heads

    @property
    def input_names(self) -> tuple[str, ...]:
        """Audio and video."""
        return self.model.input_names

    def check_inputs(self, audio: Tensor, video: Tensor) -> None:
        """As ``CAVMAE.check_inputs``."""
        self.model.check_inputs(audio, video)

    def set_compute_dtype(self, dtype: torch.dtype | None) -> None:
        """Multiply in this precision up to the head, which keeps that of its weights."""
        self.model.set_compute_dtype(dtype)

    def encode(self, audio: Tensor, video: Tensor) -> Tensor:
        """Audio and video -> what the classifier reads, [B, D]."""
        pooled, _ = self.model.pool(self.model.encode(audio, video))
        return self.model.mlp_head[0](pooled).to(self.text.dtype)

    def scored(self, features: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, D] -> logits [B, C] and mask [B, C, D]; text: the classifier's rows."""
        linear = cast(nn.Linear, self.model.mlp_head[1])
        lengths = features.norm(dim=-1, keepdim=True) * text.norm(dim=-1)
        added, mask = self.head.deviation(features, text, self.scale)
        return linear(features.to(linear.weight.dtype)) + lengths * added, mask

    def forward(self, audio: Tensor, video: Tensor) -> Tensor:
        """Audio [B, frames, mel bins], video [B, 3, rows, columns] -> logits [B, C]."""
        self.check_inputs(audio, video)
        return self.fuse(self.encode(audio, video))
