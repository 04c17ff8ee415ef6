"""Adapted: calls, results, and what it never touches."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import METHODS, same

import fasttta
from fasttta import functional as F
from fasttta import methods
from fasttta.methods.options import option_names


def test_names_and_auto(tiny_model):
    assert methods.names("fusion") == list(METHODS)
    for name in methods.names():
        assert methods.by_name(name).name == name
    assert fasttta.adapt(tiny_model(), k=3).method == "abpem"
    named = fasttta.adapt(tiny_model(), "abpem", k=3)
    assert named.options == methods.ABPEM(k=3)
    assert fasttta.adapt(tiny_model(), methods.ABPEM(k=3)).options == named.options


def test_signatures():
    """Positional order and defaults as documented."""
    assert methods.ABPEM(7, 2, 0.5).entropy_weight == 0.5
    assert methods.READ(1e-3).lr == methods.Tent(1e-3).lr == 1e-3
    default = methods.ABPEM()
    assert (default.k, default.window, default.balance, default.lr) == (8, 4, "mean", 1e-4)
    for cls in map(methods.by_name, methods.names()):
        assert {"steps", "score_at", "lr"} <= set(option_names(cls))
    assert methods.Tent().score_at == "before"
    assert methods.READ().score_at == methods.ABPEM().score_at == "after"
    presets = {
        "ks50-video": (8, 4, 1.0), "ks50-audio": (7, 4, 5.0),
        "vgg-video": (28, 4, 1.0), "vgg-audio": (30, 2, 1.0),
    }  # fmt: skip
    assert presets.keys() == methods.ABPEM.PRESETS.keys()
    for name, values in presets.items():
        preset = methods.ABPEM.preset(name)
        assert (preset.k, preset.window, preset.attention_weight) == values
    with pytest.raises(AttributeError):
        default.k = 3


def test_call_equals_step_logits(tiny_model, tiny_batch, method):
    a, b = (fasttta.adapt(tiny_model(), method, **METHODS[method]) for _ in range(2))
    for seed in range(3):
        assert torch.equal(a(*tiny_batch(seed=seed)), b.step(*tiny_batch(seed=seed)).logits)


def test_the_users_model_is_untouched(tiny_model, tiny_batch, method):
    model = tiny_model()
    model.train()
    model.norm.weight.requires_grad_(False)
    before, ids = copy.deepcopy(model.state_dict()), [id(p) for p in model.parameters()]
    flags = [p.requires_grad for p in model.parameters()]
    adapted = fasttta.adapt(model, method, **METHODS[method])
    adapted.eval()
    adapted.train()
    audio, video = tiny_batch()
    copies = audio.clone(), video.clone()
    for _ in range(3):
        adapted(audio, video)
    assert torch.equal(audio, copies[0])
    assert torch.equal(video, copies[1])
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert ids == [id(p) for p in model.parameters()]
    assert flags == [p.requires_grad for p in model.parameters()]
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert adapted.unwrap() is model


def test_frozen_weights_are_shared(tiny_model):
    model = tiny_model()
    adapted = fasttta.adapt(model, "read")
    working = dict(adapted._hidden[1].named_parameters())
    for name, parameter in model.named_parameters():
        shared = working[name].data_ptr() == parameter.data_ptr()
        assert shared != name.startswith("blocks_u.0.attn.qkv"), name


def test_what_is_one_object_stays_one(tiny_model, tiny_batch):
    """Frozen parameters under two names, and a module under two, are one in the working copy."""
    model = tiny_model()
    model.blocks_v[0].norm1.weight = model.blocks_a[0].norm1.weight
    model.blocks_v[1] = model.blocks_v[0]
    adapted = fasttta.adapt(model, "read")
    working = adapted._hidden[1]
    assert working.blocks_v[1] is working.blocks_v[0]
    assert working.blocks_v[0].norm1.weight is working.blocks_a[0].norm1.weight
    assert working.blocks_a[0].norm1 is not model.blocks_a[0].norm1
    assert torch.allclose(adapted.predict(*tiny_batch()), model(*tiny_batch()), atol=1e-6)


def test_methods_differ_and_learn(tiny_model, tiny_batch):
    batch = tiny_batch()
    logits = {}
    for name, options in METHODS.items():
        everybody = {"eata": {"e_margin": 9.0, "d_margin": 9.0}, "sar": {"e_margin": 9.0}}
        adapted = fasttta.adapt(tiny_model(), name, **{**options, **everybody.get(name, {})})
        first = adapted.step(*batch)
        assert first.logits.shape == (5, 7)
        logits[name] = adapted.predict(*batch)
        if name != "brimpr":  # fresh prompts already change the prediction
            assert torch.allclose(first.logits_before, tiny_model()(*batch), atol=1e-6)
        if name == "source":
            assert adapted.tuned == {}
            assert torch.equal(first.logits, first.logits_before)
            assert int(first.n_used) == 0
            continue
        for _ in range(30):
            last = adapted.step(*batch)
        if name in ("tent", "eata", "sar"):  # EATA's loss weighs samples anew at each step
            entropies = [F.entropy(r.logits_before).mean() for r in (first, last)]
            assert entropies[1] < entropies[0]
        else:
            assert last.losses["total"] < first.losses["total"]
        assert int(first.n_used) == 5
        assert first.n_used.dtype == torch.int64
    outputs = list(logits.values())
    assert all(not torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])


def test_losses_are_unweighted(tiny_model, tiny_batch):
    options = {"k": 3, "window": 1}
    a = fasttta.adapt(tiny_model(), "abpem", **options).step(*tiny_batch())
    b = fasttta.adapt(
        tiny_model(), "abpem", **options, entropy_weight=2.0, balance_weight=0.5,
        attention_weight=3.0,
    ).step(*tiny_batch())  # fmt: skip
    for name in ("entropy", "balance", "attention"):
        assert torch.equal(a.losses[name], b.losses[name])
    for result, weights in ((a, (1, 1, 1)), (b, (2.0, 0.5, 3.0))):
        e, bal, att = (result.losses[n] for n in ("entropy", "balance", "attention"))
        total = weights[0] * e - weights[1] * bal + weights[2] * att
        assert torch.allclose(result.losses["total"], total)


def test_window_holds_past_batches(tiny_model, tiny_batch):
    """The loss of a window of 3 is the loss of the last three batches together."""
    sizes = (5, 2, 4, 3)
    adapted = fasttta.adapt(tiny_model(), "abpem", k=3, window=3, lr=1e-12)
    joined = fasttta.adapt(tiny_model(), "abpem", k=3, window=1)
    batches = [tiny_batch(n, seed=n) for n in sizes]
    for i, batch in enumerate(batches):
        result = adapted.step(*batch)
        window = batches[max(0, i - 2) : i + 1]
        joined.reset()
        expected = joined.step(*(torch.cat(parts) for parts in zip(*window, strict=True)))
        assert int(result.n_used) == sum(len(b[0]) for b in window)
        for name in expected.losses:
            assert torch.allclose(result.losses[name], expected.losses[name], atol=1e-5), name
        for name in expected.stats:
            assert torch.allclose(result.stats[name], expected.stats[name], atol=1e-5), name
        last = expected.logits_before[-sizes[i] :]
        assert torch.allclose(result.logits_before, last, atol=1e-5)
        assert result.logits.shape == result.logits_before.shape == (sizes[i], 7)


def test_no_update_when_nothing_weighs(tiny_model, tiny_batch):
    adapted = fasttta.adapt(
        tiny_model(), "abpem", k=3, entropy_weight=0.0, balance_weight=0.0, attention_weight=0.0
    )
    before = adapted.tuned
    result = adapted.step(*tiny_batch())
    assert int(result.n_used) == 0
    assert all(torch.equal(x, before[name]) for name, x in adapted.tuned.items())


def test_steps_and_score_at(tiny_model, tiny_batch, method):
    options = METHODS[method]
    batch = tiny_batch()
    once = fasttta.adapt(tiny_model(), method, **options)
    twice = fasttta.adapt(tiny_model(), method, **options, steps=2)
    first, second = once.step(*batch), twice.step(*batch)
    # losses of the first inner step
    assert all(torch.equal(x, second.losses[name]) for name, x in first.losses.items())
    changed = not all(torch.equal(x, twice.tuned[name]) for name, x in once.tuned.items())
    assert changed == (method != "source")
    for where in ("before", "after"):
        adapted = fasttta.adapt(tiny_model(), method, **options, score_at=where)
        result = adapted.step(*batch)
        expected = result.logits_before if where == "before" else adapted.predict(*batch)
        assert torch.equal(result.logits, expected)


def test_trace(tiny_model, tiny_batch, method):
    adapted = fasttta.adapt(tiny_model(), method, **METHODS[method])
    before = adapted.tuned
    plain = fasttta.adapt(tiny_model(), method, **METHODS[method]).step(*tiny_batch())
    result = adapted.step(*tiny_batch(), trace=True)
    assert plain.grads is None
    assert plain.trace is None
    assert same(plain, result)
    assert result.grads.keys() == adapted.tuned.keys()
    if method == "sar":
        return  # its first step may have had nothing to use in the second pass
    for name, grad in result.grads.items():
        assert grad.shape == before[name].shape
        # Adam's first step goes lr against the sign of the gradient
        moved = adapted.tuned[name] - before[name]
        clear = grad.abs() > 1e-5
        assert torch.allclose(moved[clear], -1e-3 * grad[clear].sign(), atol=2e-6)
    if method == "abpem":
        assert result.trace["tokens"].shape == (5, 10, 12)


def test_gradients_are_those_of_plain_autograd(tiny_model, tiny_batch):
    """READ's and ABPEM's tuned gradients against the losses written out on the model itself."""
    batch = tiny_batch(dtype=torch.float64)
    model = tiny_model().double()
    logits = model(*batch)
    p = logits.softmax(-1)
    top = p.max(-1).values
    w = p.sum(0).softmax(0)
    loss = -(top * top.log()).mean() + (w * w.log()).sum()
    qkv = model.blocks_u[0].attn.qkv
    expected = torch.autograd.grad(loss, (qkv.weight, qkv.bias))
    result = fasttta.adapt(model, "read").step(*batch, trace=True)
    for part, grad in zip(("weight", "bias"), expected, strict=True):
        gradients = [result.grads[f"blocks_u.0.attn.{w}.{part}"] for w in "qkv"]
        assert torch.allclose(torch.cat(gradients), grad, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"pair": "query", "window": 1}, {"heads": "each"}, {"balance": "softmax-sum"},
        {"heads": "each", "pair": "query", "anchor": "source"}, {"anchor": "source"},
        {"entropy_weight": 0.3, "balance_weight": 2.0, "attention_weight": 7.0, "window": 2},
    ],
    ids=str,
)  # fmt: skip
def test_abpem_is_its_formula(tiny_model, tiny_batch, options):
    """Losses, statistics and gradients over the window, written out."""
    model = tiny_model().double()
    options = {"k": 2, "window": 3, "lr": 1e-15, **options}
    resources, anchors = {}, None
    if options.get("anchor") == "source":
        clean = [tiny_batch(seed=s, dtype=torch.float64) for s in (50, 51)]
        resources["source_stats"] = fasttta.collect_stats(model, clean, n=10)
        anchors = resources["source_stats"].self_scores(options.get("heads", "mean"))  # std, mean
    adapted = fasttta.adapt(model, "abpem", **options, **resources)
    batches = [tiny_batch(n, seed=n, dtype=torch.float64) for n in (5, 3, 4, 2)]
    qkv = model.blocks_u[0].attn.qkv
    for i in range(len(batches)):
        window = batches[max(0, i + 1 - options["window"]) : i + 1]
        p, gaps, means, stds = [], [], [], []
        for batch in window:
            logits, (q, k, scale) = model.fuse_attention(model.encode(*batch))
            p.append(logits.softmax(-1))
            scores = scale * q @ k.transpose(-1, -2)  # [B, H, T, T]
            if options.get("heads", "mean") == "mean":
                scores = scores.mean(1, keepdim=True)
            parts = slice(0, 6), slice(6, 10)
            blocks = [[scores[:, :, a, b].flatten(2) for b in parts] for a in parts]
            gap = 0
            for a, b in ((0, 1), (1, 0)):  # query, key modality
                matched = b if options.get("pair", "key") == "key" else a
                block = blocks[matched][matched].detach()
                mean, std = block.mean(-1), block.std(-1)
                if anchors is not None:
                    std, mean = (x[..., matched] for x in anchors)
                m, s = blocks[a][b].mean(-1), blocks[a][b].std(-1)
                gap = gap + (std / s).log() + (s**2 + (m - mean) ** 2) / (2 * std**2) - 0.5
            gaps.append(gap.mean(1))
            for out, moment in ((means, torch.mean), (stds, torch.std)):
                rows = [torch.stack([moment(x, -1) for x in row], -1) for row in blocks]
                out.append(torch.stack(rows, -2))
        p, gap = torch.cat(p), torch.cat(gaps)
        top = p.sort(descending=True).values[:, :2]
        entropy = -(top * (top + 1e-6).log()).sum(-1).mean()
        m = p.sum(0).softmax(0) if options.get("balance") == "softmax-sum" else p.mean(0)
        losses = {"entropy": entropy, "balance": -(m * m.log()).sum(), "attention": gap.mean()}
        weights = [options.get(f"{name}_weight", 1.0) for name in losses]
        losses["total"] = weights[0] * entropy - weights[1] * losses["balance"]
        losses["total"] = losses["total"] + weights[2] * losses["attention"]
        result = adapted.step(*batches[i], trace=True)
        assert int(result.n_used) == len(p)
        for name, value in losses.items():
            assert torch.allclose(result.losses[name], value, rtol=1e-9, atol=1e-11), name
        stats = {"attention_gap": gap, "score_mean": torch.cat(means), "score_std": torch.cat(stds)}
        for name, value in stats.items():
            value = value.reshape(result.stats[name].shape)
            assert torch.allclose(result.stats[name], value, rtol=1e-9, atol=1e-11), name
        grads = torch.autograd.grad(losses["total"], (qkv.weight, qkv.bias))
        for part, grad in zip(("weight", "bias"), grads, strict=True):
            gradient = torch.cat([result.grads[f"blocks_u.0.attn.{w}.{part}"] for w in "qkv"])
            assert torch.allclose(gradient, grad, rtol=1e-7, atol=1e-9), part


def test_single_sample(tiny_model, tiny_batch):
    for method in ("read", "abpem"):
        adapted = fasttta.adapt(tiny_model(), method, **METHODS[method])
        with pytest.warns(UserWarning, match="single sample"):
            result = adapted.step(*tiny_batch(1))
        assert result.logits.shape == (1, 7)
        assert torch.isfinite(result.losses["total"])
        # of one sample: the balance term is its entropy (of softmax(p) in READ's form)
        p = result.logits_before.softmax(-1)
        q = p if method == "abpem" else p.softmax(-1)
        assert torch.allclose(result.losses["balance"], -(q * q.log()).sum(), atol=1e-6)
        adapted.step(*tiny_batch(1))  # warns once
    fasttta.adapt(tiny_model(), "tent").step(*tiny_batch(1))
    fasttta.adapt(tiny_model(), "abpem", k=3, balance_weight=0.0).step(*tiny_batch(1))


def test_the_users_hooks_stay_with_the_user(tiny_model, tiny_batch):
    model, calls = tiny_model(), []
    model.mlp_head.register_forward_hook(lambda *_: calls.append(1))
    adapted = fasttta.adapt(model, "read")
    adapted.step(*tiny_batch())
    assert calls == [1]  # the comparison with the user's own forward, on the first batch only
    adapted.step(*tiny_batch())
    assert calls == [1]
    model(*tiny_batch())
    assert calls == [1, 1]


def test_warnings_point_at_the_caller(tiny_model, tiny_batch):
    for call in (
        lambda a: a(*tiny_batch(1)),
        lambda a: a.step(*tiny_batch(1)),
        lambda a: list(a.stream([tiny_batch(1)])),
    ):
        with pytest.warns(UserWarning, match="single sample") as caught:
            call(fasttta.adapt(tiny_model(), "read"))
        assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("method", "options", "advice"),
    [
        ("read", {}, "Give larger batches$"),  # it has no window
        ("abpem", {"k": 3}, "Give larger batches$"),
        ("abpem", {"k": 3, "window": 1}, "Give larger batches, or a window of past batches$"),
    ],
)
def test_single_samples_are_told_what_helps(method, options, advice, tiny_model, tiny_batch):
    with pytest.warns(UserWarning, match=advice):
        fasttta.adapt(tiny_model(), method, **options).step(*tiny_batch(1))


def test_results_are_printed_in_short(tiny_model, tiny_batch):
    result = fasttta.adapt(tiny_model(), "abpem", k=3).step(*tiny_batch(), trace=True)
    text = repr(result)
    assert text.startswith(f"StepResult(logits=Tensor{list(result.logits.shape)}, logits_before=")
    assert f"n_used={int(result.n_used)}, " in text
    assert f"total: {result.losses['total'].item():.4g}" in text
    for name in (*result.losses, *result.stats, *result.grads, *result.trace):
        assert f"{name}: " in text
    assert len(repr(fasttta.adapt(tiny_model(), "tent").step(*tiny_batch()))) < 300


def test_keywords_that_are_none_are_refused_by_name(tiny_model, tiny_batch):
    adapted = fasttta.adapt(tiny_model(), "tent")
    batch = tiny_batch()
    before = {name: x.clone() for name, x in adapted.tuned.items()}
    with pytest.raises(TypeError, match="kept: .*order audio, video; keywords: trace, keep"):
        adapted.step(*batch, kept=1)
    for call in (adapted, adapted.forward, adapted.predict):
        with pytest.raises(TypeError, match="pixel_values: .*in the order audio, video"):
            call(pixel_values=batch[1])
    assert all(torch.equal(x, before[name]) for name, x in adapted.tuned.items())
