"""How far each precision is from float64 on the demo's model: logits, the first update, accuracy.

    python tests/support/precision_distance.py [--seeds 0,1,2] [--samples 512]

prints the table of fasttta/adapted/README.md. tests/engine/test_float8_accuracy.py holds it to
bounds, on fewer samples.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

import fasttta
from fasttta.demo import digits
from fasttta.demo.run import SETTINGS
from fasttta.evaluate import machine

METHODS = ("source", "read", "abpem", "tent")
STREAMS = ("contrast", "gaussian", "white", "low-pass")
PRECISIONS = ("fp32", "bf16", "fp8")


class Pass(NamedTuple):
    """One pass over a stream: logits [n, 10], right answers in percent, the first batch's gradient
    and update of all tuned values [m] (empty where nothing is tuned)."""

    logits: Tensor
    accuracy: float
    gradient: Tensor
    update: Tensor


class Distance(NamedTuple):
    """Of a pass from that in float64."""

    apart: float  # largest difference of logits, of the largest logit
    turned: float  # 1 - cosine of a sample's logits, mean
    turned_most: float  # the worst sample's
    gradient: float  # 1 - cosine of the first gradient
    signs: float  # share of the first update's signs that differ
    changed: float  # share of predictions that differ
    points: float  # difference of accuracies


def run(method: str, precision: str, stream: str, seed: int, samples: int, batch: int = 64) -> Pass:
    """Adapts the demo's model on a stream of severity 5, with the demo's settings."""
    model = digits.load_model()
    adapted = fasttta.adapt(model, method, precision=precision, **SETTINGS.get(method, {}))
    start = {name: x.double() for name, x in adapted.tuned.items()}
    logits, right, gradient = [], 0, torch.zeros(0)
    update = gradient
    for audio, video, labels in digits.stream(stream, samples=samples, batch=batch, seed=seed):
        result = adapted.step(audio, video, trace=True)
        logits.append(result.logits.double())
        right += int((result.logits.argmax(1) == labels).sum())
        if start and not update.numel():
            gradient = torch.cat([x.double().flatten() for x in result.grads.values()])
            update = torch.cat(
                [(x.double() - start[n]).flatten() for n, x in adapted.tuned.items()]
            )
    return Pass(torch.cat(logits), 100 * right / samples, gradient, update)


def distance(one: Pass, exact: Pass) -> Distance:
    """How far a pass is from one on the same stream in float64."""
    turned = 1 - torch.cosine_similarity(one.logits, exact.logits, dim=1)
    gradient = signs = 0.0
    if exact.update.numel():
        gradient = 1 - torch.cosine_similarity(one.gradient, exact.gradient, dim=0).item()
        signs = (one.update.sign() != exact.update.sign()).double().mean().item()
    return Distance(
        ((one.logits - exact.logits).abs().max() / exact.logits.abs().max()).item(),
        turned.mean().item(),
        turned.max().item(),
        gradient,
        signs,
        (one.logits.argmax(1) != exact.logits.argmax(1)).double().mean().item(),
        one.accuracy - exact.accuracy,
    )


def _row(method: str, precision: str, pairs: list[tuple[Pass, Pass]]) -> str:
    each = [distance(*pair) for pair in pairs]
    mean = [statistics.fmean(column) for column in zip(*each, strict=True)]
    most = [max(column) for column in zip(*each, strict=True)]
    points = [x.points for x in each]
    spread = statistics.stdev(points) if len(points) > 1 else 0.0
    tuned = bool(pairs[0][0].update.numel())
    accuracy = statistics.fmean(one.accuracy for one, _ in pairs)
    cells = [f"`{method}`", precision, f"{mean[1]:.1e} ({most[2]:.1e})", "", ""]
    if tuned:
        signs = f"{100 * mean[4]:.1f} % ({100 * most[4]:.1f} %)"
        cells[3:] = [f"{mean[3]:.1e}", signs]
    cells += [f"{100 * mean[5]:.1f} %", f"{accuracy:.1f} %", f"{mean[6]:+.2f} ±{spread:.2f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--samples", type=int, default=512)
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    warnings.simplefilter("ignore")
    print(
        "| method | precision | 1 - cosine of logits (worst sample) | 1 - cosine of the first "
        "gradient | signs of the first update that differ (worst) | other predictions | accuracy | "
        "points from fp64 |\n| --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    for method in METHODS:
        places = [(stream, seed, options.samples) for stream in STREAMS for seed in seeds]
        exact = [run(method, "fp64", *place) for place in places]
        for precision in PRECISIONS:
            try:
                passes = [run(method, precision, *place) for place in places]
            except ValueError:  # it tunes inside the encoders
                print(f"| `{method}` | {precision} | refused | | | | | |", flush=True)
                continue
            print(_row(method, precision, list(zip(passes, exact, strict=True))), flush=True)
    facts = machine()
    print(f"\nseeds {options.seeds}, {options.samples} samples, {facts}")


if __name__ == "__main__":
    main()
