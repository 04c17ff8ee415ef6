"""How gradients of label-free losses agree with the gradient of the cross-entropy with labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ... import functional as F
from ...evaluate.charts import Dots, Line, Lines, Mark, Row
from ...evaluate.document import Figure, Heading, Table, Text
from ...models import CAVMAE
from ..digits import stream
from ..run import CLASSES, SETTINGS
from .spread import Spread, several_seeds, shown, spread

STREAMS = {"contrast": "video", "gaussian": "video", "low-pass": "audio", "white": "audio"}
QUICK = {"streams": ("white",), "samples": 192}
K = SETTINGS["abpem"]["k"]
TERMS = {
    "entropy": "entropy, all classes (TENT)",
    f"principal {K}": f"principal entropy, k = {K}",
    "principal 1": "principal entropy, k = 1 (READ)",
    "balance": "negative balance entropy",
    "attention": "attention bootstrapping",
    "abpem": "all of ABPEM, no queue",
}


def loss_gradients(model: CAVMAE, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Gradients of losses of one batch with respect to the fusion block's q, k, v projections.

    Args:
        tokens: encoder outputs [b, T, D].
        labels: [b].

    Returns:
        Flat float64 vectors: ``"labels"`` (cross-entropy), ``"entropy"``, ``"principal k"`` for
        every k up to the class count, ``"balance"`` (of the negative balance entropy, the term as
        it is minimised), ``"attention"``, and ``"abpem"``, the demo's ABPEM without its queue.
    """
    with torch.enable_grad():
        logits, (q, k, scale) = model.fuse_attention(tokens)
        losses = {
            "labels": nnf.cross_entropy(logits, labels),
            "entropy": F.entropy(logits).mean(),
            "balance": -F.balance_entropy(logits),
            "attention": F.attention_bootstrap(q, k, model.spans, scale).mean(),
        }
        for i in range(1, logits.shape[1] + 1):
            losses[f"principal {i}"] = F.principal_entropy(logits, i).mean()
        losses["abpem"] = losses[f"principal {K}"] + losses["balance"] + losses["attention"]
        # in the order of the tuned tensors: packed, so that q, k, v follow each other
        names = dict.fromkeys(slot.parameter for slot in model.tunable("fusion_qkv").values())
        parameters = [model.get_parameter(name) for name in names]
        return {
            name: torch.cat(
                [
                    g.flatten().double()
                    for g in torch.autograd.grad(loss, parameters, retain_graph=True)
                ]
            )
            for name, loss in losses.items()
        }


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of the angle between two vectors [n]."""
    return (a @ b / (a.norm() * b.norm())).item()


def run(
    model: CAVMAE,
    *,
    seeds: Sequence[int],
    streams: Sequence[str] = tuple(STREAMS),
    severity: float = 5,
    samples: int = 512,
    batch: int = 64,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> dict[str, Any]:
    """Cosines at the source's weights, over the batches of all seeds.

    Returns:
        ``"protocol"``; ``"streams"``: {stream: {"batches": their number, "cosine": {loss: {"mean",
        "std"}} with the cross-entropy's gradient, "seeds_std": {loss: standard deviation of the
        seeds' means}, "principal_closer": {k: share of batches on which principal entropy is
        closer to the cross-entropy than plain entropy is}}}.
    """
    cosines: dict[str, list[dict[str, list[float]]]] = {name: [] for name in streams}
    done, total = 0, len(seeds) * len(streams)
    for seed in seeds:
        for name in streams:
            progress(done, total, f"gradients: {name}, seed {seed}")
            by_loss: dict[str, list[float]] = {}
            for audio, video, labels in stream(
                name, severity=severity, samples=samples, batch=batch, seed=seed
            ):
                with torch.no_grad():
                    tokens = model.encode(audio, video)
                vectors = loss_gradients(model, tokens, labels)
                for loss, vector in vectors.items():
                    if loss != "labels":
                        by_loss.setdefault(loss, []).append(cosine(vectors["labels"], vector))
            cosines[name].append(by_loss)
            done += 1
    progress(done, total, "done")
    return {
        "protocol": {
            "streams": {name: f"{STREAMS.get(name, 'corruption')} corrupted" for name in streams},
            "severity": severity,
            "samples": samples,
            "batch": batch,
            "seeds": list(seeds),
            "weights": "the source model's; nothing is adapted",
            "gradient": "of the fusion block's q, k, v weights and biases, one vector",
            "compared with": "cross-entropy with the true labels of the same batch",
        },
        "streams": {name: _numbers(by_loss) for name, by_loss in cosines.items()},
    }


def _numbers(by_seed: list[dict[str, list[float]]]) -> dict[str, Any]:
    pooled = {loss: [c for seed in by_seed for c in seed[loss]] for loss in by_seed[0]}
    closer = {
        str(k): sum(p > e for p, e in zip(pooled[f"principal {k}"], pooled["entropy"], strict=True))
        / len(pooled["entropy"])
        for k in range(1, len(CLASSES))
    }
    means = {
        loss: [sum(seed[loss]) / len(seed[loss]) for seed in by_seed] for loss in pooled
    }  # fmt: skip
    return {
        "batches": len(pooled["entropy"]),
        "cosine": {loss: spread(values) for loss, values in pooled.items()},
        "seeds_std": {loss: spread(values)["std"] for loss, values in means.items()},
        "principal_closer": closer,
    }


def table(data: dict[str, Any]) -> str:
    """As text: cosine with the cross-entropy's gradient."""
    streams, several = data["streams"], several_seeds(data)
    lines = ["gradients: cosine with the gradient of the cross-entropy with labels", ""]
    lines.append(f"{'loss':<32}" + "".join(f"{name:>16}" for name in streams))
    for loss, label in TERMS.items():
        cells = [f"{_cell(result['cosine'][loss], several):>16}" for result in streams.values()]
        lines.append(f"{label:<32}" + "".join(cells))
    closer = [f"{100 * r['principal_closer'][str(K)]:>14.0f} %" for r in streams.values()]
    lines.append(f"{f'k = {K} closer than all classes':<32}" + "".join(closer))
    return "\n".join([*lines, "", _over_batches(several)])


