"""Blocks whose additions wait for the next LayerNorm, as on a GPU, against the plain ones."""

from __future__ import annotations

import pytest
import torch
from cases import METHODS
from clips import tiny_clip, tiny_ids
from torch import nn

import fasttta
from fasttta.models.blocks.layers import ModalityBlock, ResidualAttentionBlock, run_blocks
from fasttta.models.blocks.residual import split_heads, untouched
from fasttta.ops import gelu, residual_layer_norm

CALLS: list[str] = []


@pytest.fixture(name="fused")
def fused_fixture(monkeypatch):
    """Returns a function from which on blocks run as on a GPU; the kernels' defaults compute."""
    CALLS.clear()
    operator = torch.ops.fasttta.residual_layer_norm

    class Recorded:
        def __getattr__(self, name):
            CALLS.append(name)
            return getattr(torch.ops.fasttta, name)

    def start():
        assert operator is torch.ops.fasttta.residual_layer_norm
        monkeypatch.setattr(residual_layer_norm, "_has_kernels", lambda *_: True)
        residual_layer_norm.KERNEL_DEVICES.add("cpu")
        monkeypatch.setattr(gelu, "kernels_serve", lambda x: x.is_contiguous())
        monkeypatch.setattr(residual_layer_norm, "ops", Recorded())

    yield start
    residual_layer_norm.KERNEL_DEVICES.discard("cpu")


def _close(computed, expected):
    assert computed.dtype == expected.dtype
    scale = expected.abs().max().clamp_min(1e-3)
    assert (computed - expected).abs().max() <= 1e-11 * scale


def _trained(module):
    """Random values also where LayerNorms and biases begin with 1 and 0."""
    generator = torch.Generator().manual_seed(3)
    for p in module.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return module.double()


@pytest.mark.parametrize("modality", ["", "a", "v"])
def test_a_block_alone(modality, fused):
    block = _trained(ModalityBlock(12, 3, 24))
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)

    def run():
        out, (q, k, scale) = block(x, modality)
        loss = (out.sin().sum() + (q.sum(2) * k.cos().sum(2)).sum()) * scale
        names = dict(block.named_parameters())
        return out, *torch.autograd.grad(loss, (x, *names.values()), allow_unused=True)

    expected = run()
    fused()
    assert not CALLS
    computed = run()
    assert CALLS.count("residual_layer_norm") == 2
    for a, b in zip(computed, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            _close(a, b)


@pytest.mark.parametrize("causal", [False, True])
def test_a_block_of_clip_alone(causal, fused):
    block = _trained(ResidualAttentionBlock(12, 3, 24, "quick_gelu"))
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)

    def run():
        out = block(x, causal)
        return out, *torch.autograd.grad(out.sin().sum(), (x, *block.parameters()))

    expected = run()
    fused()
    for a, b in zip(run(), expected, strict=True):
        _close(a, b)
    assert CALLS.count("residual_layer_norm") == 2


@pytest.mark.parametrize("grad", [True, False])
def test_models(grad, fused, tiny_model, tiny_batch):
    model, batch = _trained(tiny_model()), [x.double() for x in tiny_batch()]
    clip = _trained(tiny_clip())
    pixels = torch.rand(3, 3, 24, 24, dtype=torch.float64)

    def run():
        with torch.set_grad_enabled(grad):
            tokens = model.encode(*batch)
            logits, (q, k, _) = model.fuse_attention(tokens)
            alone = model(batch[0], None, mode="missingaudioonly")
            text = clip.prompts(tiny_ids(), 4).features()
            maps = clip.attention_maps(pixels, text[0])
            return (tokens, logits, q, k, alone, text, clip.encode_image(pixels), maps.grid,
                    clip.attention_maps(pixels, text[0], "gar").rows)  # fmt: skip

    expected = run()
    fused()
    computed = run()
    assert len(CALLS) > 20
    for a, b in zip(computed, expected, strict=True):
        _close(a.detach(), b.detach())


