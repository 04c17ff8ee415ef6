"""ModelSpec: a fusion transformer described by a user, or by watching it on a batch."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .model import SpecifiedModel
from .outputs import described, tensors
from .parts import Parts
from .projections import attends, has_heads, usual_names, without_fast_path

_KINDS = (
    "an nn.MultiheadAttention, or a module with children of usual names (qkv; q_proj k_proj "
    "v_proj; query key value; ...)"
)


@dataclass(frozen=True, eq=False)  # its own __init__, which errors name
class ModelSpec(Parts):
    """Where the parts of a fusion transformer are that methods tune and look at.

    ``fasttta.adapt(model, "abpem", spec=ModelSpec(...))``; the model is compared with its own
    forward on the first batch. ``ModelSpec.detect(model, *inputs)`` proposes one.

    Args:
        fusion: the attention module over the tokens of all modalities: its dotted name in the
            model, or the module. Several, in the order they run: all are tuned, statistics are
            those of the last.
        spans: modality -> (start, stop) of its tokens in that module's sequence, each at least 2
            tokens long, in any order and with gaps (class tokens) allowed.
        qkv: where q, k, v come from, as names inside the fusion module or from the model's root: a
            packed linear module whose rows are all of q, then k, then v, or three. None: an
            ``nn.MultiheadAttention``'s own projections, else names that are usual
            (``qkv``; ``q_proj k_proj v_proj``; ``query key value``; ...).
        logits: where the logits [B, C] are in what the model returns: a key or attribute, an
            index, or a function of it. None: the tensor itself, ``.logits``, or the first element.
        encode: what is frozen before the fusion and need not be computed twice. None: every
            module that has returned before the fusion module's block starts, found by watching
            one forward. Names: those modules only. A pair of functions: ``(encode, fuse)`` with
            ``encode(model, *inputs)`` -> a tensor [B, ...] and ``fuse(model, tokens)`` -> what the
            model returns.
        num_heads: of the fusion module; None: its attribute of a usual name.
        scale: factor of q·k; None: the module's attribute ``scale`` or ``scaling``, else d ** -0.5.

    Raises:
        TypeError, ValueError: a value of the wrong kind, overlapping spans.
    """

    @classmethod
    def detect(
        cls, model: nn.Module, *inputs: Tensor, logits: Any = None, num_heads: int | None = None
    ) -> ModelSpec:
        """A proposal for a model, from watching it on a batch: the first attention module whose
        tokens belong to one input each, and which tokens are whose.

        Every input is exchanged between the samples in turn; tokens that change are that input's.

        Args:
            model: any module whose forward takes the inputs; it is not changed.
            inputs: one batch of at least two different samples, as the model takes it (random
                values of the right shapes do).
            logits, num_heads: as in ``ModelSpec``, where they cannot be found.

        Raises:
            TypeError: the inputs are no batch of tensors.
            ValueError: nothing that fits, or several; says what each attention was seen to attend
                to.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, found {type(model).__name__}")
        if len(inputs) < 2 or not all(
            isinstance(x, Tensor) and x.ndim and len(x) > 1 for x in inputs
        ):
            raise TypeError(
                "inputs: needed one tensor a modality, at least two, with at least two different "
                f"samples each, found {described(tuple(inputs))}"
            )
        names = _names(model, len(inputs))
        attentions = {n: m for n, m in model.named_modules() if n and attends(m)}
        if not attentions:
            raise ValueError(
                f"{type(model).__name__} has no attention that fasttta knows: {_KINDS}"
            )
        with undisturbed(model):
            tokens, output, owners = _owners(model, inputs, attentions, 0)
            again = _tokens(model, inputs, attentions, 1)[0]
            odd = [n for n, x in tokens.items() if n in again and not torch.equal(x, again[n])]
            if odd:  # something random in evaluation mode: do other draws give the same owners?
                _refuse_random_owners(odd, owners, _owners(model, inputs, attentions, 1)[2])
        fusion = _only_separate(owners, names)
        by_input = dict(zip(names, owners[fusion], strict=True))
        children = usual_names(attentions[fusion])
        if num_heads is None and children and not has_heads(attentions[fusion]):
            raise ValueError(
                f"{fusion} does not say how many heads it has; say it: "
                "ModelSpec.detect(model, *inputs, num_heads=...)"
            )
        spec = cls(
            fusion=fusion,
            spans={n: _span(n, fusion, owned) for n, owned in by_input.items() if owned.any()},
            qkv=children[0] if len(children) == 1 else children or None,
            logits=_find_logits(output, len(inputs[0])) if logits is None else logits,
            num_heads=num_heads,
        )
        _try_out(model, spec, inputs)
        unowned = (~torch.stack(owners[fusion]).any(0)).nonzero().flatten().tolist()
        if unowned:
            warnings.warn(
                f"tokens {_ranges(unowned)} of {fusion} changed with no input and are in no span: "
                "class tokens, or parts of an input that are the same in every sample?",
                stacklevel=_outside(),
            )
        return spec


