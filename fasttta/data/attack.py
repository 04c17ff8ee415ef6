"""Adversarial images for evaluation: projected gradient descent, and what it assumed."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.checks import dense
from ..views.views import check_range

KNOWLEDGE = (
    "white box on the attacked classifier: its weights, its class prompts and gradients to the "
    "pixels; nothing of an adaptation that follows it"
)


@dataclass(frozen=True)
class ThreatModel:
    """What an attack was allowed and what it knew; belongs beside every accuracy under it.

    ``eps`` and ``step_size`` are of pixels in [0, 1].
    """

    norm: str
    eps: float
    step_size: float
    steps: int
    restarts: int
    random_start: bool
    label_source: str  #: "true" or "pseudo" (the classifier's own prediction)
    eight_bit: bool  #: adversarial images were cut to 8-bit levels
    knowledge: str

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, for a report's protocol."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """The fields as a JSON object."""
        return json.dumps(self.as_dict())

    def __str__(self) -> str:
        start = "random start" if self.random_start else "no random start"
        restarts = f", {self.restarts} restarts" if self.restarts > 1 else ""
        levels = ", cut to 8 bits" if self.eight_bit else ""
        return (
            f"PGD-{self.steps} in {self.norm}, eps {255 * self.eps:.4g}/255, "
            f"step {255 * self.step_size:.4g}/255, {start}{restarts}, "
            f"{self.label_source} label{levels}; knows: {self.knowledge}"
        )


class Attacked(NamedTuple):
    """Adversarial images and how they fare."""

    pixels: Tensor  #: [B, 3, H, W] in [0, 1]
    labels: Tensor  #: int64 [B], what was attacked
    logits: Tensor  #: [B, C] of the adversarial images
    threat: ThreatModel

    @property
    def success(self) -> Tensor:
        """bool [B]: the classifier no longer says ``labels``."""
        return self.logits.argmax(1) != self.labels


def _classified(classify: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
    """Logits [B, C] of images, checked for rank and batch."""
    logits = classify(pixels)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(pixels):
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"classify returned {shape}; needed logits [{len(pixels)}, C]")
    return logits


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each image [B]."""
    return F.cross_entropy(logits.float() if logits.dtype.itemsize < 4 else logits, labels,
                           reduction="none")  # fmt: skip


def _ascend(
    classify: Callable[[Tensor], Tensor], clean: Tensor, x: Tensor, labels: Tensor,
    eps: float, step_size: float, steps: int,
) -> Tensor:  # fmt: skip
    for _ in range(steps):
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            logits = classify(x)
            if not logits.requires_grad:
                raise ValueError(
                    "classify returned logits without a gradient to the pixels; needed a "
                    "differentiable function, free of torch.no_grad() and detach()"
                )
            # the sum: images do not see each other, whatever else is in the batch
            (gradient,) = torch.autograd.grad(_loss(logits, labels).sum(), x)
        if not gradient.isfinite().all():
            raise ValueError("the gradient holds NaN or infinity; the classifier's logits do too?")
        moved = x.detach() + step_size * gradient.sign()
        x = (clean + (moved - clean).clamp(-eps, eps)).clamp(0.0, 1.0)
    return x.detach()


def _check_settings(eps: float, step_size: float, steps: int, restarts: int) -> None:
    for name, value in (("eps", eps), ("step_size", step_size)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} is {value}; needed a finite number, 0 or more")
        if value > 1:
            raise ValueError(
                f"{name} is {value}; needed at most 1, pixels are in [0, 1]: "
                f"{name}={value:.4g} / 255 is what is written {value:.4g}/255"
            )
    if steps < 0:
        raise ValueError(f"steps is {steps}; needed 0 or more")
    if restarts < 1:
        raise ValueError(f"restarts is {restarts}; needed at least 1")


def _check_pixels(pixels: Tensor) -> Tensor:
    if not isinstance(pixels, Tensor):
        raise TypeError(f"pixels is a {type(pixels).__name__}; needed a tensor [B, 3, H, W]")
    pixels = dense("pixels", pixels)
    if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.numel() == 0:
        raise ValueError(f"pixels has shape {list(pixels.shape)}; needed [B, 3, H, W], none empty")
    if pixels.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"pixels is {pixels.dtype}; needed float32 or float64 in [0, 1]")
    return pixels.clamp(0.0, 1.0) if check_range(pixels=pixels.detach()) else pixels


def _labels(labels: Tensor | Literal["pseudo"], logits: Tensor) -> Tensor:
    n, n_classes = logits.shape
    if isinstance(labels, str):
        if labels != "pseudo":
            raise ValueError(f'labels is {labels!r}; needed int64 [{n}] or "pseudo"')
        return logits.argmax(1)
    if isinstance(labels, Tensor):
        labels = dense("labels", labels)
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != (n,):
        kind = (
            f"{labels.dtype} with shape {list(labels.shape)}"
            if isinstance(labels, Tensor)
            else type(labels).__name__
        )
        raise ValueError(f'labels is {kind}; needed int64 [{n}], one an image, or "pseudo"')
    if not (int(labels.min()) >= 0 and int(labels.max()) < n_classes):
        raise ValueError(
            f"labels run from {int(labels.min())} to {int(labels.max())}; "
            f"needed 0 to {n_classes - 1}, the classifier has {n_classes} classes"
        )
    return labels.to(logits.device).clone()  # the caller's may be an inference tensor


