"""5,000 seeded calls with odd inputs: a clear error and nothing changed, or a twin's numbers.

Every subject is an adapted model with a twin. A call takes a mutation of a good batch, an entry
point and a context of PyTorch's. Where it is refused, the error is a ValueError or TypeError and
the state is as before; where it is accepted, result and state are those of the twin, which is given
the same values as plain tensors, outside of all contexts. The user's model is never changed.
"""

from __future__ import annotations

import contextlib
import random
import warnings
from collections import Counter
from functools import partial

import clips
import numpy as np
import pytest
import torch
from cases import METHODS, snapshot
from cases import tiny_model as _tiny
from tensor_kinds import Counting, Named, Wrapper, fake_tensor

import fasttta
from fasttta.data import Batch, Views
from fasttta.ops.byte_sums import byte_sums

CALLS = 5000
SUBJECTS = {
    **{f"fusion {name}": name for name in METHODS},
    "fusion read guarded": "read", "fusion tent guarded": "tent",
    "images source": "source", "images tpt": "tpt", "images mta": "mta", "images ttc": "ttc",
    "head": "rada",
}  # fmt: skip


# name -> (odd tensor, the same values as a plain one); None: it must be refused
SAME = {
    "as it is": lambda x: (x, x),
    "float64": lambda x: (x.double(), x),
    "half": lambda x: (x.half(), x.half().float()),
    "bf16": lambda x: (x.bfloat16(), x.bfloat16().float()),
    "strided": lambda x: (x.transpose(-1, -2).contiguous().transpose(-1, -2), x),
    "flipped": lambda x: (x.flip(0).flip(0), x),
    "sliced": lambda x: (torch.cat((x, x), -1)[..., : x.shape[-1]], x),
    "expanded": lambda x: (x[:1].expand_as(x), x[:1].repeat(len(x), *[1] * (x.ndim - 1))),
    "with gradient": lambda x: (x.clone().requires_grad_(), x),
    "in a graph": lambda x: (x.clone().requires_grad_() * 1, x),
    "parameter": lambda x: (torch.nn.Parameter(x.clone()), x),
    "subclass": lambda x: (x.as_subclass(Named), x),
    "negative view": lambda x: (torch.complex(x, -x).conj().imag, x),
    "inference": lambda x: (_inference(x), x),
    "zeros": lambda x: (torch.zeros_like(x), torch.zeros_like(x)),
    "equal samples": lambda x: (x[:1].repeat(len(x), *[1] * (x.ndim - 1)),) * 2,
    "denormal": lambda x: (x * 1e-40, x * 1e-40),
}
REFUSED = {
    "sparse": lambda x: x.to_sparse(),
    "csr": lambda x: x.flatten(1).to_sparse_csr(),
    "mkldnn": lambda x: x.contiguous().to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "jagged": lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
    "quantised": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "complex": lambda x: x + 1j * x,
    "fake": fake_tensor,
    "wrapper": Wrapper,
    "operations": lambda x: x.as_subclass(Counting),
    "meta": lambda x: x.to("meta"),
    "integers": lambda x: (x * 9).long(),
    "bools": lambda x: x > 0,
    "nan": lambda x: _spoilt(x, torch.nan),
    "inf": lambda x: _spoilt(x, torch.inf),
    "-inf": lambda x: _spoilt(x, -torch.inf),
    "overflow": lambda x: x.double() * 1e60,
    "none": lambda x: None,
    "string": lambda x: "audio",
    "number": lambda x: 3.0,
    "scalar": lambda x: x.mean(),
    "dict": lambda x: {"x": x},
    "empty": lambda x: x[:0],
    "a dimension more": lambda x: x[None],
    "a dimension less": lambda x: x.flatten(1),
    "cut": lambda x: x[..., :-1],
    "padded": lambda x: torch.cat((x, x), -1),
}
# of images only: they are levels, arrays or lists too, and lie in [0, 1]
IMAGES = {
    "levels": lambda x: ((x * 255).byte().permute(0, 2, 3, 1),) * 2,
    "array": lambda x: (x.numpy(), x),
    "array of levels": lambda x: (
        (x * 255).byte().permute(0, 2, 3, 1).numpy(), (x * 255).byte().permute(0, 2, 3, 1)
    ),
    "a list": lambda x: (list(x), x),
    "float64": lambda x: (x.double(), x.double()),  # and is resized so
    "rounded up": lambda x: (x.clone().clamp_(max=0.99).add_(0.01).mul_(1.0000001), None),
}  # fmt: skip
REFUSED_IMAGES = {
    "normalised": lambda x: (x - 0.5) / 0.2,
    "levels as floats": lambda x: x * 255,
    "channels last": lambda x: x.permute(0, 2, 3, 1),
    "levels first": lambda x: (x * 255).byte(),
    "an empty list": lambda x: [],
    "a list of texts": lambda x: ["cat", "dog"],
    "objects": lambda x: np.array([None, None]),
}
# those that images may be: other sizes and dimensions, lists
_NOT_FOR_IMAGES = {
    "cut", "padded", "dict", "a dimension less", "flipped", "zeros", "denormal",
}  # fmt: skip


