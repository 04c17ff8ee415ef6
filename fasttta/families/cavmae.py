"""CAV-MAEs: fasttta's own, and modules of the official structure and its descendants."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..models import CAVMAE
from ..models.cavmae.checkpoint import SPLIT_QKV
from ..models.copies import structural_copy
from .base import FusionFamily, graded
from .refusals import altered, parts_of, refuse_replaced_forwards, refuse_wrapped_layers

#: parts by which a CAV-MAE is recognised
PARTS = (
    "patch_embed_a", "patch_embed_v", "pos_embed_a", "pos_embed_v", "modality_a", "modality_v",
    "blocks_a", "blocks_v", "blocks_u", "norm",
)  # fmt: skip
#: parts of BriMPR's PromptVA, which holds a CAV-MAE and prompts for its encoders
PROMPTED_PARTS = ("va_model", "prompts_a", "prompts_v")
#: names of the separate projections in each code base -> what messages call it
_FLAVOURS = {
    (): "CAV-MAE",
    ("k", "q", "v"): "CAV-MAE as READ and BriMPR have it",
    ("ka", "kv", "qa", "qv", "va", "vv"): "CAV-MAE as ABPEM has it",
}
_PROMPTS = {"prompts.audio": "prompts_a", "prompts.video": "prompts_v"}


@dataclass
class CavmaeFamily(FusionFamily):
    """A CAV-MAE, in BriMPR's PromptVA or not.

    Attributes:
        split: names of separate copies of the q, k, v projections that the module keeps.
        holder: where the PromptVA lies in the user's module (``"module."``); None: there is none.
        tuned_prompts: its prompts were tuned, so that predictions are those of its ``prompt=True``.
    """

    model: CAVMAE
    split: tuple[str, ...] = ()
    holder: str | None = None
    tuned_prompts: bool = False

    default_method: ClassVar[str] = "abpem"

    @classmethod
    def of(
        cls, model: nn.Module, prefix: str, holder: tuple[nn.Module, str] | None
    ) -> CavmaeFamily:
        """The family of a module with the ``PARTS`` of a CAV-MAE.

        Args:
            prefix: where it lies in the user's module.
            holder: the PromptVA that holds it, and where that lies; None: there is none.

        Raises:
            TypeError, ValueError: it cannot be converted.
        """
        if isinstance(model, CAVMAE):
            refuse_replaced_forwards(model)
            module = model if altered(model) else None
            family = cls("fasttta.models.CAVMAE", model, prefix, module)
        else:
            family = _converted(model, prefix)
        if holder is not None:
            family._take_prompts(*holder)
        return family

    def _take_prompts(self, holder: nn.Module, path: str) -> None:
        """Copies the prompts of the PromptVA into the model."""
        prompts = {
            name: x.detach()
            for name, attribute in (("audio", "prompts_a"), ("video", "prompts_v"))
            if (x := getattr(holder, attribute)) is not None
        }
        with torch.inference_mode(False):
            if self.module in (None, self.model):  # the user's object is never changed
                self.model = structural_copy(self.model)
            self.model.take_prompts(
                {name: x.clone() if x.is_inference() else x for name, x in prompts.items()}
            )
        self.holder, self.tuned_prompts = path, self.model.tuned_prompts
        if self.tuned_prompts:
            self.module = holder

    def copied_parameters(self, model: nn.Module) -> dict[str, tuple[str, int]]:
        """Names of q, k and v that READ's and ABPEM's modules copy from their packed projections
        on their first forward, and the name and third of the packed one."""
        copied = {}
        for name, _ in model.named_parameters() if self.split else ():
            match = SPLIT_QKV.fullmatch(name.removeprefix(self.prefix))
            if match:
                packed = name.replace(f".{match[1]}.", ".qkv.")
                copied[name] = packed, "qkv".index(match[1][0])
        return copied

    def _own_forward(
        self, twin: nn.Module, inputs: tuple[Tensor, ...]
    ) -> tuple[Any, list[Tensor | None]]:
        parts = [
            [twin.get_parameter(part) for part in self._parts_of(name)]
            for name in sorted(self.tuned)
        ]
        logits, flat = graded(
            lambda: self._own_logits(twin, inputs), [leaf for leaves in parts for leaf in leaves]
        )
        rest, grads = iter(flat), list[Tensor | None]()
        for leaves in parts:
            packed, *split = (next(rest) for _ in leaves)
            if any(grad is not None for grad in split):  # computed with the copies of q, k and v
                rows = [
                    torch.zeros_like(leaf) if grad is None else grad
                    for leaf, grad in zip(leaves[1:], split, strict=True)
                ]
                packed = torch.cat(rows) + (0 if packed is None else packed)
            grads.append(packed)
        return logits, grads

    def _parts_of(self, name: str) -> list[str]:
        """A tuned parameter's name in the module, and those of its separate copies' rows."""
        parts = [name]
        if self.split and ".attn.qkv." in name and name.startswith("blocks_u."):
            parts += [name.replace(".qkv.", f".{which}.") for which in _computing(self.split)]
        return [f"va_model.{part}" if self.tuned_prompts else part for part in parts]

    def _own_logits(self, twin: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        if self.tuned_prompts:
            audio, video = inputs
            try:
                returned = twin(a=audio, v=video, mode="multimodal", prompt=True)
            except Exception as error:
                raise ValueError(
                    f"recognised as {self.name} with tuned prompts, but its forward(a=, v=, "
                    f"mode='multimodal', prompt=True) fails: {error}"
                ) from error
        else:
            returned = self._unprompted(twin, inputs)
        return returned[0] if isinstance(returned, (tuple, list)) else returned

    def _unprompted(self, twin: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        """What the module returns. Modules with split projections use them in ``forward_eval``,
        not in ``forward``; ABPEM's also takes the arguments of its script."""
        name = "forward_eval" if self.split and hasattr(twin, "forward_eval") else "forward"
        parameters = inspect.signature(getattr(twin, name)).parameters.values()
        count = len([p for p in parameters if p.kind is not p.VAR_KEYWORD])
        if any(p.kind is p.VAR_POSITIONAL for p in parameters):
            count = max(count, len(inputs) + 1)
        # hooks run only if the module is called
        call: Callable[..., Any] = twin if name == "forward" else getattr(twin, name)
        arguments = (*inputs, "multimodal", SimpleNamespace(use_cache=False))
        try:
            return call(*arguments[: min(len(inputs) + 2, count)])
        except Exception as error:
            raise ValueError(
                f"recognised as {self.name}, but its {name}(audio, video, 'multimodal') fails: "
                f"{error}"
            ) from error

    def merges(self, names: Iterable[str]) -> bool:
        """Prompts, where the module is part of a PromptVA."""
        return self.holder is not None and all(name in _PROMPTS for name in names)

    def merge_into(self, module: nn.Module, name: str, value: Tensor) -> None:
        """Writes an adapted parameter into the module and into its split copies, and prompts of
        any count into the PromptVA."""
        if self.holder is not None and name in _PROMPTS:
            path = self.holder.rstrip(".")
            holder = module.get_submodule(path) if path else module
            prompts = getattr(holder, _PROMPTS[name])
            like = self.model.norm.weight if prompts is None else prompts
            setattr(holder, _PROMPTS[name], nn.Parameter(value.detach().to(like).clone()))
            setattr(holder, f"num_{_PROMPTS[name]}", value.shape[1])
            return
        super().merge_into(module, name, value)
        if ".attn.qkv." in name and name.startswith("blocks_u."):
            for which in self.split:
                rows = value.chunk(3)["qkv".index(which[0])]
                split = self.prefix + name.replace(".qkv.", f".{which}.")
                module.get_parameter(split).copy_(rows)