def pgd(
    classify: Callable[[Tensor], Tensor],
    pixels: Tensor,
    labels: Tensor | Literal["pseudo"],
    *,
    eps: float = 4 / 255,
    step_size: float | None = None,
    steps: int = 100,
    restarts: int = 1,
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
    eight_bit: bool = False,
    knowledge: str = KNOWLEDGE,
) -> Attacked:
    """Untargeted projected gradient descent within an L-infinity ball, a batch at a time.

    Args:
        classify: pixels [B, 3, H, W] in [0, 1] -> logits [B, C], differentiable, each image on
            its own. A CLIP with classes set encodes them once and not at each step. For an
            adaptive attack, a function that adapts inside, and ``knowledge`` that says so.
        pixels: [B, 3, H, W] float32 or float64 in [0, 1]; not modified.
        labels: int64 [B]; or "pseudo", the classifier's prediction of the clean images. With true
            labels an image that is misclassified from the start is pushed further from its label,
            and so leaks it to a defence; report which of the two was used.
        eps: largest change of a pixel; 4/255 is 4 / 255, not 4.
        step_size: of each step; None: eps / 4.
        steps: gradient steps; 0 leaves the start.
        restarts: starts, of which each image keeps a misclassified one, and of those (or, where
            there is none, of all) the one of the largest loss.
        generator: a CPU generator for random starts, uniform in the ball; None: the first start
            is the clean image, and more than one restart is an error.
        start: [B, 3, H, W] noise of the first start in place of the generator's.
        eight_bit: images are cut (not rounded) to levels of 1/255 after the attack, as official
            code stores them; they may then lie up to 1/255 outside the ball.
        knowledge: what the attacker knows, for the report.

    Returns:
        Attacked(pixels, labels, logits, threat); ``threat`` belongs beside every number reported.

    Raises:
        TypeError, ValueError: an argument cannot be used; classify returns something else than
            finite, differentiable logits [B, C].

    Source: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR
    2018. Defaults of A-TPT and R-TPT for ViT; for RN50 R-TPT uses eps 1/255 and 7 steps.
    """
    step_size = eps / 4 if step_size is None else step_size
    _check_settings(eps, step_size, steps, restarts)
    pixels = _check_pixels(pixels)
    if generator is None and restarts > 1:
        raise ValueError(
            f"restarts is {restarts} without a generator; needed one for random starts"
        )
    if isinstance(start, Tensor):
        start = dense("start", start)
    if start is not None and (not isinstance(start, Tensor) or start.shape != pixels.shape):
        shape = list(getattr(start, "shape", [])) or type(start).__name__
        raise ValueError(f"start is {shape}; needed noise {list(pixels.shape)}")
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"generator is on {generator.device}; needed one on the CPU")

    with torch.inference_mode(False), torch.no_grad():
        clean = pixels.detach().clone()
        clean_logits = _classified(classify, clean)
        if not clean_logits.isfinite().all():
            raise ValueError("classify returned NaN or infinity for the clean images")
        target = _labels(labels, clean_logits)
        best: tuple[Tensor, ...] = ()
        for i_start in range(restarts):
            noise = torch.zeros_like(clean)
            if i_start == 0 and start is not None:
                noise = start.to(clean)
            elif generator is not None:
                noise = torch.rand(
                    clean.shape, generator=generator, dtype=clean.dtype, device=generator.device
                )
                noise = (noise.to(clean.device) * 2 - 1) * eps
            x = (clean + noise.clamp(-eps, eps)).clamp(0.0, 1.0)
            x = _ascend(classify, clean, x, target, eps, step_size, steps)
            if eight_bit:
                x = (x * 255).floor() / 255
            logits = _classified(classify, x)
            loss = _loss(logits, target)
            wrong = logits.argmax(1) != target
            if not best:
                best = (x, logits, loss, wrong)
                continue
            better = torch.where(wrong == best[3], loss > best[2], wrong)
            best = tuple(
                torch.where(better.view(-1, *[1] * (new.ndim - 1)), new, old)
                for new, old in zip((x, logits, loss, wrong), best, strict=True)
            )
    threat = ThreatModel(
        norm="L-infinity",
        eps=eps,
        step_size=step_size,
        steps=steps,
        restarts=restarts,
        random_start=generator is not None or start is not None,
        label_source="pseudo" if isinstance(labels, str) else "true",
        eight_bit=eight_bit,
        knowledge=knowledge,
    )
    return Attacked(best[0], target, best[1], threat)