def _refuse_random_owners(
    names: list[str], owners: dict[str, list[Tensor]], others: dict[str, list[Tensor]]
) -> None:
    """Raises ValueError if other random draws give the tokens of one of these attentions to other
    inputs."""
    for name in names:
        pairs = zip(owners.get(name, ()), others.get(name, ()), strict=False)
        if name in owners and not all(torch.equal(a, b) for a, b in pairs):
            raise ValueError(
                f"{name} attends over other tokens in each run on equal inputs: the model "
                "draws something at random in evaluation mode. Say where its parts are: "
                "ModelSpec(fusion=..., spans=...)"
            )


def _only_separate(owners: dict[str, list[Tensor]], names: list[str]) -> str:
    """The one attention whose tokens belong to one input each.

    Raises:
        ValueError: there is none, or several.
    """
    fitting = [name for name, tokens in owners.items() if _separate(tokens)]
    if len(fitting) == 1:
        return fitting[0]
    seen = "; ".join(f"{name}: {_described(tokens, names)}" for name, tokens in owners.items())
    what = "several attention modules attend" if fitting else "no attention module attends"
    raise ValueError(
        f"{what} over tokens of several inputs that can still be told apart. Seen: "
        f"{seen or 'none was called'}. Say which it is: ModelSpec(fusion=..., spans=...)"
    )


def _outside() -> int:
    """The number of stack frames, for the caller's warning, up to the one outside fasttta."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == "fasttta":
        level, frame = level + 1, frame.f_back
    return level


def _owners(
    model: nn.Module, inputs: tuple[Tensor, ...], attentions: dict[str, nn.Module], seed: int
) -> tuple[dict[str, Tensor], Any, dict[str, list[Tensor]]]:
    """Tokens of each attention, the output, and which tokens change with each input [T].

    An input is exchanged between the samples, and then drawn anew from its own values: what is the
    same in all samples (a first token, padding at the end) changes then, too.
    """
    base, output = _tokens(model, inputs, attentions, seed)
    moved: list[dict[str, list[Tensor]]] = []
    generator = torch.Generator().manual_seed(seed)
    for i, x in enumerate(inputs):
        changed = [x.flip(0)]
        if not torch.equal(x, x.flip(0)):
            index = torch.randint(x.numel(), x.shape, generator=generator).to(x.device)
            changed.append(x.flatten()[index])
        tokens: dict[str, list[Tensor]] = {}
        for number, new in enumerate(changed):
            exchanged = tuple(new if i == j else y for j, y in enumerate(inputs))
            try:
                attended = _tokens(model, exchanged, attentions, seed)[0]
            except Exception:
                if number == 0:
                    raise
                continue  # values that cannot stand at any place
            for name, y in attended.items():
                if torch.isfinite(y).all():
                    tokens.setdefault(name, []).append(y)
        moved.append(tokens)
    owners = {
        name: [
            torch.stack([(x != y).flatten(2).any(2).any(0) for y in tokens[name]]).any(0)
            for tokens in moved
        ]
        for name, x in base.items()
        if all(name in t and all(y.shape == x.shape for y in t[name]) for t in moved)
    }
    return base, output, owners


def _try_out(model: nn.Module, spec: ModelSpec, inputs: tuple[Tensor, ...]) -> None:
    """Raises ValueError where a proposal is one that methods refuse on such a batch."""
    with undisturbed(model):
        specified = SpecifiedModel(model, spec)
        try:
            specified.learn(inputs, check=True)
            specified.fuse_attention(specified.encode(*inputs))
        except ValueError as error:
            place = spec.fusion[0] if isinstance(spec.fusion, tuple) else spec.fusion
            raise ValueError(
                f"the first attention over several inputs is {place}, with spans "
                f"{dict(spec.spans)}, but {error}"
            ) from error


def _names(model: nn.Module, count: int) -> list[str]:
    names = [
        p.name
        for p in inspect.signature(model.forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return (names + [f"input_{i}" for i in range(len(names), count)])[:count]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients or fused paths; flags and buffers as before afterwards."""
    training = {module: module.training for module in model.modules()}
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(), without_fast_path():
            yield
    finally:
        for module, flag in training.items():
            module.training = flag
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)


