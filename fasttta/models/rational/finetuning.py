"""Fine-tuning of RAda's head on labelled data, with frozen encoders or through them."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops.checks import class_labels
from ..clip.model import CLIP
from ..copies import replace_parameters, structural_copy
from .head import RationalHead
from .models import ModelWithHead, RationalCAVMAE, RationalCLIP

_OPTIMIZERS, _PENALTIES, _OBJECTIVES = ("adam", "sgd"), (None, "mse", "linf"), ("ce", "sigmoid")
Tuned = TypeVar("Tuned", bound=RationalHead | ModelWithHead)
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
        scale: factor of the logits; a number, a tensor or a function that gives one.
        bias: added to the logits; None: nothing.
        image: a function that features [B, D] go through before the head (an adapter); None: none.
        also: further parameters to train.
        also_lr: their learning rate; None: ``lr``.
        score: (image, text) -> logits and mask, where it is not the head alone.
        objective: ``"ce"`` or ``"sigmoid"``.
        penalty: of the mask, ``"mse"``, ``"linf"`` or None; see ``mask_penalty``.
        alpha: weight of the penalty.
        optimizer: ``"adam"`` (0.9, 0.999) or ``"sgd"`` (momentum 0.9).
        lr: learning rate from the second epoch on, along a cosine; that of the first is 1e-5.
        weight_decay: coupled (L2).
        epochs: length of the cosine.

    Raises:
        ValueError: an option is unknown or out of its range.

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
        also_lr: float | None = None,
        score: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        objective: str = "ce",
        penalty: str | None = "mse",
        alpha: float = 0.0,
        optimizer: str = "adam",
        lr: float = 3.5e-3,
        weight_decay: float = 5e-4,
        epochs: int = 5,
    ) -> None:
        for name, choice, choices in (
            ("optimizer", optimizer, _OPTIMIZERS), ("penalty", penalty, _PENALTIES),
            ("objective", objective, _OBJECTIVES),
        ):  # fmt: skip
            if choice not in choices:
                raise ValueError(
                    f"{name}={choice!r} is unknown; known: {', '.join(map(repr, choices))}"
                )
        for name, value, least in (
            ("alpha", alpha, 0), ("lr", lr, 0), ("weight_decay", weight_decay, 0),
            ("epochs", epochs, 1), ("also_lr", lr if also_lr is None else also_lr, 0),
        ):  # fmt: skip
            number = isinstance(value, (int, float)) and math.isfinite(value)
            if not number or value < least or (name == "lr" and value == 0):
                raise ValueError(f"{name}={value!r}: needed a number of at least {least}")
        self.head, self.text, self.scale, self.bias, self.image = head, text, scale, bias, image
        self.objective, self.penalty, self.alpha = objective, penalty, alpha
        self.lr, self.epochs, self.epoch = lr, epochs, 0
        self.score = score
        parameters = [{"params": list(head.parameters()), "share": 1.0}]
        if also := list(also):
            share = 1.0 if also_lr is None else also_lr / lr
            parameters.append({"params": also, "share": share})
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
        if isinstance(labels, Tensor) and not len(labels):
            raise ValueError("labels are empty: needed at least 1 sample")
        with torch.inference_mode(False), torch.enable_grad():
            text = self.text() if callable(self.text) else self.text
            labels = _labels(labels, len(features), len(text))
            image = features if self.image is None else self.image(features)
            scale = self.scale() if callable(self.scale) else self.scale
            if self.score is None:
                logits, mask = self.head(image, text, scale, self.bias, return_mask=True)
            else:
                logits, mask = self.score(image, text)
            value = objective_loss(logits, labels, self.objective)
            away = mask.new_zeros(()) if self.penalty is None else mask_penalty(mask, self.penalty)
            loss = value + self.alpha * away if self.alpha else value
            if not torch.isfinite(loss):
                raise ValueError("the loss is not finite: are the features?")
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * group["share"]
            self.optimizer.step()
        results = {
            "loss": loss, "objective": value, "penalty": away, "logits": logits, "mask": mask
        }  # fmt: skip
        return {name: x.detach() for name, x in results.items()}

    def end_epoch(self) -> None:
        """Counts the epoch, on which the learning rate depends."""
        self.epoch += 1


def finetune(
    model: Tuned,
    features: Tensor | tuple[Tensor, ...],
    labels: Tensor,
    text: Tensor | None = None,
    *,
    scale: float | None = None,
    encoders: bool = False,
    classes: Tensor | None = None,
    encoder_lr: float = 1e-5,
    batch: int = 32,
    epochs: int = 5,
    seed: int = 0,
    **options: Any,
) -> Tuned:
    """A fine-tuned copy of a head, or of a model with one.

    Args:
        model: a ``RationalHead``, or ``FeatureClassifier``, ``RationalCLIP``, ``RationalCAVMAE``
            (``clip.rational()``, ``cavmae.rational()``); not changed.
        features: [N, D]; of a model what it takes, N samples each: images; (audio, video).
        labels: [N] integers; samples are shuffled anew each epoch.
        text: with a head alone: [K, D], class texts, prototypes or rows of a linear classifier.
        scale: with a head alone: of the logits; None: 100.
        encoders: also train what is in front of the head (full fine-tuning): CLIP's image tower;
            a CAV-MAE up to its linear classifier. Else features are computed once.
        classes: of a CLIP, with ``encoders``: token ids [K, L]; its text tower is trained too,
            token and position embeddings excepted.
        encoder_lr: learning rate of the encoders, along the same schedule.
        batch: samples in a step.
        epochs: passes over all samples.
        seed: of the samples' order.
        options: of ``FineTuning`` (``objective``, ``penalty``, ``alpha``, ``optimizer``, ``lr``,
            ``weight_decay``, ``bias``, ...).

    Raises:
        ValueError, TypeError: features, labels or an option cannot be used.

    Source: Chen et al., ICCV 2025. Of full fine-tuning only results were published; the objective
    here is that of the published code, its learning rate is ours.
    """
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch={batch!r}: needed a positive integer")
    if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1:
        raise ValueError(f"epochs={epochs!r}: needed a positive integer")
    inputs = features if isinstance(features, tuple) else (features,)
    is_model = _check_model(model, inputs, text, scale, encoders, classes)
    of_model = ("bias", "image", "score", "also", "also_lr")
    if is_model and (names := [name for name in of_model if name in options]):
        raise ValueError(f"{', '.join(names)}: {type(model).__name__} has its own")
    if isinstance(model, ModelWithHead):
        num_classes = model.num_classes
    else:
        assert text is not None  # _check_model
        num_classes = len(text)
    labels = _labels(labels, len(inputs[0]), num_classes)
    with torch.inference_mode(False):
        tuned: RationalHead | ModelWithHead
        class_text: Callable[[], Tensor] | None = None
        if not isinstance(model, ModelWithHead):
            assert text is not None  # _check_model
            tuned = copy.deepcopy(model).requires_grad_(True)
            scale = 100.0 if scale is None else scale
            tuning = FineTuning(tuned, text, scale=scale, epochs=epochs, **options)
        else:
            tuned = cast(ModelWithHead, structural_copy(model))
            replace_parameters(tuned, _copier(encoders))
            with torch.no_grad():
                inputs = inputs if encoders else (_encoded(tuned, inputs, batch),)
            also = _encoder_parameters(tuned, classes) if encoders else []
            if classes is not None:
                assert isinstance(tuned, RationalCLIP)  # _check_model
                prompts = tuned.model.prompts(classes)
                class_text = lambda: prompts.features()[0]  # noqa: E731
            for parameter in (*tuned.head.parameters(), *also):
                parameter.requires_grad_(True)
            tuning = FineTuning(
                tuned.head, class_text or tuned.text, epochs=epochs, score=tuned.scored, also=also,
                also_lr=encoder_lr, **options,
                image=(lambda rows: tuned.encode(*(x[rows] for x in inputs))) if encoders else None,
            )  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            order = torch.randperm(len(labels), generator=generator, device="cpu")
            for index in order.split(batch):
                index = index.to(labels.device)
                tuning.step(index if is_model and encoders else inputs[0][index], labels[index])
            tuning.end_epoch()
        if class_text is not None:
            assert isinstance(tuned, RationalCLIP)
            with torch.no_grad():
                text = class_text()
                tuned.text = (text / text.norm(dim=-1, keepdim=True)).to(tuned.text.dtype)
                tuned.model.class_features = tuned.text.clone()
    return cast(Tuned, tuned.requires_grad_(False) if is_model else tuned)


def _labels(labels: Tensor, samples: int, classes: int) -> Tensor:
    if isinstance(labels, Tensor) and labels.is_floating_point():
        raise ValueError(
            f"labels must be integers [{samples}], found {labels.dtype} {list(labels.shape)}"
        )
    return class_labels(labels, samples, classes)


def _check_model(model, inputs, text, scale, encoders, classes) -> bool:
    """Whether it is a model with a head, and not a head alone; raises what does not fit."""
    is_model = isinstance(model, ModelWithHead)
    if not is_model and not isinstance(model, RationalHead):
        raise TypeError(f"model must be a RationalHead or a model with one, found {model!r:.80}")
    if is_model:
        for name, value in (("text", text), ("scale", scale)):
            if value is not None:
                raise ValueError(f"{name}: {type(model).__name__} has its own")
        if len(inputs) != len(model.input_names):
            raise ValueError(
                f"features must be ({', '.join(model.input_names)}), found {len(inputs)}"
            )
        model.check_inputs(*inputs)
        if classes is not None and not (encoders and isinstance(model, RationalCLIP)):
            raise ValueError("classes: only of a CLIP whose encoders are trained")
        if classes is not None and len(classes) != model.num_classes:
            raise ValueError(f"classes has {len(classes)} rows, needed {model.num_classes}")
        return True
    if encoders or classes is not None:
        raise ValueError("encoders, classes: a head alone has none; give clip.rational()")
    if text is None:
        raise ValueError("text=None: a head alone needs class features [K, D]")
    features = inputs[0]
    if not isinstance(features, Tensor) or features.ndim != 2 or not len(features):
        raise ValueError("features must be a tensor [N, D] with at least 1 sample")
    return False


def _copier(encoders: bool) -> Callable[[str, nn.Parameter], nn.Parameter]:
    """Parameters for ``replace_parameters``: copies of those that are trained, others over the same
    memory, so that neither flags nor gradients reach the caller's."""

    def copied(name: str, parameter: nn.Parameter) -> nn.Parameter:
        trained = encoders or name.startswith("head.")
        value = parameter.detach().clone() if trained else parameter.detach()
        return nn.Parameter(value, requires_grad=False)

    return copied


def _encoded(model: ModelWithHead, inputs: tuple[Tensor, ...], batch: int) -> Tensor:
    parts = zip(*(x.split(batch) for x in inputs), strict=True)
    return torch.cat([model.encode(*part) for part in parts])


def _encoder_parameters(model: ModelWithHead, classes: Tensor | None) -> list[nn.Parameter]:
    """The parameters in front of the head that are trained."""
    if isinstance(model, RationalCLIP):
        clip = cast(CLIP, model.model)
        parameters = list(clip.visual.parameters())
        if classes is not None:
            parameters += [*clip.transformer.parameters(), *clip.ln_final.parameters()]
            parameters.append(clip.text_projection)
        return parameters
    if isinstance(model, RationalCAVMAE):
        # LayerNorms of a modality alone never run here
        return [
            p for n, p in model.model.named_parameters()
            if not re.search(r"(^mlp_head\.1|norm\d?_[av])\.", n)
        ]  # fmt: skip
    raise ValueError(f"encoders: {type(model).__name__} has none; its features are given")