def _inference(x):
    with torch.inference_mode():
        return x.clone()


def _spoilt(x, value):
    x = x.clone()
    x.view(-1)[x.numel() // 2] = value
    return x


@contextlib.contextmanager
def _default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


CONTEXTS = {
    "plain": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": lambda: _default_dtype(torch.float64),
    "bfloat16": lambda: _default_dtype(torch.bfloat16),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
}
ENTRIES = {
    "call": lambda adapted, inputs: adapted(*inputs),
    "step": lambda adapted, inputs: adapted.step(*inputs),
    "trace": lambda adapted, inputs: adapted.step(*inputs, trace=True),
    "predict": lambda adapted, inputs: adapted.predict(*inputs),
    "stream": lambda adapted, inputs: next(adapted.stream(iter([inputs]))),
    "ahead": lambda adapted, inputs: next(adapted.stream([inputs], encode_batch=16)),
}


class Subject:
    """An adapted model, its twin and good batches."""

    def __init__(self, name: str) -> None:
        self.name, method = name, SUBJECTS[name]
        self.images = not name.startswith("fusion")
        if not self.images:
            self.model = _tiny()
            options = dict(METHODS[method])
            if name.endswith("guarded"):
                options["guard"] = fasttta.ShiftDetector(window=4)
        else:
            self.model = clips.tiny_clip()
            options = {"classes": clips.tiny_ids(), **clips.METHODS.get(method, {})}
            options |= {"views": 4, "select": 0.3} if method == "tpt" else {}
            options |= {"loss": "entropy", "heads": 2} if method == "rada" else {}
            options |= {"views": 4} if method == "mta" else {}
        self.adapted, self.twin = (fasttta.adapt(self.model, method, **options) for _ in range(2))
        self.weights = byte_sums(list(self.model.state_dict().values()))

    def batch(self, rng: random.Random) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(rng.randrange(2**31))
        kind = {"generator": generator, "dtype": torch.float32}
        n = rng.choice((1, 2, 3, 5))
        if self.images:
            return [torch.rand(min(n, 2), 3, 24, 24, **kind)]
        return [torch.randn(n, 6, 8, **kind), torch.randn(n, 3, 6, 6, **kind)]

    def mutated(self, rng: random.Random) -> tuple[str, list, list | None]:
        """A name, odd inputs and the plain ones (None: they must be refused)."""
        batch = self.batch(rng)
        if rng.random() < 0.15:
            return self._call(rng, batch)
        good = {n: f for n, f in SAME.items() if not (self.images and n in _NOT_FOR_IMAGES)}
        bad = {n: f for n, f in REFUSED.items() if not (self.images and n in _NOT_FOR_IMAGES)}
        if self.images:
            good, bad = good | IMAGES, bad | REFUSED_IMAGES
        at = rng.randrange(len(batch))
        if rng.random() < 0.5:
            name = rng.choice(sorted(bad))
            batch[at] = bad[name](batch[at])
            return name, batch, None
        odd, plain, names = list(batch), list(batch), []
        for i in range(len(batch)):
            name = rng.choice(sorted(good))
            odd[i], plain[i] = good[name](batch[i])
            plain[i] = odd[i] if plain[i] is None else plain[i]
            names.append(name)
        return " and ".join(names), odd, plain

    def _call(self, rng: random.Random, batch: list) -> tuple[str, list, list | None]:
        """Another number or order of inputs."""
        ways = {
            "nothing": [], "one more": [*batch, batch[0]], "a tuple": [tuple(batch)],
            "a named batch": [Batch(tuple(batch), list(range(len(batch[0]))))],
        }  # fmt: skip
        if self.images:
            views = Views(batch[0][:1], batch[0][:1], torch.ones(1))
            if rng.random() < 0.3 and self.name != "head":
                return "views", [views], [views]
            ways.pop("a tuple"), ways.pop("a named batch")  # lists of images
        else:
            ways |= {
                "one less": batch[:1], "swapped": batch[::-1],
                "other sizes": [batch[0], torch.cat((batch[1], batch[1]))],
            }  # fmt: skip
        name = rng.choice(sorted(ways))
        return name, ways[name], None


def _tried(call, context):
    """What a call gives, or its error."""
    try:
        with context():
            return call(), None
    except Exception as error:
        return None, error


def _logits(result):
    return result if isinstance(result, torch.Tensor) else result.logits


def _equal(a, b):
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _same_state(a, b):
    return a.keys() == b.keys() and all(_equal(x.double(), b[n].double()) for n, x in a.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", SUBJECTS)
def test_odd_inputs(name):
    subject = Subject(name)
    adapted, twin = subject.adapted, subject.twin
    # the same numbers in every run and process
    rng = random.Random(f"fasttta {name}")
    outcomes = Counter()
    warnings.simplefilter("ignore")  # of single samples, and of PyTorch's odd tensors
    for number in range(-(-CALLS // len(SUBJECTS))):
        what, inputs, plain = subject.mutated(rng)
        entry, context = rng.choice(sorted(ENTRIES)), rng.choice(sorted(CONTEXTS))
        if plain is None and entry in ("stream", "ahead") and what in ("a tuple", "a named batch"):
            continue  # which a stream takes
        label = f"{name}, call {number}: {what}, {entry}, {context}"
        before = snapshot(adapted)
        copies = [x.clone() for x in plain or () if isinstance(x, torch.Tensor)]
        result, error = _tried(partial(ENTRIES[entry], adapted, inputs), CONTEXTS[context])
        if error is not None:
            assert isinstance(error, (ValueError, TypeError)), f"{label}: {error!r}"
            assert str(error), label
            assert plain is None, f"{label}: refused, {error}"
            assert _same_state(before, snapshot(adapted)), f"{label}: the state changed"
            outcomes["refused"] += 1
        else:
            assert plain is not None, f"{label}: accepted"
            logits = _logits(result)
            assert type(logits) is torch.Tensor, label
            expected = twin.predict(*plain) if entry == "predict" else twin.step(*plain)
            assert _equal(logits, _logits(expected)), f"{label}: other logits than the twin's"
            assert _same_state(snapshot(adapted), snapshot(twin)), f"{label}: another state"
            if entry == "predict":
                assert _same_state(before, snapshot(adapted)), f"{label}: predict changed the state"
            kept = [x for x in plain if isinstance(x, torch.Tensor)]
            assert all(_equal(x, y) for x, y in zip(copies, kept, strict=True)), label
            outcomes["accepted"] += 1
        if number % 25 == 24:
            assert byte_sums(list(subject.model.state_dict().values())) == subject.weights, label
            adapted.reset(), twin.reset()
    # both kinds were met, many times
    assert min(outcomes["refused"], outcomes["accepted"]) > CALLS / len(SUBJECTS) / 5, outcomes
