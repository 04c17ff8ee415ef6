"""Models that come with prompts of BriMPR: modules of its PromptVA, and checkpoints of them."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import METHODS, tiny_stats
from lookalikes import PromptVA
from torch import nn

import fasttta
from fasttta.models import CAVMAE

OPTIONS = {name: dict(options) for name, options in METHODS.items()}
OPTIONS["brimpr"] = {"source_stats": tiny_stats(), "lr": 1e-3}


def _official(holder, batch):
    with torch.no_grad():
        return holder(a=batch[0], v=batch[1], mode="multimodal", prompt=True)[0]


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "DataParallel"])
def test_every_method_predicts_with_tuned_prompts(tiny_model, tiny_batch, method, wrapped):
    """As the official forward with prompt=True; the module itself is not touched; what unwrap
    gives is called as the owner calls it."""
    holder, batch = PromptVA(tiny_model(), 2, 3).tuned(), tiny_batch()
    before = copy.deepcopy(holder.state_dict())
    expected = _official(holder, batch)
    with torch.no_grad():
        assert not torch.allclose(expected, holder(*batch, "multimodal"), atol=1e-2)
    adapted = fasttta.adapt(nn.DataParallel(holder) if wrapped else holder, method,
                            **OPTIONS[method])  # fmt: skip
    assert torch.allclose(adapted.predict(*batch), expected, atol=1e-5)
    result = adapted.step(*batch)
    assert torch.allclose(result.logits_before, expected, atol=1e-5)
    with adapted.source():
        assert torch.allclose(adapted.predict(*batch), expected, atol=1e-5)
    if method != "rada":
        merged = adapted.unwrap(merge=True)
        assert type(merged) is type(adapted.unwrap())
        inner = merged.module if wrapped else merged
        assert torch.allclose(_official(inner, batch), adapted.predict(*batch), atol=1e-5)
    if method not in ("source", "rada"):
        assert not torch.allclose(adapted.predict(*batch), expected, atol=1e-5)
    adapted.reset()
    assert torch.allclose(adapted.predict(*batch), expected, atol=1e-5)
    assert all(torch.equal(x, before[name]) for name, x in holder.state_dict().items())


def test_brimpr_goes_on_with_them(tiny_model, tiny_batch):
    holder = PromptVA(tiny_model(), 2, 3).tuned()
    start = {"prompts.audio": holder.prompts_a.clone(), "prompts.video": holder.prompts_v.clone()}
    adapted = fasttta.adapt(holder, "brimpr", **OPTIONS["brimpr"])
    assert adapted.options.prompts == (2, 3)
    for _ in range(2):
        assert all(torch.equal(x, start[name]) for name, x in adapted.tuned.items())
        first = adapted.step(*tiny_batch())
        assert not torch.equal(adapted.tuned["prompts.audio"], start["prompts.audio"])
        adapted.reset()
    # the same as its prompts set by hand
    bare = fasttta.adapt(holder.va_model, "brimpr", prompts=(2, 3), **OPTIONS["brimpr"])
    bare.load_tuned(start)
    assert torch.equal(bare.step(*tiny_batch()).logits, first.logits)
    with pytest.raises(ValueError, match=r"prompts=\(4, 4\): the model came with \(2, 3\) tuned"):
        fasttta.adapt(holder, "brimpr", prompts=(4, 4), **OPTIONS["brimpr"])


def test_fresh_prompts_hold_nothing(tiny_model, tiny_batch):
    """BriMPR begins with them, or with others where it is asked for; other methods do not see
    them. Statistics are those of the model without prompts."""
    holder, batch = PromptVA(tiny_model(), 2, 3), tiny_batch()
    adapted = fasttta.adapt(holder, "brimpr", **OPTIONS["brimpr"])
    assert torch.equal(adapted.tuned["prompts.video"], holder.prompts_v)
    merged = adapted.unwrap(merge=True)
    assert torch.allclose(_official(merged, batch), adapted.predict(*batch), atol=1e-5)
    other = fasttta.adapt(holder, "brimpr", prompts=(1, 4), **OPTIONS["brimpr"])
    assert other.tuned["prompts.video"].shape == (2, 4, 12)
    merged = other.unwrap(merge=True)
    assert merged.num_prompts_v == 4
    assert torch.allclose(_official(merged, batch), other.predict(*batch), atol=1e-5)
    plain = fasttta.adapt(holder.va_model, "source").predict(*batch)
    assert torch.equal(fasttta.adapt(holder, "source").predict(*batch), plain)
    stats = fasttta.collect_stats(holder.va_model, [batch])
    for model in (holder, holder.tuned()):
        again = fasttta.collect_stats(model, [batch])
        assert again.model == stats.model
        assert all(torch.equal(a, b) for a, b in zip(again.audio, stats.audio, strict=True))
        fasttta.adapt(model, "brimpr", source_stats=stats)


def test_checkpoints_with_prompts(tiny_model, tiny_batch, tmp_path):
    holder, batch = PromptVA(tiny_model(), 2, 3).tuned(), tiny_batch()
    expected = _official(holder, batch)
    torch.save({"model_state_dict": nn.DataParallel(holder).state_dict()}, tmp_path / "a.pth")
    model = CAVMAE.from_checkpoint(tmp_path / "a.pth", num_heads=3)
    assert model.tuned_prompts
    assert torch.allclose(model(*batch), expected, atol=1e-5)
    assert model.state_dict().keys() == holder.va_model.state_dict().keys()
    adapted = fasttta.adapt(model, "brimpr", **OPTIONS["brimpr"])
    assert torch.equal(adapted.tuned["prompts.audio"], holder.prompts_a)
    adapted.step(*batch)
    # what unwrap gives of such a model, saved, is such a checkpoint again
    torch.save(adapted.unwrap(merge=True).state_dict(), tmp_path / "b.pth")
    again = CAVMAE.from_checkpoint(tmp_path / "b.pth", num_heads=3)
    assert torch.allclose(again(*batch), adapted.predict(*batch), atol=1e-5)
    bad = dict(holder.state_dict()) | {"prompts_a": torch.ones(3, 2, 12)}
    with pytest.raises(ValueError, match=r"prompts of audio have shape \[3, 2, 12\], needed \[1,"):
        CAVMAE.from_checkpoint(bad, num_heads=3)
    fresh = CAVMAE.from_checkpoint(PromptVA(tiny_model(), 2, 3).state_dict(), num_heads=3)
    assert not fresh.tuned_prompts
    assert torch.equal(fresh(*batch), tiny_model()(*batch))
    assert fresh.start_prompts()["video"].shape == (2, 3, 12)


def test_a_forward_that_is_another(tiny_model, tiny_batch):
    class Patched(PromptVA):
        def forward(self, a, v, mode, prompt=False):
            out = super().forward(a, v, mode, prompt)
            return (out[0] * 2, out[1]) if prompt else out

    adapted = fasttta.adapt(Patched(tiny_model(), 2, 3).tuned(), "read")
    with pytest.raises(ValueError, match="its own forward differs"):
        adapted(*tiny_batch())


PREFIXES = ["", "module.", "_orig_mod.", "model.", "net.", "module._orig_mod.", "model.module.net."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_and_wrappers(tiny_model, tiny_batch, tmp_path, prefix):
    state = tiny_model().state_dict()
    expected = tiny_model()(*tiny_batch())
    named = {prefix + name: x for name, x in state.items()}
    inner = {n.replace("blocks_u.0.", "blocks_u.0._orig_mod."): x for n, x in named.items()}
    for checkpoint in (
        named, inner, {"state_dict": named}, {"model_state_dict": named, "epoch": 3},
        {"net": named, "args": [1]}, {"model": {"module": named}, "optimizer": {}},
    ):  # fmt: skip
        torch.save(checkpoint, tmp_path / "a.pth")
        for source in (checkpoint, tmp_path / "a.pth"):
            model = CAVMAE.from_checkpoint(source, num_heads=3)
            assert torch.equal(model(*tiny_batch()), expected)
    both = {**state, "module.norm.weight": state["norm.weight"]}
    with pytest.raises(ValueError, match="norm.weight and module.norm.weight are both norm.weight"):
        CAVMAE.from_checkpoint(both, num_heads=3)


def test_head_counts_are_asked_for(tiny_model, tmp_path, capsys):
    from fasttta.cli import main

    torch.save(tiny_model().state_dict(), tmp_path / "a.pth")
    for source in (tmp_path / "a.pth", tiny_model().state_dict()):
        with pytest.raises(ValueError, match=r"give num_heads: .* this one's is 12"):
            CAVMAE.from_checkpoint(source)
    assert main(["inspect", str(tmp_path / "a.pth")]) == 2
    assert "--num-heads" in capsys.readouterr().err
    sizes = {"dim": 768, "audio_tokens": 2, "video_tokens": 2, "depth": (0, 0, 1), "hidden": 8}
    model = CAVMAE(2, **sizes, patch_audio=(2, 2), patch_video=(2, 2))
    assert CAVMAE.from_checkpoint(model.state_dict()).num_heads == 12
    assert CAVMAE.from_checkpoint(model.state_dict(), num_heads=6).num_heads == 6


def test_two_fusion_blocks(tiny_model, tiny_batch):
    """Of which the official code tunes the first; the scores are those of the last. Gradients are
    those of plain autograd over the first block's projections."""
    import torch.nn.functional as nnf

    model, (audio, video) = tiny_model(depth=(1, 1, 2)).double(), tiny_batch(dtype=torch.float64)
    for name, options in (("read", {}), ("abpem", {"k": 3, "window": 1})):
        adapted = fasttta.adapt(model, name, **options)
        result = adapted.step(audio, video, trace=True)
        assert {n.split(".attn")[0] for n in adapted.tuned} == {"blocks_u.0"}
        assert len(adapted.tuned) == 6
        weight = model.blocks_u[0].attn.qkv.weight
        weight.requires_grad_(True)
        logits, (q, k, scale) = model.fuse_attention(model.encode(audio, video).detach())
        p = nnf.softmax(logits, -1)
        mean = p.sum(0).softmax(-1) if name == "read" else p.mean(0)
        balance = -(mean * mean.log()).sum()
        if name == "read":
            top = p.max(-1).values
            loss = -(top * top.log()).mean() - balance
        else:
            chosen = p.topk(3).values
            loss = -(chosen * (chosen + 1e-6).log()).sum(-1).mean() - balance
            scores = (q @ k.transpose(-2, -1) * scale).mean(1)
            parts = scores.split(model.spans, 1)
            blocks = [part.split(model.spans, 2) for part in parts]
            moments = [[(b.mean((1, 2)), b.flatten(1).std(1)) for b in row] for row in blocks]
            for row, column in ((1, 0), (0, 1)):
                (m, s), (ms, ss) = moments[row][column], moments[column][column]
                ms, ss = ms.detach(), ss.detach()
                gap = (ss / s).log() + (s**2 + (m - ms) ** 2) / (2 * ss**2) - 0.5
                loss = loss + gap.mean()
        (grad,) = torch.autograd.grad(loss, weight)
        weight.requires_grad_(False)
        assert torch.allclose(result.losses["total"], loss, atol=1e-9), name
        for row, which in enumerate("qkv"):
            expected = grad[row * 12 : (row + 1) * 12]
            gradient = result.grads[f"blocks_u.0.attn.{which}.weight"]
            assert torch.allclose(gradient, expected, atol=1e-9), (name, which)