def _converted(module: nn.Module, prefix: str) -> CavmaeFamily:
    """A CAV-MAE over the weights of a module of that structure."""
    kind = type(module).__name__
    if "mlp_head" not in parts_of(module):
        raise TypeError(
            f"{kind} is a CAV-MAE without mlp_head, as it is before fine-tuning; "
            "needed one fine-tuned for classification"
        )
    refuse_wrapped_layers(module, "CAV-MAE")
    _check_head(module)
    blocks: Any = module.blocks_u  # modules of the user's classes
    if not len(blocks):
        raise ValueError(f"blocks_u of {kind} is empty, needed a fusion block")
    attention = blocks[0].attn
    heads = getattr(attention, "num_heads", None)
    if not isinstance(heads, int):
        raise ValueError(f"blocks_u.0.attn.num_heads of {kind} must be an int, found {heads!r}")
    with torch.inference_mode(False):
        state = {
            name: x.detach().clone() if x.is_inference() else x.detach()
            for name, x in module.state_dict().items()
        }
    matches = [SPLIT_QKV.fullmatch(name) for name in state]
    split = tuple(sorted({match[1] for match in matches if match}))
    if split not in _FLAVOURS:
        raise ValueError(
            f"blocks_u.0.attn has separate projections {', '.join(split)}; known: none, q k v, or "
            "qa ka va qv kv vv"
        )
    packed = {name: x for name, x in state.items() if not SPLIT_QKV.fullmatch(name)}
    tokens = state["pos_embed_a"].shape[1] + state["pos_embed_v"].shape[1]
    # Those modules compute with the split copies once their first forward is over, and only on
    # sequences of more than 512 tokens; normally they are views of the packed weight by then.
    if split and getattr(attention, "first_batch", True) is False and tokens > 512:
        for i in range(len(blocks)):
            for part in ("weight", "bias"):
                names = [f"blocks_u.{i}.attn.{which}.{part}" for which in _computing(split)]
                rows = torch.cat([state[name] for name in names])
                if not torch.equal(rows, packed[f"blocks_u.{i}.attn.qkv.{part}"]):
                    packed[f"blocks_u.{i}.attn.qkv.{part}"] = rows
    with torch.inference_mode(False):
        model = CAVMAE.from_tensors(packed, num_heads=heads).requires_grad_(False)
    return CavmaeFamily(_FLAVOURS[split], model, prefix, module, split=split)


def _check_head(module: nn.Module) -> None:
    """Raises ValueError if the classifier differs from the published one."""
    head = module.get_submodule("mlp_head")
    parts = {f"mlp_head.{name}" for name, _ in head.named_parameters()}
    if parts != {f"mlp_head.{i}.{part}" for i in (0, 1) for part in ("weight", "bias")}:
        raise ValueError(
            f"{type(module).__name__} has the parts of a CAV-MAE, but another head: mlp_head is "
            f"{' '.join(str(module.mlp_head).split())[:120]}, needed a LayerNorm and a linear "
            "layer. It can be adapted as it is by saying where its parts are: fasttta.adapt(model, "
            'spec=fasttta.ModelSpec([f"blocks_u.{i}.attn" for i in '
            'range(len(model.blocks_u))], {"audio": (0, Ta), "video": (Ta, Ta + Tv)}, "qkv"))'
        )


def _computing(split: Iterable[str]) -> tuple[str, ...]:
    """The copies that compute, in the order of the packed weight (ABPEM's qv, kv, vv are the same
    modules as its qa, ka, va)."""
    return ("qa", "ka", "va") if "qa" in split else ("q", "k", "v")
