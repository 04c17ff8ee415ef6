"""TTC: a counterattack on the image tower, without labels or training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ..ops.checks import dense
from .episodic import Episode, Episodic, zero_shot
from .options import Finite, Positive, Range


@dataclass(frozen=True)
class TTC(Episodic):
    """Test-time counterattack: pixels move so that the feature leaves where it was; images whose
    feature a little noise hardly moves (falsely stable, as attacked ones are) get the
    perturbation, others only the noise.

    Args:
        eps: radius of the perturbation, in pixels of [0, 1].
        threshold: relative move of the feature under the noise, below which an image is taken for
            attacked.
        beta: the perturbation after step k counts with weight softmax(beta k).
        prompt, prompt_length: as in ``TPT``; nothing of it is tuned.
        lr: length of a sign step, in pixels.
        steps: sign steps.

    ``stats``: ``"perturbation"`` [3, R, R], ``"stability"``: the relative move, 0-d. ``.logits``:
    of the image with the perturbation. ``adapted.step(images, noise=noise)`` gives the start
    [B or 1, 3, R, R], in [-eps, eps], that is drawn otherwise.

    Source: Xing et al., CVPR 2025, and its code (its 224-pixel resize is that of the anchor).
    """

    name: ClassVar[str] = "ttc"
    PRESETS: ClassVar = {"code": {}, "paper": {}}

    eps: Annotated[float, Range(above=0, at_most=1)] = 4 / 255
    threshold: Annotated[float, Positive()] = 0.2
    beta: Annotated[float, Finite()] = 2.0
    prompt: str = "This is a photo of a"
    prompt_length: int | None = None
    lr: Annotated[float, Positive(most=1e6)] = field(default=1 / 255, kw_only=True)
    steps: int = field(default=2, kw_only=True)

    def run(self, model, prompts, views, *, trace=False, resources=None) -> Episode:
        x = torch.cat([each.base[:1] for each in views])  # [B, 3, R, R]
        noise = self._noise(x, resources or {})
        with torch.no_grad():
            before = zero_shot(model, prompts, x)
            clean = model.encode_image(x)
        delta, stability = self._counterattack(model, x, clean, noise)
        with torch.no_grad():
            after = zero_shot(model, prompts, x + delta)
        return Episode(
            logits=after if self.score_at == "after" else before,
            logits_before=before,
            used=after.isfinite().all(1),
            stats={"perturbation": delta, "stability": stability},
        )

    def _noise(self, x: Tensor, resources) -> Tensor:
        noise = resources.get("noise")
        if noise is None:
            generator = torch.Generator().manual_seed(resources.get("seed", 0))
            row = torch.rand(x.shape[1:], generator=generator, dtype=torch.float64, device="cpu")
            return (self.eps * (2 * row - 1)).to(x).expand_as(x)
        if isinstance(noise, Tensor):
            noise = dense("noise", noise).detach()
        fits = isinstance(noise, Tensor) and noise.ndim == 4 and len(noise) in (1, len(x))
        if not fits or noise.shape[1:] != x.shape[1:]:
            found = list(noise.shape) if isinstance(noise, Tensor) else type(noise).__name__
            raise ValueError(f"noise must be [{len(x)}, {', '.join(map(str, x.shape[1:]))}] or one "
                             f"for all images, found {found}")  # fmt: skip
        if not torch.isfinite(noise).all():
            raise ValueError("noise holds non-finite values (NaN or infinity)")
        return noise.to(x).expand_as(x)

    def _counterattack(
        self, model, x: Tensor, clean: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Perturbation [B, 3, R, R] and stability [B]."""
        delta = first = (x + noise).clamp(0, 1) - x
        steps = torch.arange(self.steps + 1, dtype=torch.float64, device=x.device)
        weights = (self.beta * steps).softmax(0)
        total = weights[0].to(x) * first
        stability = clean.new_zeros(len(clean))
        for k in range(self.steps):
            with torch.enable_grad():
                leaf = delta.detach().requires_grad_()
                moved = model.encode_image(x + leaf) - clean
                (grad,) = torch.autograd.grad(moved.square().sum(), leaf)
            if k == 0:
                stability = moved.detach().norm(dim=1) / clean.norm(dim=1)
            step = (delta + self.lr * grad.sign()).clamp(-self.eps, self.eps)
            delta = (x + step).clamp(0, 1) - x
            total = total + weights[k + 1].to(x) * delta
        attacked = (stability < self.threshold)[:, None, None, None]
        return torch.where(attacked, total, first), stability
