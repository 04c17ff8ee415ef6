"""Labels that cannot be are refused before the step, and nothing is adapted."""

from __future__ import annotations

import clips
import pytest
import torch
from cases import METHODS
from fusions import HuggingFaceStyle, Joint

import fasttta
from fasttta.evaluate import measure_stream, over_seeds
from fasttta.models.rational.finetuning import FineTuning, finetune

N, C = 5, 7
GOOD = torch.tensor([0, 6, 3, 3, 1])
BAD = {
    "beyond": (torch.tensor([0, 1, 2, 3, 120]), ValueError, "lie in 0 to 6.*found 0 to 120"),
    "the count": (torch.full((N,), C), ValueError, "lie in 0 to 6.*found 7 to 7"),
    "negative": (torch.tensor([0, -1, 2, 3, 4]), ValueError, "lie in 0 to 6.*found -1 to 4"),
    "ignored": (torch.full((N,), -100), ValueError, "found -100 to -100"),
    "floats": (GOOD.float(), TypeError, r"found torch.float32; .*labels.long\(\)"),
    "bools": (GOOD > 2, TypeError, "found torch.bool"),
    "complex": (GOOD + 0j, TypeError, "labels is complex"),
    "one-hot": (
        torch.nn.functional.one_hot(GOOD, C), ValueError, r"shape \[5, 7\].*labels.argmax\(1\)"
    ),
    "probabilities": (torch.rand(N, C), ValueError, r"labels.argmax\(1\)"),
    "a column": (GOOD[:, None], ValueError, r"tensor \[5\].*found shape \[5, 1\]"),
    "too few": (GOOD[:4], ValueError, r"tensor \[5\].*found shape \[4\]"),
    "too many": (GOOD.repeat(2), ValueError, r"found shape \[10\]"),
    "none": (GOOD[:0], ValueError, r"found shape \[0\]"),
    "one number": (torch.tensor(3), ValueError, r"found shape \[\]"),
    "a list": ([0, 1, 2, 3, 4], TypeError, r"found \[0, 1, 2, 3, 4\]"),
    "nothing": (None, TypeError, "found None"),
    "sparse": (GOOD.to_sparse(), TypeError, "labels is a sparse COO tensor"),
}  # fmt: skip


def _tuned(adapted):
    return {name: x.clone() for name, x in adapted.tuned.items()}


def _equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(x, b[n]) for n, x in a.items())


@pytest.mark.parametrize("bad", BAD)
def test_refused_before_the_step(tiny_model, tiny_batch, bad):
    labels, error, message = BAD[bad]
    adapted = fasttta.adapt(tiny_model(), "read", **METHODS["read"])
    good = (*tiny_batch(N), GOOD)
    start = _tuned(adapted)
    with pytest.raises(error, match=message):
        measure_stream(adapted, [(*tiny_batch(N), labels)], C)
    assert _equal(start, _tuned(adapted))
    # in the second batch: what the first one taught stays
    with pytest.raises(error, match=message):
        measure_stream(adapted, [good, (*tiny_batch(N, seed=2), labels)], C)
    once = fasttta.adapt(tiny_model(), "read", **METHODS["read"])
    once.step(*good[:2])
    assert not _equal(start, _tuned(adapted))
    assert _equal(_tuned(once), _tuned(adapted))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.int16])
def test_integers_of_any_width(tiny_model, tiny_batch, dtype):
    adapted = fasttta.adapt(tiny_model(), "source")
    record = measure_stream(adapted, [(*tiny_batch(N), GOOD.to(dtype))], C)
    assert record["series"]["labels"] == [torch.bincount(GOOD, minlength=C).tolist()]
    assert len(record["series"]["predicted"][0]) == C


@pytest.mark.parametrize("make", ["fusion", "specified", "rich", "images", "head"])
def test_classes_are_the_width_of_the_logits(tiny_model, tiny_batch, make):
    clip = clips.tiny_clip()
    adapted, inputs, width = {
        "fusion": lambda: (fasttta.adapt(tiny_model(), "read"), tiny_batch(N), 7),
        "specified": lambda: (
            fasttta.adapt(Joint().eval(), "read", spec=Joint.spec), Joint.batch(N), 6
        ),
        "rich": lambda: (
            fasttta.adapt(HuggingFaceStyle().eval(), "read", spec=HuggingFaceStyle.spec),
            HuggingFaceStyle.batch(N), 5,
        ),
        "images": lambda: (clips.adapt(clip, "source"), (torch.rand(N, 3, 24, 24),), 6),
        "head": lambda: (
            fasttta.adapt(clip, "rada", loss="entropy", classes=clips.tiny_ids(), heads=2),
            (torch.rand(N, 3, 24, 24),), 6,
        ),
    }[make]()  # fmt: skip
    start, labels = _tuned(adapted), torch.zeros(N, dtype=torch.int64)
    for classes in (width - 1, width + 1, 50):
        with pytest.raises(ValueError, match=f"classes={classes}, but .* of {width} classes"):
            measure_stream(adapted, [(*inputs, labels)], classes)
    assert _equal(start, _tuned(adapted))
    assert measure_stream(adapted, [(*inputs, labels)], width)["series"]["samples"] == [N]


@pytest.mark.parametrize(
    ("classes", "error"), [(0, ValueError), (-1, ValueError), (7.0, TypeError), (True, TypeError),
                           ("7", TypeError), (None, TypeError)]
)  # fmt: skip
def test_classes_must_be_a_number(tiny_model, classes, error):
    with pytest.raises(error, match="classes"):
        measure_stream(fasttta.adapt(tiny_model(), "source"), [], classes)


def test_images_one_by_one():
    adapted = clips.adapt(clips.tiny_clip(), "source")
    image, label = clips.image(0), torch.tensor([2])
    batches = [(image, label), ([image, clips.image(1)], torch.tensor([1, 5]))]
    assert measure_stream(adapted, batches, 6)["series"]["samples"] == [1, 2]
    with pytest.raises(ValueError, match=r"labels must be a tensor \[1\]"):
        measure_stream(adapted, [(image, torch.tensor([2, 3]))], 6)


@pytest.mark.parametrize(
    "batch", [torch.zeros(3), (torch.zeros(3, 6, 8),), {"audio": 1}, None], ids=str
)
def test_batches_without_labels(tiny_model, batch):
    with pytest.raises(TypeError, match=r"a batch is \(\*inputs, labels\), found"):
        measure_stream(fasttta.adapt(tiny_model(), "source"), [batch], 7)


def test_no_runs():
    with pytest.raises(ValueError, match="runs: needed at least one result"):
        over_seeds([])
    assert over_seeds([{"score": 3.0, "series": {}}])["score_std"] == 0


@pytest.mark.parametrize("bad", ["beyond", "negative", "floats", "one-hot", "too few", "a list"])
def test_fine_tuning(bad):
    """Before the first update, and a head that is its own copy."""
    labels, error, message = BAD[bad]
    torch.manual_seed(0)
    head = fasttta.models.RationalHead(12, heads=3)
    if bad == "floats":
        error, message = ValueError, "labels must be integers"
    with pytest.raises(error, match=message):
        finetune(head, torch.randn(N, 12), labels, torch.randn(C, 12))
    tuning = FineTuning(head, torch.randn(C, 12))
    before = [x.clone() for x in head.parameters()]
    with pytest.raises(error, match=message):
        tuning.step(torch.randn(N, 12), labels)
    assert all(torch.equal(x, y) for x, y in zip(before, head.parameters(), strict=True))
