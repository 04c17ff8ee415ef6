"""RAda on real CLIP features: classes by prototypes, fine-tuned on a few shots, then shifted.

``python -m fasttta.demo.features FOLDER`` with the folder of a data set's ``train.npz`` and
``val.npz``, as RAda's official repository has them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..adapted.entry import adapt
from ..models import FeatureClassifier, RationalHead
from ..models.rational.finetuning import finetune

SCALE = 100.0  # exp(logit_scale) of CLIP


def load_features(path: str | os.PathLike) -> tuple[Tensor, Tensor]:
    """Features [N, D] and labels [N] of a file with ``feature_list`` and ``label_list``.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it holds something else.
    """
    with np.load(path, allow_pickle=False) as file:
        if not {"feature_list", "label_list"} <= set(file.files):
            raise ValueError(f"{os.fspath(path)!r} holds {', '.join(file.files)}; needed "
                             "feature_list and label_list")  # fmt: skip
        return (
            torch.from_numpy(file["feature_list"]).float(),
            torch.from_numpy(file["label_list"]).long(),
        )


def prototypes(features: Tensor, labels: Tensor) -> Tensor:
    """The direction of each class, [K, D]: the mean of its features' directions."""
    unit = features / features.norm(dim=-1, keepdim=True)
    means = [unit[labels == k].mean(dim=0) for k in range(int(labels.max()) + 1)]
    return torch.stack([x / x.norm() for x in means])


def shifted(features: Tensor, size: float, seed: int) -> Tensor:
    """Features [N, D] with noise, ``size`` times as long as they are spread about their mean.

    One half of the noise differs for each feature, the other half is common to all.
    """
    generator = torch.Generator().manual_seed(seed)
    spread = (features - features.mean(dim=0)).square().mean().sqrt()
    single = torch.randn(features.shape, generator=generator, dtype=torch.float32)
    common = torch.randn(1, features.shape[1], generator=generator, dtype=torch.float32)
    return features + size * spread * (single + common) / 2**0.5


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return 100 * (logits.argmax(dim=1) == labels).double().mean().item()


def run(
    folder: str | os.PathLike,
    *,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    epochs: Sequence[int] = (1, 5, 10),
    sizes: Sequence[float] = (1.0, 1.5, 3.0),
    lr: float = 5e-4,
    adapt_lr: float = 1e-4,
    batch: int = 32,
) -> dict[str, Any]:
    """Fine-tunes a head on ``train.npz`` of a folder and measures it on ``val.npz``, clean and
    shifted, as it is and adapted online by the entropy of each batch (scored before its update).

    Args:
        folder: of CLIP features, of the same classes in both files.
        seeds: one run each: head, order of the shots and of the stream, noise.
        epochs: of fine-tuning; the last of them is what is shifted and adapted.
        sizes: of the shift. lr, batch: of the fine-tuning; adapt_lr: of the adaptation.

    Returns:
        ``{what: (mean, standard deviation) in percent}`` and ``"seconds"`` of one fine-tuning.
    """
    train, labels = load_features(Path(folder) / "train.npz")
    test, truth = load_features(Path(folder) / "val.npz")
    text = prototypes(train, labels)
    values: dict[str, list[float]] = {}
    seconds: list[float] = []

    def note(what: str, value: float) -> None:
        values.setdefault(what, []).append(value)

    for seed in seeds:
        torch.manual_seed(seed)
        fresh = RationalHead(train.shape[1]).eval()
        source = FeatureClassifier(fresh, text, SCALE)
        note("prototypes", _accuracy(source(test).detach(), truth))
        for n in epochs:
            start = time.perf_counter()
            head = finetune(fresh, train, labels, text, scale=SCALE, batch=batch, epochs=n, lr=lr,
                            seed=seed)  # fmt: skip
            seconds.append(time.perf_counter() - start)
            tuned = FeatureClassifier(head, text, SCALE)
            note(f"RAda, {n} epochs", _accuracy(tuned(test).detach(), truth))
        order = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))
        for size in sizes:
            x, y = shifted(test, size, seed)[order], truth[order]
            note(f"prototypes, shift {size}", _accuracy(source(x).detach(), y))
            note(f"RAda, shift {size}", _accuracy(tuned(x).detach(), y))
            for name, model in (("prototypes", source), ("RAda", tuned)):
                adapted = adapt(model, "rada", loss="entropy", lr=adapt_lr, score_at="before")
                logits = torch.cat([adapted(part) for part in x.split(batch)])
                note(f"{name}, shift {size}, adapted", _accuracy(logits, y))
    spread = {
        what: (statistics.fmean(x), statistics.stdev(x) if len(x) > 1 else 0.0)
        for what, x in values.items()
    }
    return {**spread, "seconds": max(seconds)}


def table(numbers: dict[str, Any]) -> str:
    """The results of ``run`` as text, one line each."""
    lines = [
        f"{what:<32}{value[0]:6.1f} ±{value[1]:.1f}"
        for what, value in numbers.items()
        if what != "seconds"
    ]
    return "\n".join([f"{'accuracy, %':<32}  mean over seeds", *lines,
                      f"longest fine-tuning: {numbers['seconds']:.1f} s"])  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table of a folder of features; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fasttta.demo.features", description=__doc__)
    parser.add_argument("folder", help="of train.npz and val.npz")
    parser.add_argument("--seeds", type=int, default=5, help="how many (default 5)")
    options = parser.parse_args(arguments)
    try:
        print(table(run(options.folder, seeds=range(options.seeds))))
    except (ValueError, OSError) as error:
        print(f"features: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