def _tokens(
    model: nn.Module, inputs: tuple[Tensor, ...], attentions: dict[str, nn.Module], seed: int
) -> tuple[dict[str, Tensor], Any]:
    """What each attention is first called with, [B, T, D], in the order of calls; the output.
    ``seed``: of what the model draws at random, which is then the same in every run."""
    attended: dict[str, Tensor] = {}
    batch = len(inputs[0])

    def keep(name: str, sequence_first: bool):
        def hook(_module, args, kwargs):
            x = next(tensors((args, kwargs)), None)
            if name not in attended and isinstance(x, Tensor) and x.ndim == 3:
                x = x.transpose(0, 1) if sequence_first else x
                if len(x) == batch:
                    attended[name] = x.clone()

        return hook

    with ExitStack() as hooks:
        for name, module in attentions.items():
            sequence_first = not getattr(module, "batch_first", True)
            handle = module.register_forward_pre_hook(keep(name, sequence_first), with_kwargs=True)
            hooks.callback(handle.remove)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            output = model(*(x.clone() for x in inputs))
    return attended, output


def _separate(owners: list[Tensor]) -> bool:
    """Whether no token depends on two inputs, and at least two inputs have two tokens or more."""
    counts = torch.stack(owners).sum(0)
    return bool((counts <= 1).all()) and sum(int(o.sum()) > 1 for o in owners) > 1


def _span(name: str, fusion: str, owned: Tensor) -> tuple[int, int]:
    index = owned.nonzero().flatten().tolist()
    if any(b - a != 1 for a, b in pairwise(index)) or len(index) < 2:
        raise ValueError(
            f"the tokens of {name} in {fusion} are {_ranges(index)}; needed one range of at least "
            "two. If some of them are the same in every sample, give other samples"
        )
    return index[0], index[-1] + 1


def _ranges(index: list[int]) -> str:
    parts: list[list[int]] = []
    for i in index:
        if parts and parts[-1][1] == i:
            parts[-1][1] = i + 1
        else:
            parts.append([i, i + 1])
    return ", ".join(f"{a}:{b}" for a, b in parts) or "none"


def _described(owners: list[Tensor], names: list[str]) -> str:
    parts = [
        f"{name} {_ranges(owned.nonzero().flatten().tolist())}"
        for name, owned in zip(names, owners, strict=True)
        if owned.any()
    ]
    return f"{len(owners[0])} tokens ({', '.join(parts) or 'of no input'})"


def _find_logits(output: Any, batch: int) -> str | int | None:
    """Where the one [B, C] tensor is; None for the tensor itself."""

    def fits(x: Any) -> bool:
        return isinstance(x, Tensor) and x.ndim == 2 and len(x) == batch and x.is_floating_point()

    if fits(output):
        return None
    if fits(getattr(output, "logits", None)) or (
        isinstance(output, dict) and fits(output.get("logits"))
    ):
        return "logits"
    if isinstance(output, dict):
        places = [key for key, value in output.items() if fits(value)]
    elif isinstance(output, (tuple, list)):
        places = [i for i, value in enumerate(output) if fits(value)]
    else:
        places = []
    if len(places) != 1:
        what = f"at {', '.join(map(repr, places))}" if places else "nowhere"
        raise ValueError(
            f"the model returns {described(output)}: tensors [B, C] {what}, needed one. Say where "
            "the logits are: ModelSpec.detect(model, *inputs, logits=...)"
        )
    return places[0]
