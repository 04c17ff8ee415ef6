"""From a user's model to one that adapts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from .. import methods
from ..engine import folder as saves
from ..engine import record as records
from ..engine.precision import resolve
from ..engine.result import warn
from ..engine.shift_detector import Guard, ShiftDetector
from ..families import Family, adapted_as, recognise
from ..methods.base import Method, captured_by_default
from ..methods.episodic import Episodic
from ..methods.options import option_names
from ..models import CAVMAE, RationalCLIP
from ..models.specified.spec import ModelSpec
from ..source_stats import SourceStats
from .base import Adapted
from .fusion import AdaptedFusion
from .head import AdaptedHead
from .images import AdaptedCLIP
from .saved import recorded_method

_ENGINES = ("auto", "eager", "graph")

# names that make an AdaptedCLIP of a CLIP; a name that is no literal may also be "rada"
_OfImages = Literal["auto", "source", "tpt", "c-tpt", "r-tpt", "a-tpt", "mta", "ttc"]


@overload
def adapt(
    model: RationalCLIP,
    method: Literal["auto", "rada"] | methods.RAda = "auto",
    *,
    precision: str = "auto",
    engine: str = "auto",
    guard: ShiftDetector | None = None,
    seed: int = 0,
    preset: str | None = None,
    **options: Any,
) -> AdaptedHead: ...
@overload
def adapt(
    model: nn.Module,
    method: Literal["rada"] | methods.RAda,
    *,
    classes: Sequence[str] | Tensor,
    precision: str = "auto",
    engine: str = "auto",
    guard: ShiftDetector | None = None,
    seed: int = 0,
    preset: str | None = None,
    **options: Any,
) -> AdaptedHead: ...
@overload
def adapt(
    model: nn.Module,
    method: _OfImages | methods.Source | Episodic = "auto",
    *,
    classes: Sequence[str] | Tensor,
    precision: str = "auto",
    engine: str = "auto",
    seed: int = 0,
    preset: str | None = None,
    **options: Any,
) -> AdaptedCLIP: ...
@overload
def adapt(
    model: nn.Module,
    method: str | Method,
    *,
    classes: Sequence[str] | Tensor,
    precision: str = "auto",
    engine: str = "auto",
    guard: ShiftDetector | None = None,
    seed: int = 0,
    preset: str | None = None,
    **options: Any,
) -> AdaptedCLIP | AdaptedHead: ...
@overload
def adapt(
    model: nn.Module,
    method: str | Method = "auto",
    *,
    spec: ModelSpec | None = None,
    classes: None = None,
    precision: str = "auto",
    engine: str = "auto",
    guard: ShiftDetector | None = None,
    seed: int = 0,
    preset: str | None = None,
    **options: Any,
) -> AdaptedFusion: ...
def adapt(
    model: nn.Module,
    method: str | Method = "auto",
    *,
    spec: ModelSpec | None = None,
    classes: object = None,
    precision: str = "auto",
    engine: str = "auto",
    guard: object = None,
    seed: int = 0,
    preset: str | None = None,
    verify_model: str = "first",
    **options: object,
) -> Adapted:
    """Makes a model adapt, label-free, to what it is called on.

    Args:
        model: a ``fasttta.models`` model, or a module of the official CAV-MAE's structure (CAV-MAE,
            READ, ABPEM or BriMPR code; in DataParallel, DDP or torch.compile or not), which is
            compared with its own forward on the first batch; or any fusion transformer with a
            ``spec``; or a CLIP (``fasttta.models.CLIP``, Hugging Face's, open_clip's, OpenAI's).
            It is never modified: frozen weights are shared, tuned tensors are private
            copies.
        method: a name (``fasttta.methods.names()``), a method object, or ``"auto"``: ``"abpem"``
            for two-modality fusion models, ``"a-tpt"`` for CLIP, ``"rada"`` for models with a
            rational head.
        precision: ``"fp64"``, ``"fp32"``, ``"tf32"``, ``"bf16"``, ``"fp8"``, or ``"auto"``: a
            float64 model stays in float64, else bf16 on GPUs that have it, else fp32. Tuned tensors
            are fp32 (fp64 under ``"fp64"``); fp32 means IEEE fp32. ``"fp8"`` is bf16 with frozen
            blocks of a CAV-MAE's encoders or of a CLIP's vision transformer in float8 (e4m3), where
            no gradient runs through them; emulated where the device has no such products.
        engine: ``"graph"``: steps captured as CUDA graphs, one replay a step; needs a GPU.
            ``"eager"``. ``"auto"``: graph for CAV-MAE and CLIP on a GPU with a method that says
            ``captured_by_default``, and eager after a warning if that fails; else eager.
        spec: ``ModelSpec`` of a model that is no CAV-MAE; also compared on the first batch.
        classes: for CLIP: class names, or token ids [C, L] (int64).
        guard: ``fasttta.ShiftDetector(...)``: after a batch that signals a shift the state is reset
            as by ``reset()``; values that ``load_tuned`` set are lost. Only the detector's settings
            are copied.
        seed: of the random state.
        verify_model: how every call checks that the wrapped model has not changed; the error names
            what did. ``"first"`` compares versions, storages and identities of tensors, hooks and
            classes: it notices ``load_state_dict``, optimiser steps, replaced tensors and layers,
            and takes about 0.3 ms, but misses writes through ``.data`` or numpy. ``"always"`` also
            reads all weights and buffers. ``"never"`` checks nothing.
            (Moving it to another device or type, loading the same weights again, ``train()`` and
            ``eval()`` change nothing.)
        preset: name of published settings of the method, ``methods.ABPEM.preset(name)``;
            ``options`` override its values.
        options: of the method; ``adapt(m, "abpem", k=8)`` is ``adapt(m, methods.ABPEM(k=8))``.
            Also what a method takes from source data: ``source_stats`` (``SourceStats``, for
            BriMPR and ``ABPEM(anchor="source")``), ``fisher`` (of ``collect_fisher``, for EATA);
            for class names ``tokenizer``: a callable, or the path of CLIP's merges file.

    Raises:
        TypeError: not a model that fasttta knows, or an option that the method does not have.
        ValueError: an unknown name or a value out of range.
    """
    family = recognise(model, spec)
    if classes is not None and not family.takes_classes:
        raise ValueError(
            f"classes={classes!r:.80}: recognised as {family.name}; {family.no_classes}"
        )
    if guard is not None and not isinstance(guard, ShiftDetector):
        raise TypeError(f"guard must be a fasttta.ShiftDetector, found {guard!r:.80}")
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(f"seed must be an int, found {seed!r}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed} is out of range, needed 0 to 2**63 - 1")
    chosen, resources = _method(family.default_method if method == "auto" else method, options,
                                preset)  # fmt: skip
    _check_origin(resources.get("source_stats"), family)
    adapted = _made(
        model, family, chosen, precision=precision, engine=engine, seed=int(seed), classes=classes,
        resources=resources, guard=None if guard is None else Guard(guard),
        verify_model=verify_model,
    )  # fmt: skip
    _warn_of_ranks(model)
    return adapted.made_by(unpickled, spec, engine)


def _warn_of_ranks(model: nn.Module) -> None:
    """Warns that ranks are not synchronised if the model is in DistributedDataParallel."""
    inner: object = model
    while isinstance(inner, nn.Module):
        if isinstance(inner, nn.parallel.DistributedDataParallel):
            warn(
                "the model is in DistributedDataParallel: each rank adapts on its own batches, "
                "so that tuned tensors differ between ranks; of ranks that save into one folder "
                "the last save counts",
                UserWarning,
            )
            return
        # not ``or``: a compiled module has a length only if the one within has
        inner = inner._modules.get("module", inner._modules.get("_orig_mod"))


def _method(
    method: str | Method, options: dict[str, Any], preset: str | None = None
) -> tuple[Method, dict[str, Any]]:
    """The method object, and those options that are tensors from source data."""
    if not isinstance(method, (str, Method)):
        hint = f"; give an object of it: {method.__name__}(...)" if isinstance(method, type) else ""
        raise TypeError(f"method must be a name or a method object, found {method!r:.80}{hint}")
    cls = methods.by_name(method) if isinstance(method, str) else type(method)
    resources = {name: value for name, value in options.items() if name in cls.RESOURCES}
    options = {name: value for name, value in options.items() if name not in resources}
    if isinstance(method, Method):
        if preset is not None:
            raise TypeError(
                f"preset={preset!r}: a method object has its settings; needed a name with it, or "
                f"{cls.__name__}.preset({preset!r})"
            )
        if options:
            raise TypeError(
                f"{', '.join(options)}: options are given to the method object itself, "
                f"{cls.__name__}(...)"
            )
        return method, resources
    unknown = [name for name in options if name not in option_names(cls)]
    if unknown:
        raise TypeError(
            f"{cls.__name__} has no option {', '.join(unknown)}; known: "
            f"{', '.join((*option_names(cls), *cls.RESOURCES))}"
        )
    if preset is not None:
        cls.preset(preset)  # an error for an unknown one
        options = {**cls.PRESETS[preset], **options}
    return cls(**options), resources


def _made(
    model: nn.Module,
    family: Any,
    method: Any,
    *,
    precision: str,
    engine: str,
    seed: int,
    classes: object,
    resources: Mapping[str, Any],
    guard: Guard | None,
    verify_model: str,
    constants: Mapping[str, Tensor] | None = None,
) -> Adapted:
    """The adapted object that runs the method on models of the family.

    Args:
        resources: tensors from source data, and for class names ``"tokenizer"``.
        constants: what the method computed from ``resources``; None: it is computed here.
    """
    kind = adapted_as(family, method)
    parameter = next(family.model.parameters())
    numbers = resolve(precision, parameter.device, parameter.dtype)
    covered = isinstance(family.model, CAVMAE) if kind == "batches" else True
    covered = covered and numbers.name != "fp8"
    engine = _engine(engine, parameter.device, covered and captured_by_default(method))
    options: dict[str, Any] = {"engine": engine, "seed": seed, "verify_model": verify_model}
    if kind == "batches":
        if constants is None:
            constants = method.constants(family.model, resources)
        return AdaptedFusion(
            model, family, method, numbers, constants=constants, guard=guard, **options
        )
    options |= {"classes": classes, "resources": resources}
    if kind == "head":
        return AdaptedHead(model, family, method, numbers, guard=guard, **options)
    if guard is not None:
        raise ValueError(
            f"guard: {method.name!r} begins every image anew, so that there is nothing to reset"
        )
    return AdaptedCLIP(model, family, method, numbers, **options)


def _check_origin(source_stats: object, family: Family) -> None:
    """Raises ValueError if source statistics name the digest of other weights."""
    if isinstance(source_stats, SourceStats) and source_stats.model is not None:
        digest = records.model_digest(family.model)
        if digest != source_stats.model:
            raise ValueError(
                f"source_stats are of another model: weights {source_stats.model}, this one's are "
                f"{digest}; collect them anew, or, if you know that they fit, pass "
                "dataclasses.replace(source_stats, model=None)"
            )


def _engine(engine: str, device: torch.device, covered: bool) -> str:
    """``covered``: whether tests on a GPU capture this model, method and precision."""
    if engine not in _ENGINES:
        raise ValueError(f"engine={engine!r} is unknown; known: {', '.join(map(repr, _ENGINES))}")
    if engine == "auto":
        return "graph" if covered and device.type == "cuda" else "eager"
    if engine == "graph" and device.type != "cuda":
        reason = f"the model is on {device}"
        if not torch.cuda.is_available():
            reason = "CUDA is not available"
        raise ValueError(f'engine="graph" needs a model on a GPU, {reason}; use engine="eager"')
    return engine


def load(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    spec: ModelSpec | None = None,
    engine: str = "auto",
    method: type[Method] | None = None,
) -> Adapted:
    """Goes on where ``Adapted.save(folder)`` stopped: the state is bit-identical. No code is
    imported or run because of what the files say.

    Args:
        model: the model that the state was saved for.
        folder: where it was saved.
        spec, engine: as in ``adapt``.
        method: the class of the method, if that is not registered under its name.

    Raises:
        FileNotFoundError: nothing was saved there.
        ValueError: the files are damaged or of another model; names the file and the field.
        TypeError: ``method`` is no class of a method; not a model that fasttta knows.
    """
    if method is not None:
        if not (isinstance(method, type) and issubclass(method, Method)):
            raise TypeError(
                f"method must be a subclass of fasttta.methods.Method, found {method!r}"
            )
        if not hasattr(method, "name"):
            raise TypeError(f"method={method.__name__} has no name; it is a base of methods")
    record, tensors = saves.read(folder)
    file = Path(folder) / saves.RECORD
    with saves.naming(file):
        chosen = recorded_method(record, folder, method)
    adapted = _restored(model, spec, chosen, engine, record, tensors, file)
    _warn_of_ranks(model)
    return adapted


def _restored(
    model: nn.Module,
    spec: ModelSpec | None,
    method: Method,
    engine: str,
    record: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    where: object,
    verify_model: str = "first",
) -> Adapted:
    """An adapted model with the state of a record; errors name ``where``."""
    family = recognise(model, spec)
    with saves.naming(where):
        if ("classes" in tensors) != family.takes_classes:
            raise ValueError(f"the state was saved for another model: it is of {method.name!r}")
        adapted = _made(
            model,
            family,
            method,
            precision=record["precision"],
            engine=engine,
            seed=record["seed"],
            classes=tensors.get("classes"),
            resources={},
            guard=_recorded_guard(record),
            verify_model=verify_model,
            constants={
                name.removeprefix("constant."): x
                for name, x in tensors.items()
                if name.startswith("constant.")
            },
        )
    adapted.made_by(unpickled, spec, engine)
    with saves.naming(where):
        state = adapted._state_of(record, tensors)
    adapted._publish(state)
    return adapted


def _recorded_guard(record: Mapping[str, Any]) -> Guard | None:
    return Guard.of(record["guard"]) if "guard" in record else None


def unpickled(
    model: nn.Module,
    spec: ModelSpec | None,
    method: Method,
    engine: str,
    record: dict[str, Any],
    tensors: dict[str, Tensor],
) -> Adapted:
    """Rebuilds a pickled adapted model."""
    record, training = dict(record), record["training"]
    mode = record.pop("verify_model")
    adapted = _restored(model, spec, method, engine, record, tensors, "the pickled model", mode)
    return adapted.train(training)