@pytest.mark.parametrize("method", ["abpem", "read", "tent", "sar", "brimpr"])
def test_steps(method, fused, tiny_model, tiny_batch):
    """Methods take the same steps: encoders and fusion, with gradients and without, tuned
    LayerNorms and tuned projections, prompts."""
    model = _trained(tiny_model())

    def run():
        adapted = fasttta.adapt(model, method, precision="fp32", **METHODS[method])
        results = [adapted.step(*(x.float() for x in tiny_batch(seed=i))) for i in range(3)]
        return [r.logits for r in results], adapted.tuned

    model.float()
    logits, tuned = run()
    fused()
    fused_logits, fused_tuned = run()
    assert CALLS.count("residual_layer_norm_backward") > 2
    for a, b in zip(fused_logits, logits, strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    for name, x in tuned.items():
        if name.endswith("k.bias"):  # no softmax depends on it: Adam follows the sign of rounding
            continue
        assert torch.allclose(fused_tuned[name], x, atol=1e-4), name


@pytest.mark.parametrize("n", [1, 2, 3])
def test_split_heads(n, fused):
    """The gradient is in the product's layout: nothing copies it again."""
    fused()
    x = torch.randn(2, 5, n, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(split_heads, (x,))
    parts = split_heads(x)
    assert all(torch.equal(p, x[:, :, i].transpose(1, 2)) for i, p in enumerate(parts))
    up = [torch.randn(2, 5, 3, 4, dtype=torch.float64).transpose(1, 2) for _ in parts]
    (grad,) = torch.autograd.grad(parts[: max(1, n - 1)], x, up[: max(1, n - 1)])
    assert grad.is_contiguous()


def test_hooks_and_replaced_parts_are_called(fused, tiny_model, tiny_batch):
    model, batch = _trained(tiny_model()), [x.double() for x in tiny_batch()]
    fused()
    expected, seen = model(*batch), []
    first, norm = model.blocks_a[0], model.blocks_v[0].norm2
    handles = [
        first.register_forward_hook(lambda m, i, out: seen.append(out[0])),
        norm.register_forward_hook(lambda m, i, out: seen.append(out)),
    ]
    assert not untouched(first, ModalityBlock)
    assert torch.allclose(model(*batch), expected, atol=1e-12)
    assert len(seen) == 2
    assert seen[0].shape == (len(batch[0]), model.spans[0], model.dim)
    for handle in handles:
        handle.remove()

    class Doubled(nn.LayerNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    double = Doubled(model.dim).double()
    double.load_state_dict(norm.state_dict())
    model.blocks_v[0].norm2 = double
    changed = model(*batch)
    assert not torch.allclose(changed, expected)
    norm.weight.data *= 2
    norm.bias.data *= 2
    model.blocks_v[0].norm2 = norm
    assert torch.allclose(model(*batch), changed, atol=1e-12)


class _Own(nn.Module):
    """A user's part of a block, without any of our layers."""

    def __init__(self, part):
        super().__init__()
        self.inner = part

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("method", ["read", "tent", "brimpr"])
def test_replaced_parts_need_no_layers_of_ours(method, fused, tiny_model, tiny_batch):
    model, batch = _trained(tiny_model()), [x.double() for x in tiny_batch()]
    expected = fasttta.adapt(model, method, **METHODS[method]).step(*batch).logits
    for blocks in (model.blocks_a, model.blocks_v):
        blocks[0].mlp = _Own(blocks[0].mlp)
        if method != "brimpr":  # which attends to its prompts itself
            blocks[0].attn = _Own(blocks[0].attn)
    fused()
    result = fasttta.adapt(model, method, **METHODS[method]).step(*batch).logits
    assert torch.allclose(result, expected, atol=1e-11)


def test_replaced_parts_of_clip_need_no_layers_of_ours(fused):
    model, x = _trained(tiny_clip()), torch.rand(2, 3, 24, 24, dtype=torch.float64)
    expected, block = model.visual(x), model.visual.transformer.resblocks[0]
    block.mlp = _Own(block.mlp)
    fused()
    assert torch.allclose(model.visual(x), expected, atol=1e-11)


def test_the_residual_is_left_as_it_was(fused):
    blocks = [_trained(ModalityBlock(12, 3, 24)) for _ in range(2)]
    x, branch = torch.randn(2, 4, 5, 12, dtype=torch.float64)
    before = x.clone(), branch.clone()
    fused()
    with torch.no_grad():
        out = torch.full((4, 9, 12), torch.nan, dtype=torch.float64)
        place = out[:, 2:7]
        result = run_blocks(blocks, x, branch, place)
        assert result is place
        assert torch.equal(place, run_blocks(blocks, x + branch))
        assert out[:, :2].isnan().all()
        assert out[:, 7:].isnan().all()
    assert torch.equal(x, before[0])
    assert torch.equal(branch, before[1])


def test_compiles_in_one_graph(fused):
    """torch.compile sees PyTorch's calls."""
    block = _trained(ModalityBlock(12, 3, 24))
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    expected = block(x)[0]
    fused()
    compiled = torch.compile(lambda y: block(y)[0], fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        _close(compiled(x), expected.detach())
