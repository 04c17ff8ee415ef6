"""Efficient fine-tuning of RAda's head on labelled features."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .models.rational import RationalHead

_OPTIMIZERS, _PENALTIES, _OBJECTIVES = ("adam", "sgd"), (None, "mse", "linf"), ("ce", "sigmoid")
WARM_UP = 1e-5  # learning rate of the first epoch, whatever ``lr`` is


def mask_penalty(mask: Tensor, kind: str) -> Tensor:
    """How far a mask [B, K, D] is from 1: ``"mse"``: mean of (mask - 1)^2, ``"linf"``: mean over
    the batch of max |mask - 1| (ill-conditioned right after the zero start, where many tie)."""
    away = mask - 1
    return away.square().mean() if kind == "mse" else away.abs().flatten(1).amax(dim=1).mean()


def objective_loss(logits: Tensor, labels: Tensor, objective: str) -> Tensor:
    """``"ce"``: cross entropy. ``"sigmoid"``: the official SigLIP trainer's
    -mean(log sigmoid(onehot * logits)), in which other classes are a constant log 2."""
    if objective == "ce":
        return F.cross_entropy(logits, labels)
    return -F.logsigmoid(F.one_hot(labels, logits.shape[1]) * logits).mean()


class FineTuning:
    """Supervised steps on a head, in place: objective + alpha * penalty of the mask.

    Args:
        head: trained in place.
        text: class features [K, D], or a function that gives them (then its parameters belong into
            ``also``).
        scale, bias: of the logits; a number, a tensor or a function that gives one.
        image: what features go through before the head (an adapter); None: nothing.
        also: further parameters to train.
        objective: ``"ce"`` or ``"sigmoid"``.
        penalty, alpha: ``"mse"``, ``"linf"`` or None, and its weight.
        optimizer: ``"adam"`` (0.9, 0.999) or ``"sgd"`` (momentum 0.9), weight decay coupled (L2).
        lr: from the second epoch on, along a cosine over ``epochs``; the first has 1e-5.

    Source: the official code's trainers on Dassl. The penalty is reported where its weight is 0.
    """

    def __init__(
        self,
        head: RationalHead,
        text: Tensor | Callable[[], Tensor],
        *,
        scale: float | Tensor | Callable[[], Tensor] = 100.0,
        bias: float | Tensor | None = None,
        image: Callable[[Tensor], Tensor] | None = None,
        also: Iterable[nn.Parameter] = (),
        objective: str = "ce",
        penalty: str | None = "mse",
        alpha: float = 0.0,
        optimizer: str = "adam",
        lr: float = 3.5e-3,
        weight_decay: float = 5e-4,
        epochs: int = 5,
    ) -> None:
        for name, value, known in (
            ("optimizer", optimizer, _OPTIMIZERS), ("penalty", penalty, _PENALTIES),
            ("objective", objective, _OBJECTIVES),
        ):  # fmt: skip
            if value not in known:
                raise ValueError(
                    f"{name}={value!r} is unknown; known: {', '.join(map(repr, known))}"
                )
        for name, value, least in (
            ("alpha", alpha, 0), ("lr", lr, 0), ("weight_decay", weight_decay, 0),
            ("epochs", epochs, 1),
        ):  # fmt: skip
            number = isinstance(value, (int, float)) and math.isfinite(value)
            if not number or value < least or (name == "lr" and value == 0):
                raise ValueError(f"{name}={value!r}: needed a number of at least {least}")
        self.head, self.text, self.scale, self.bias, self.image = head, text, scale, bias, image
        self.objective, self.penalty, self.alpha = objective, penalty, alpha
        self.lr, self.epochs, self.epoch = lr, epochs, 0
        parameters = [*head.parameters(), *also]
        kinds = {
            "adam": lambda: torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay),
            "sgd": lambda: torch.optim.SGD(
                parameters, lr=lr, momentum=0.9, weight_decay=weight_decay
            ),
        }
        self.optimizer = kinds[optimizer]()

    @property
    def rate(self) -> float:
        """Learning rate of this epoch."""
        if self.epoch == 0:
            return WARM_UP
        return self.lr * (1 + math.cos(math.pi * (self.epoch - 1) / self.epochs)) / 2

    def step(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """One update on features [B, D] and labels [B].

        Returns:
            ``"loss"``, ``"objective"``, ``"penalty"`` 0-d, ``"logits"`` [B, K] and ``"mask"``
            [B, K, D] before the update.

        Raises:
            ValueError, TypeError: features or labels cannot be used; nothing is updated.
        """
        text = self.text() if callable(self.text) else self.text
        if labels.shape != features.shape[:1] or labels.is_floating_point():
            raise ValueError(
                f"labels must be integers [{len(features)}], found {labels.dtype} "
                f"{list(labels.shape)}"
            )
        if not 0 <= int(labels.min()) <= int(labels.max()) < len(text):
            raise ValueError(f"labels must lie in 0 to {len(text) - 1}, the classes of text")
        with torch.inference_mode(False), torch.enable_grad():
            image = features if self.image is None else self.image(features)
            scale = self.scale() if callable(self.scale) else self.scale
            logits, mask = self.head(image, text, scale, self.bias, return_mask=True)
            value = objective_loss(logits, labels.long(), self.objective)
            away = mask.new_zeros(()) if self.penalty is None else mask_penalty(mask, self.penalty)
            loss = value + self.alpha * away if self.alpha else value
            if not torch.isfinite(loss):
                raise ValueError("the loss is not finite: are the features?")
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate
            self.optimizer.step()
        found = {"loss": loss, "objective": value, "penalty": away, "logits": logits, "mask": mask}
        return {name: x.detach() for name, x in found.items()}

    def end_epoch(self) -> None:
        """On to the next learning rate."""
        self.epoch += 1


def finetune(
    head: RationalHead,
    features: Tensor,
    labels: Tensor,
    text: Tensor,
    *,
    scale: float = 100.0,
    batch: int = 32,
    epochs: int = 5,
    seed: int = 0,
    **options: Any,
) -> RationalHead:
    """A fine-tuned copy of a head; encoders stay frozen, so that features are all it needs.

    Args:
        head: not changed.
        features, labels: [N, D] and [N], shuffled anew each epoch.
        text: [K, D]: class texts, prototypes or rows of a linear classifier.
        scale: of the logits; batch, epochs: as they say; seed: of the order.
        options: of ``FineTuning`` (``objective``, ``penalty``, ``alpha``, ``optimizer``, ``lr``,
            ``weight_decay``, ``bias``, ...).

    Raises:
        ValueError, TypeError: features, labels or an option cannot be used.
    """
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch={batch!r}: needed a positive integer")
    if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1:
        raise ValueError(f"epochs={epochs!r}: needed a positive integer")
    if not isinstance(features, Tensor) or features.ndim != 2 or not len(features):
        raise ValueError("features must be a tensor [N, D] with at least 1 sample")
    if not isinstance(labels, Tensor) or labels.shape != features.shape[:1]:
        raise ValueError(f"labels must be a tensor [{len(features)}]")
    with torch.inference_mode(False):
        tuned = copy.deepcopy(head).requires_grad_(True)
        tuning = FineTuning(tuned, text, scale=scale, epochs=epochs, **options)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            for index in torch.randperm(len(features), generator=generator).split(batch):
                index = index.to(features.device)
                tuning.step(features[index], labels[index])
            tuning.end_epoch()
    return tuned
