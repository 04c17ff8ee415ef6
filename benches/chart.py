"""The picture of a results file: how many times as fast as the reference ours is.

``report.py`` writes it beside the results, as ``results/<device>.svg``.
"""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

from fasttta.evaluate.charts import Dots, Mark, Row

# of each bench that stands for others: what the picture calls it; others are in the tables
LABELS = {
    "A step of 4 samples": {
        "bench_step[tent-fp32-eager]": "TENT",
        "bench_step[read-fp32-eager]": "READ",
        "bench_step[no queue-fp32-eager]": "ABPEM, no queue",
        "bench_step[queue of 4-fp32-eager]": "ABPEM, queue of 4",
        "bench_brimpr[fp32]": "BriMPR",
    },
    "An image, 16 views": {
        "bench_clip_episode[tpt-37]": "TPT, 37 classes",
        "bench_clip_episode[a-tpt-37]": "A-TPT, 37 classes",
        "bench_clip_episode[a-tpt-397]": "A-TPT, 397 classes",
        "bench_clip_episode[a-tpt-1000]": "A-TPT, 1000 classes",
    },
    "Operations with backward": {
        "bench_softmax_attention[default-forward+backward-both]": "softmax_attention",
        "bench_attention_bootstrap[mean-default-forward+backward-8]": "attention_bootstrap, mean",
        "bench_attention_bootstrap[each-default-forward+backward-8]": "attention_bootstrap, each",
        "bench_adaptation_head[128-309-forward+backward-default]": "adaptation_head",
        "bench_total_variation[224-forward+backward-default]": "total_variation",
        "bench_rational_head[1000 classes]": "RAda's head, 1000 classes",
        "bench_clip_text[37]": "CLIP's text tower, 37 classes",
    },
}


def chart(results: dict[str, Any]) -> Dots | None:
    """The picture of a results file as data; None where it has none of the benches."""
    ratios = {entry["id"]: entry["min_ratio"] for entry in results["benches"]}
    rows = []
    for group, labels in LABELS.items():
        marks = {label: ratios[name] for name, label in labels.items() if name in ratios}
        if marks:
            rows += [Row(group), *(Row(x, [Mark("speed-up", 2, y)]) for x, y in marks.items())]
    if not rows:
        return None
    machine = results["machine"]
    name = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    return Dots(
        re.sub(r"\((R|TM)\)", "", name),
        "times as fast as the official computation",
        rows,
        log=True,
        reference=1.0,
        unit="x",
    )


def texts(svg: bytes) -> list[str]:
    """What is written in a picture, and the titles of its marks: the same from any matplotlib."""
    elements = ElementTree.fromstring(svg).iter()
    return [
        " ".join(element.itertext())
        for element in elements
        if element.tag.rpartition("}")[2] in ("text", "title")
    ]
