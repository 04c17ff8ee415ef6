"""Second derivatives: the reference has them, kernels say that they have none; never a constant."""

from __future__ import annotations

import functools

import pytest
import torch
from clips import tiny_clip, tiny_ids
from op_cases import DEVICE, logits_of, qk

from fasttta import functional as F
from fasttta.models.cavmae.chunked_loss import chunked_loss
from fasttta.models.cavmae.prompt_attention import prompt_attention
from fasttta.ops import native
from fasttta.ops.quick_gelu import quick_gelu
from fasttta.ops.shared_prefix_attention import causal_with_prefix, layout
from fasttta.ops.softmax_attention import attend


@pytest.fixture(autouse=True)
def _on_the_device():
    with DEVICE:
        yield


def _random(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator("cpu").manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return x.to(DEVICE, dtype).requires_grad_()


def _packed(n):
    return [_random(1, n, 4, seed=i) for i in range(3)]


def _bootstrap(q, k, backend=None):
    """With fixed anchors: the batch's are constants of the loss, which finite differences move."""
    anchor = F.Moments(torch.full((2,), 0.1).double(), torch.tensor([0.5, 1.0]).double())
    return F.attention_bootstrap(q, k, [3, 2], anchor=anchor, backend=backend)


def _moments(q, k, backend=None):
    return tuple(F.score_moments(q, k, [3, 2], backend=backend))


def _head(part):
    return lambda z, backend=None: F.adaptation_head(z, 2, backend=backend)[part]


CASES = {
    "score_moments": (_moments, lambda: qk(1, 2, (3, 2), 2)),
    "attention_bootstrap": (_bootstrap, lambda: qk(1, 2, (3, 2), 2)),
    "entropy": (F.entropy, lambda: (logits_of(2, 4),)),
    "principal_entropy": (
        lambda z, backend=None: F.principal_entropy(z, 2, backend=backend),
        lambda: (logits_of(2, 4),),
    ),
    "balance_entropy": (F.balance_entropy, lambda: (logits_of(3, 4),)),
    "adaptation_head": (_head(0), lambda: (logits_of(3, 4),)),
    "adaptation_head, a part": (_head(1), lambda: (logits_of(3, 4),)),
    "total_variation": (
        lambda x, backend=None: F.total_variation(x, backend=backend).square(),
        lambda: (_random(2, 3, 3),),
    ),
    "flat_attention": (F.flat_attention, lambda: [_random(1, 1, 3, 2, seed=i) for i in range(3)]),
    "shared_prefix_attention": (
        lambda q, k, v, pk, pv, backend=None: F.shared_prefix_attention(
            q, k, v, pk, pv, [1, 2], 2, backend=backend
        ),
        lambda: (*_packed(3), *_packed(2)[1:]),
    ),
}


def _total(outputs):
    return sum(x.sum() for x in outputs) if isinstance(outputs, tuple) else outputs.sum()


@pytest.mark.parametrize("case", CASES)
def test_kernels_refuse(case):
    """Also where the incoming gradient is a constant and a residual leads around the operation."""
    function, make = CASES[case]
    inputs = tuple(make())
    residual = sum(x.square().sum() for x in inputs)
    name = case.partition(",")[0]
    with pytest.raises(RuntimeError, match=f"{name} has no second derivative.*backend='reference'"):
        torch.autograd.grad(_total(function(*inputs)) + residual, inputs, create_graph=True)
    torch.autograd.grad(_total(function(*inputs)), inputs)  # the first one is there


@pytest.mark.parametrize("case", CASES)
def test_the_reference_can_be_differentiated_twice(case):
    function, make = CASES[case]
    reference = functools.partial(function, backend="reference")
    assert torch.autograd.gradgradcheck(reference, tuple(make()))


def test_attention_over_a_prefix_refuses():
    q, k, v = _packed(5)
    out = causal_with_prefix(q, k, v, layout([2], DEVICE), layout([1, 2], DEVICE), 2, 0.7)
    with pytest.raises(RuntimeError, match="shared_prefix_attention has no second derivative"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


@pytest.mark.skipif(DEVICE.type != "cpu" or not native.load(), reason="needs the C++ kernels")
def test_parts_of_encoders_refuse():
    tensors = [_random(1, 2, 20, 4, seed=i, dtype=torch.float32) for i in range(3)]
    for out, x, name in (
        (attend(*tensors, 0.5), tensors[0], "softmax attention on a CPU"),
        (quick_gelu(tensors[0]), tensors[0], "quick_gelu"),
    ):
        with pytest.raises(RuntimeError, match=f"{name} has no second derivative"):
            torch.autograd.grad(out.sum() + x.square().sum(), x, create_graph=True)


def test_transforms_of_the_text_tower():
    """torch.func's ways to a gradient."""
    prompts = tiny_clip().double().to(DEVICE).prompts(tiny_ids().to(DEVICE), 4)
    start = prompts.initial[None].clone()
    along = _random(*prompts.features().shape).detach()

    def loss(prompt):
        return (prompts.features(prompt) * along).sum()

    leaf = start.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf), leaf)
    assert torch.allclose(torch.func.grad(loss)(start), grad)
    step = torch.randn_like(start)
    _, slope = torch.func.jvp(loss, (start,), (step,))
    assert torch.allclose(slope, (grad * step).sum())


def test_losses_of_models_refuse():
    q, kv, prompt = _random(1, 4, 6), _random(1, 4, 12), _random(2, 12)
    if DEVICE.type == "cpu":
        out = prompt_attention(q, kv, prompt, 2, 0.5)
        with pytest.raises(RuntimeError, match="attention over prompts has no second derivative"):
            torch.autograd.grad(out.square().sum(), prompt, create_graph=True)
    x = _random(4, 3)
    value, _ = chunked_loss(lambda rows, shared, own: (own[0].square().sum(), ()), [], [x], 4, 2)
    with pytest.raises(RuntimeError, match="in portions has no second derivative"):
        torch.autograd.grad(value, x, create_graph=True)
