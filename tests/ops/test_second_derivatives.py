"""Second derivatives: those of the plain formulas, or an error, never a constant."""

from __future__ import annotations

import functools

import pytest
import torch
from clips import tiny_clip, tiny_ids
from op_cases import DEVICE, logits_of, qk

from fasttta import functional as F
from fasttta.models.cavmae.chunked_loss import chunked_loss
from fasttta.models.cavmae.prompt_attention import prompt_attention
from fasttta.ops import autograd
from fasttta.ops.quick_gelu import quick_gelu
from fasttta.ops.shared_prefix_attention import layout
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


def _bootstrap(q, k):
    """Own anchors are constants of the loss that a numerical derivative would move."""
    anchor = F.Moments(torch.full((2,), 0.1).double(), torch.tensor([0.5, 1.0]).double())
    return F.attention_bootstrap(q, k, [3, 2], anchor=anchor)


def _moments(q, k):
    return tuple(F.score_moments(q, k, [3, 2]))


CASES = {
    "score_moments": (_moments, lambda: qk(1, 2, (3, 2), 2)),
    "attention_bootstrap": (_bootstrap, lambda: qk(1, 2, (3, 2), 2)),
    "entropy": (F.entropy, lambda: (logits_of(2, 4),)),
    "principal_entropy": (lambda z: F.principal_entropy(z, 2), lambda: (logits_of(2, 4),)),
    "balance_entropy": (F.balance_entropy, lambda: (logits_of(3, 4),)),
    "adaptation_head": (lambda z: F.adaptation_head(z, 2)[0], lambda: (logits_of(3, 4),)),
    "adaptation_head, a part": (lambda z: F.adaptation_head(z, 2)[1], lambda: (logits_of(3, 4),)),
    "total_variation": (lambda x: F.total_variation(x).square(), lambda: (_random(2, 3, 3),)),
    "flat_attention": (F.flat_attention, lambda: [_random(1, 1, 3, 2, seed=i) for i in range(3)]),
    "shared_prefix_attention": (
        lambda q, k, v, pk, pv: F.shared_prefix_attention(q, k, v, pk, pv, [1, 2], 2),
        lambda: (*_packed(3), *_packed(2)[1:]),
    ),
    "causal_with_prefix": (
        lambda q, k, v: autograd.causal_with_prefix(
            q, k, v, layout([2], DEVICE), layout([1, 2], DEVICE), 2, 0.7
        ),
        lambda: _packed(5),
    ),
    "quick_gelu": (quick_gelu, lambda: (_random(2, 3),)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_gradients_can_be_differentiated(case):
    function, inputs = CASES[case]
    assert torch.autograd.gradgradcheck(function, tuple(inputs()))


def test_a_penalty_beside_another_path():
    """Where the incoming gradient is a constant and a residual leads around the operation."""
    x = _random(3, 4)

    def second(act):
        (grad,) = torch.autograd.grad((x.square() + act(x)).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    expected = second(lambda y: y * torch.sigmoid(1.702 * y))
    assert torch.allclose(second(quick_gelu), expected)


def test_softmax_attention_of_encoders():
    """float32: the kernel's type."""
    tensors = [_random(1, 2, 20, 4, seed=i, dtype=torch.float32) for i in range(3)]

    def second(attention):
        out = attention(*tensors)
        grads = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), tensors)

    found = second(functools.partial(attend, scale=0.5))
    for x, y in zip(found, second(lambda q, k, v: (0.5 * q @ k.mT).softmax(-1) @ v), strict=True):
        assert (x - y).abs().max() <= 1e-4 * y.abs().max()


def test_text_tower():
    """Hessians, and torch.func's ways to a gradient."""
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
    leaf = start.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    (found,) = torch.autograd.grad((grad * step).sum(), leaf)
    eps = 1e-5
    numeric = sum(
        sign * torch.autograd.grad(loss(at), at)[0] / (2 * eps)
        for sign in (1, -1)
        for at in [(start + sign * eps * step).requires_grad_()]
    )
    assert torch.allclose(found, numeric, atol=1e-5 * numeric.abs().max())


def test_what_has_none_says_so():
    q, kv, prompt = _random(1, 4, 6), _random(1, 4, 12), _random(2, 12)
    if DEVICE.type == "cpu":
        out = prompt_attention(q, kv, prompt, 2, 0.5)
        with pytest.raises(RuntimeError, match="attention over prompts has no second derivative"):
            torch.autograd.grad(out.square().sum(), prompt, create_graph=True)
    x = _random(4, 3)
    value, _ = chunked_loss(lambda rows, shared, own: (own[0].square().sum(), ()), [], [x], 4, 2)
    with pytest.raises(RuntimeError, match="in portions has no second derivative"):
        torch.autograd.grad(value, x, create_graph=True)
