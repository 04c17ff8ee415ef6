"""torch.compile, each time in a fresh process: nothing has been called before it traces."""

from __future__ import annotations

import subprocess
import sys

import pytest
from places import TESTS

OPERATIONS = """
import torch
from fasttta import functional as F

torch.manual_seed(0)
logits, maps = torch.randn(8, 10), torch.rand(4, 6, 5)
q, k, v = (torch.randn(2, 3, 9, 4) for _ in range(3))
calls = {
    "entropy": (lambda x: F.entropy(x).sum(), logits),
    "principal_entropy": (lambda x: F.principal_entropy(x, 3).sum(), logits),
    "balance_entropy": (F.balance_entropy, logits),
    "marginal_entropy": (F.marginal_entropy, logits),
    "adaptation_head": (lambda x: F.adaptation_head(x, 3)[0], logits),
    "total_variation": (lambda x: F.total_variation(x).sum(), maps),
    "score_moments": (lambda x: F.score_moments(x, k, (4, 5)).std.sum(), q),
    "attention_bootstrap": (lambda x: F.attention_bootstrap(x, k, (4, 5)).sum(), q),
    "flat_attention": (lambda x: F.flat_attention(x, k, v).sum(), q),
}
for name, (function, x) in calls.items():
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for call in (compiled, function):  # the compiled one first
        leaf = x.clone().requires_grad_()
        value = call(leaf)
        value.backward()
        results.append((value.detach(), leaf.grad))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, msg=name)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), function(x), msg=name)  # without a gradient
    print(name)
"""

ADAPTED = """
import sys
import torch

sys.path.insert(0, TESTS + "/support")
import fasttta
from clips import tiny_clip, tiny_ids
from fasttta.demo.digits import load_model, stream

def clip(method, **options):
    model = fasttta.models.CLIP.from_checkpoint(tiny_clip().state_dict())
    image = torch.rand(3, model.resolution, model.resolution)
    return (lambda: fasttta.adapt(model, method, classes=tiny_ids(), **options)), (image,)

def digits(method, **options):
    batch = stream("white", samples=4)[0][:2]
    return (lambda: fasttta.adapt(load_model(), method, **options)), batch

torch.manual_seed(0)
for make, inputs in (
    clip("source"), clip("a-tpt", views=4, select=0.5), digits("abpem", k=2), digits("tent"),
):
    plain, adapted = make(), make()
    compiled = torch.compile(adapted, backend="aot_eager")
    for _ in range(2):
        assert torch.equal(compiled(*inputs), plain(*inputs))
    for name, value in plain.tuned.items():
        assert torch.equal(value, adapted.tuned[name])
    print(adapted.method)
"""


def _run(code: str) -> tuple[list[str], str]:
    """The lines that a process prints, and what it says on standard error; it must succeed."""
    ran = subprocess.run(
        [sys.executable, "-P", "-c", f"TESTS = {str(TESTS)!r}\n{code}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout.split(), ran.stderr


@pytest.mark.slow
def test_operations_compile_cold():
    names, _ = _run(OPERATIONS)
    assert len(names) == 9


@pytest.mark.slow
def test_adapted_models_compile_quietly():
    """And give the very numbers of the plain call."""
    names, said = _run(ADAPTED)
    assert names == ["source", "a-tpt", "abpem", "tent"]
    assert said == ""
