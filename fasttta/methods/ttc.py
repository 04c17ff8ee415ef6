"""TTC: a counterattack on the image tower, without labels or training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ..ops.checks import dense
from ..protocols import VisionLanguageModel
from ..views import Views
from ..views.transfer import to_device
from .base import Objective
from .episodic import Episodic, Images, Prediction, Seen, unit
from .options import Finite, Positive, Range


@dataclass(frozen=True)
class TTC(Episodic):
    """Test-time counterattack: a perturbation of the pixels moves the feature away from its old
    value. Images whose feature hardly moves under small noise (attacked images are falsely stable)
    get the perturbation, others only the noise.

    Args:
        eps: radius of the perturbation, in pixels of [0, 1].
        threshold: an image counts as attacked if the noise moves its feature by a smaller relative
            distance.
        beta: the perturbation after step k counts with weight softmax(beta k).
        prompt, prompt_length: as in ``TPT``; nothing of it is tuned.
        lr: length of a sign step, in pixels.
        steps: sign steps.

    ``stats``: ``"perturbation"`` [3, R, R], ``"stability"``: the relative move, 0-d. ``.logits``:
    of the image with the perturbation. ``adapted.step(images, noise=noise)`` sets the start
    [B or 1, 3, R, R], in [-eps, eps], in place of a random one.

    Source: Xing et al., CVPR 2025, and its code (its 224-pixel resize is that of the anchor).
    """

    name: ClassVar[str] = "ttc"
    captured_by_default: ClassVar[bool] = True
    strategy: ClassVar[str] = "pixels"
    PRESETS: ClassVar = {"code": {}, "paper": {}}

    eps: Annotated[float, Range(above=0, at_most=1)] = 4 / 255
    threshold: Annotated[float, Positive()] = 0.2
    beta: Annotated[float, Finite()] = 2.0
    prompt: str = "This is a photo of a"
    prompt_length: int | None = None
    lr: Annotated[float, Positive(most=1e6)] = field(default=1 / 255, kw_only=True)
    steps: int = field(default=2, kw_only=True)

    def forward(self, model: VisionLanguageModel, images: Images) -> Seen:
        """The feature of each image as it is, and its zero-shot logits."""
        x = images.anchors()
        clean = model.encode_image(x)
        features = unit(clean)
        logits = model.logit_scale.exp() * features @ images.text[0].T
        parts = {"pixels": x, "clean": clean, "text": images.text[0]}
        return Seen(features.unsqueeze(1), logits.unsqueeze(1), parts=parts)

    def start(self, images: Images, seen: Seen) -> Tensor:
        """Random perturbations [B, 3, R, R] to start from, within ``eps`` and the image's range."""
        x, noise = seen.parts["pixels"], images.noise
        if noise is None:
            noise = self.noise(images.views, images.seed, None)
        return (x + noise.expand_as(x)).clamp(0, 1) - x

    def objective(self, model, features, *, state, constants, valid) -> Objective:
        """The negative distance that the feature has moved: updates increase the distance."""
        clean, added = features.parts["clean"], state["tuned"]
        moved = model.encode_image(features.parts["pixels"] + added) - clean
        stability = state.get("stability")
        if stability is None:
            stability = moved.detach().norm(dim=1) / clean.norm(dim=1)
        before = [state["steps"]] if "steps" in state else []  # [B, k, 3, R, R]
        return Objective(
            losses={"total": -moved.square().sum(dim=1)},
            logits=features.logits[:, 0],
            n_used=len(moved),
            state={
                "stability": stability,
                "steps": torch.cat([*before, added.detach().unsqueeze(1)], dim=1),
            },
        )

    def move(self, seen: Seen, added: Tensor, grad: Tensor) -> Tensor:
        """One signed step of the perturbation, within ``eps`` and the image's range."""
        x = seen.parts["pixels"]
        step = (added - self.lr * grad.sign()).clamp(-self.eps, self.eps)
        return (x + step).clamp(0, 1) - x

    def predict(self, model, seen, state) -> Prediction:
        """Logits with the weighted perturbation where an image looks attacked, else the first."""
        x, stability = seen.parts["pixels"], state["stability"]
        perturbations = [*state["steps"].unbind(1), state["tuned"]]
        steps = torch.arange(self.steps + 1, dtype=torch.float64, device=x.device)
        weights = (self.beta * steps).softmax(0).to(x)
        first = perturbations[0]
        total = weights[0] * first
        for weight, added in zip(weights[1:], perturbations[1:], strict=True):
            total = total + weight * added
        attacked = (stability < self.threshold)[:, None, None, None]
        added = torch.where(attacked, total, first)
        features = unit(model.encode_image(x + added))
        after = model.logit_scale.exp() * features @ seen.parts["text"].T
        return Prediction(
            logits=after if self.score_at == "after" else seen.logits[:, 0],
            stats={"perturbation": added, "stability": stability},
        )

    def noise(self, views: Sequence[Views], seed: int, given: Tensor | None) -> Tensor:
        """Random numbers [1, 3, R, R] in [-eps, eps], or ``given``, checked."""
        x = views[0].base
        if given is None:
            generator = torch.Generator().manual_seed(seed)
            row = torch.rand(x.shape[1:], generator=generator, dtype=torch.float64, device="cpu")
            drawn = (self.eps * (2 * row - 1)).to(x.dtype).unsqueeze(0)
            return drawn if x.device == drawn.device else to_device([drawn], x.device)[0]
        noise = dense("noise", given).detach() if isinstance(given, Tensor) else given
        fits = isinstance(noise, Tensor) and noise.ndim == 4 and len(noise) in (1, len(views))
        if not fits or noise.shape[1:] != x.shape[1:]:
            kind = list(noise.shape) if isinstance(noise, Tensor) else type(noise).__name__
            shape = ", ".join(map(str, x.shape[1:]))
            raise ValueError(f"noise must be [{len(views)}, {shape}] or one for all images, found "
                             f"{kind}")  # fmt: skip
        if not torch.isfinite(noise).all():
            raise ValueError("noise holds non-finite values (NaN or infinity)")
        return noise.to(x)