def _cell(value: Spread, several: bool) -> str:
    """± is kept for spreads over more than one seed."""
    return shown(value, 2) if several else f"{value['mean']:.2f} ({value['std']:.2f})"


def _over_batches(several: bool) -> str:
    if several:
        return "mean ± standard deviation over the batches of all seeds"
    return "mean (standard deviation) over the batches of one seed"


def parts(data: dict[str, Any]) -> list:
    """What the report shows."""
    streams, several = data["streams"], several_seeds(data)
    legend = [(name, i) for i, name in enumerate(streams, 1)]
    curves = [
        Line(
            name, style,
            [(k, streams[name]["cosine"][f"principal {k}"]["mean"]) for k in _ks()],
            spread=[streams[name]["cosine"][f"principal {k}"]["std"] for k in _ks()],
        )
        for name, style in legend
    ]  # fmt: skip
    rows = [
        Row(
            label,
            [Mark(name, style, **_mark(streams[name]["cosine"][loss])) for name, style in legend],
        )
        for loss, label in TERMS.items()
    ]
    body = []
    for loss, label in TERMS.items():
        cells = [_cell(result["cosine"][loss], several) for result in streams.values()]
        body.append([label, *cells])
    shares = [f"{100 * r['principal_closer'][str(K)]:.0f} %" for r in streams.values()]
    body.append([f"batches on which k = {K} is closer than all classes", *shares])
    batches = next(iter(streams.values()))["batches"]
    over = _over_batches(several)
    note = f"{over[0].upper()}{over[1:]} ({batches}), at the source's weights."
    return [
        Heading("Do label-free losses point where labels would?"),
        Text(_summary(streams)),
        Figure(
            "Cosine with the gradient of the cross-entropy",
            [
                Lines(
                    "principal entropy",
                    "k, classes in the entropy",
                    "cosine",
                    curves,
                    x_ticks=[(k, str(k)) for k in _ks()],
                ),
                Dots("loss terms", "cosine", rows, reference=0.0),
            ],
            f"1: the label-free step is the step that labels would ask for; 0: it is unrelated; "
            f"below 0: it makes the cross-entropy worse. {note}",
            legend,
        ),
        Table(["loss", *streams], body, f"Cosine with the cross-entropy's gradient. {note}", 1),
    ]


def _ks() -> range:
    return range(1, len(CLASSES) + 1)


def _mark(value: dict[str, float]) -> dict[str, float]:
    return {"value": value["mean"], "spread": value["std"]}


def _summary(streams: dict[str, Any]) -> str:
    changes = []
    for name, result in streams.items():
        plain, principal = (result["cosine"][x]["mean"] for x in ("entropy", f"principal {K}"))
        share = 100 * result["principal_closer"][str(K)]
        changes.append(
            f"{plain:.2f} → {principal:.2f} on {name} (closer on {share:.0f} % of batches)"
        )
    return (
        f"From the entropy of all classes to the principal entropy with k = {K}, the cosine with "
        f"the cross-entropy's gradient goes {', '.join(changes)}."
    )
