"""Attention over tokens and prompts against softmax(q k) v written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fasttta.models.blocks.layers import Linear
from fasttta.models.cavmae import prompt_attention as module
from fasttta.models.cavmae.prompt_attention import prompt_attention, query_and_keys
from fasttta.ops import native, softmax_attention


def draw(*shape, seed, grad=True):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return x.requires_grad_(grad)


def plain(q, kv, prompt_kv, heads, scale):
    b, t, dim = q.shape
    k, v = torch.cat((prompt_kv.expand(b, -1, -1), kv), 1).chunk(2, dim=-1)
    q, k, v = (x.reshape(b, -1, heads, dim // heads).transpose(1, 2) for x in (q, k, v))
    out = (scale * q @ k.transpose(-2, -1)).softmax(-1) @ v
    return out.transpose(1, 2).reshape(b, t, dim)


@pytest.mark.parametrize("shape", [(3, 5, 2), (1, 1, 1), (2, 300, 10)])
@pytest.mark.parametrize("tokens", [True, False])
def test_gradients(shape, tokens):
    """With gradients for tokens, and for prompts alone."""
    batch, count, prompts = shape
    q, kv = draw(batch, count, 12, seed=1, grad=tokens), draw(batch, count, 24, seed=2, grad=tokens)
    prompt_kv, along = draw(prompts, 24, seed=3), draw(batch, count, 12, seed=4, grad=False)
    out = prompt_attention(q, kv, prompt_kv, 3, 0.7)
    expected = plain(q, kv, prompt_kv, 3, 0.7)
    assert torch.allclose(out, expected, atol=1e-12)
    with torch.no_grad():
        assert torch.allclose(prompt_attention(q, kv, prompt_kv, 3, 0.7), expected, atol=1e-12)
    of = (q, kv, prompt_kv) if tokens else (prompt_kv,)
    for a, b in zip(
        torch.autograd.grad(out, of, along), torch.autograd.grad(expected, of, along), strict=True
    ):
        assert b.abs().max() > 1e-6
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("tokens", [True, False])
@pytest.mark.parametrize("count", [9, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype, count, tokens, monkeypatch):
    """The C++ kernel serves 40 tokens, where there is one, in bf16 if the processor has it."""
    q, kv, prompt_kv = (
        draw(*s, seed=i, grad=False).to(dtype)
        for i, s in enumerate(((2, count, 12), (2, count, 24), (4, 24)))
    )
    prompt_kv.requires_grad_(True), q.requires_grad_(tokens), kv.requires_grad_(tokens)
    served, suits = [], softmax_attention._suits
    monkeypatch.setattr(
        softmax_attention, "_suits", lambda *x: served.append(suits(*x)) or served[-1]
    )
    exact = plain(q.double(), kv.double(), prompt_kv.double(), 3, 0.5)
    out = prompt_attention(q, kv, prompt_kv, 3, 0.5)
    limit = 1e-5 if dtype == torch.float32 else 0.05
    assert (out.double() - exact).abs().max() < limit
    of = (q, kv, prompt_kv) if tokens else (prompt_kv,)
    for a, b in zip(
        torch.autograd.grad(out.double().square().sum(), of),
        torch.autograd.grad(exact.square().sum(), of),
        strict=True,
    ):
        assert (a.double() - b.double()).abs().max() < limit * b.abs().max()
    typed = dtype == torch.float32 or softmax_attention._bf16_suits()
    ours = typed and count == 40 and native.load()
    assert served == [ours] * (2 if tokens else 1)


@pytest.mark.parametrize(("batch", "count", "prompts"), [(3, 5, 2), (1, 1, 1), (2, 7, 4)])
def test_keys_of_prompts_and_tokens(batch, count, prompts):
    """As on a GPU: the gradients are in the layout of what the two products returned."""
    kv, prompt_kv = draw(batch, count, 24, seed=2), draw(prompts, 24, seed=3)

    def joined(kv, prompt_kv):
        return module._JoinedHeads.apply(kv, prompt_kv, 3)

    assert torch.autograd.gradcheck(joined, (kv, prompt_kv))
    both = torch.cat((prompt_kv.expand(batch, -1, -1), kv), 1).chunk(2, dim=-1)
    for part, whole in zip(joined(kv, prompt_kv), both, strict=True):
        assert torch.equal(part, whole.unflatten(-1, (3, 4)).transpose(1, 2))
    along = [torch.randn(batch, 3, prompts + count, 4, dtype=torch.float64) for _ in "kv"]
    grads = torch.autograd.grad(joined(kv, prompt_kv), (kv, prompt_kv), along)
    assert all(x.is_contiguous() for x in grads)


@pytest.mark.parametrize("bias", [True, False])
def test_two_products(bias, monkeypatch):
    """As on a GPU, against the products one after the other; a tuned layer keeps its gradients."""
    layer = Linear(6, 18, bias=bias).double()
    x = draw(2, 5, 6, seed=1)
    along = [draw(2, 5, n, seed=n, grad=False) for n in (6, 12)]
    expected = query_and_keys(layer, x)
    of = x, *layer.parameters()
    grads = torch.autograd.grad(expected, of, along)
    monkeypatch.setattr(module, "fuses", lambda *_: True)
    for a, b in zip(torch.autograd.grad(query_and_keys(layer, x), of, along), grads, strict=True):
        assert torch.equal(a, b)
    layer.requires_grad_(False)
    returned = query_and_keys(layer, x)
    assert "TwoProducts" in type(returned[0].grad_fn).__name__
    assert all(torch.equal(a, b) for a, b in zip(returned, expected, strict=True))
    (grad,) = torch.autograd.grad(returned, x, along)
    assert torch.allclose(grad, grads[0], rtol=1e-13)
    assert torch.autograd.gradcheck(lambda x: query_and_keys(layer, x), (x,))
    with torch.no_grad():
        assert query_and_keys(nn.Sequential(layer)[0], x)[1].shape == (2, 5, 12)
