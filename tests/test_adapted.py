"""Adapted: the state it carries, saves and gives back, and what it never touches."""

from __future__ import annotations

import contextlib
import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file

import fasttta
from fasttta import functional as F
from fasttta import methods
from fasttta.engine.precision import _float32_products

METHODS = {
    "source": {},
    "tent": {"lr": 1e-3},
    # margins that some of the tiny model's samples are above and some below
    "eata": {"lr": 1e-3, "e_margin": 1.9, "d_margin": 0.999},
    "sar": {"lr": 1e-3, "e_margin": 1.9, "rho": 0.01},
    "read": {"lr": 1e-3},
    "abpem": {"k": 3, "window": 3, "lr": 1e-3},
}


def _flat(result):
    yield result.logits
    yield result.logits_before
    yield result.n_used
    for group in (result.losses, result.stats):
        for name in sorted(group):
            yield group[name]


def _same(a, b):
    """Bit for bit, nan equal to nan."""
    exact = {"rtol": 0, "atol": 0, "equal_nan": True}
    return all(torch.allclose(x, y, **exact) for x, y in zip(_flat(a), _flat(b), strict=True))


def _state_equal(a, b):
    x, y = a._state.tensors(), b._state.tensors()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


def test_names_and_auto(tiny_model):
    assert methods.names() == list(METHODS)
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
        assert {"steps", "score_at", "lr"} <= set(cls.option_names())
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


def test_methods_differ_and_learn(tiny_model, tiny_batch):
    batch = tiny_batch()
    logits = {}
    for name, options in METHODS.items():
        everybody = {"eata": {"e_margin": 9.0, "d_margin": 9.0}, "sar": {"e_margin": 9.0}}
        adapted = fasttta.adapt(tiny_model(), name, **{**options, **everybody.get(name, {})})
        first = adapted.step(*batch)
        assert first.logits.shape == (5, 7)
        logits[name] = adapted.predict(*batch)
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
    found = list(logits.values())
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])


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
    assert _same(plain, result)
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
        found = [result.grads[f"blocks_u.0.attn.{w}.{part}"] for w in "qkv"]
        assert torch.allclose(torch.cat(found), grad, atol=1e-12)


def test_reset_is_bitwise(tiny_model, tiny_batch, method):
    adapted = fasttta.adapt(tiny_model(), method, **METHODS[method], seed=3)
    fresh = fasttta.adapt(tiny_model(), method, **METHODS[method], seed=3)
    first = [adapted.step(*tiny_batch(seed=s)) for s in range(3)]
    assert method == "source" or not _state_equal(adapted, fresh)
    adapted.reset()
    assert _state_equal(adapted, fresh)
    again = [adapted.step(*tiny_batch(seed=s)) for s in range(3)]
    assert all(_same(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "fp64", "bf16"])
def test_save_and_load_are_bitwise(tiny_model, tiny_batch, tmp_path, method, precision):
    model = tiny_model()
    adapted = fasttta.adapt(model, method, **METHODS[method], precision=precision, seed=5)
    for s in range(3):
        adapted.step(*tiny_batch(seed=s))
    adapted.save(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 2
    assert names[0] == "fasttta.json"
    again = fasttta.load(model, tmp_path)
    assert (again.method, again.options, again.precision, again.seed) == (
        method, adapted.options, precision, 5,
    )  # fmt: skip
    assert _state_equal(adapted, again)
    for s in range(3, 6):
        assert _same(adapted.step(*tiny_batch(seed=s)), again.step(*tiny_batch(seed=s)))
    again.save(tmp_path)  # over the earlier one
    assert len(list(tmp_path.iterdir())) == 2
    assert _state_equal(again, fasttta.load(model, tmp_path))
    again.reset()
    assert _state_equal(
        again, fasttta.adapt(model, method, **METHODS[method], precision=precision, seed=5)
    )


def test_saved_state_is_a_delta(tiny_model, tiny_batch, tmp_path):
    adapted = fasttta.adapt(tiny_model(), "read")
    adapted(*tiny_batch())
    adapted.save(tmp_path)
    record = json.loads((tmp_path / "fasttta.json").read_text())
    tensors = load_file(tmp_path / record["state"])
    tuned = 3 * (12 * 12 + 12)
    values = sum(x.numel() for name, x in tensors.items() if name != "random")
    assert values == 3 * tuned + 2  # tuned, two moments each, a step count a parameter


def test_damaged_saves(tiny_model, tiny_batch, tmp_path):
    model = tiny_model()
    adapted = fasttta.adapt(model, "read")
    adapted(*tiny_batch())
    with pytest.raises(FileNotFoundError, match="no saved state"):
        fasttta.load(model, tmp_path)
    adapted.save(tmp_path)
    with pytest.raises(ValueError, match="another model.*blocks_u.0.attn.qkv"):
        fasttta.load(tiny_model(seed=9), tmp_path)
    with pytest.raises(ValueError, match="another model"):
        fasttta.load(tiny_model(depth=(1, 1, 1)), tmp_path)
    record = tmp_path / "fasttta.json"
    state = tmp_path / json.loads(record.read_text())["state"]
    good = state.read_bytes()
    state.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(ValueError, match="checksum"):
        fasttta.load(model, tmp_path)
    state.unlink()
    with pytest.raises(FileNotFoundError, match="missing"):
        fasttta.load(model, tmp_path)
    text = record.read_text()
    for broken, match in (
        (text[:50], "damaged"),
        ("{}", "no record"),
        (text.replace('"format": 1', '"format": 99'), "format 99"),
    ):  # fmt: skip
        record.write_text(broken)
        with pytest.raises(ValueError, match=match):
            fasttta.load(model, tmp_path)


def test_interrupted_save_keeps_the_earlier_one(tiny_model, tiny_batch, tmp_path, monkeypatch):
    model = tiny_model()
    adapted = fasttta.adapt(model, "read", lr=1e-3)
    adapted(*tiny_batch())
    adapted.save(tmp_path)
    saved = fasttta.load(model, tmp_path).tuned
    adapted(*tiny_batch(seed=2))
    from fasttta.engine import delta

    replace, calls = delta.os.replace, []

    def interrupted(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(delta.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        adapted.save(tmp_path)
    found = fasttta.load(model, tmp_path).tuned
    assert all(torch.equal(x, saved[name]) for name, x in found.items())


def test_source_block(tiny_model, tiny_batch, method):
    model = tiny_model()
    adapted = fasttta.adapt(model, method, **METHODS[method])
    for s in range(2):
        adapted(*tiny_batch(seed=s))
    batch = tiny_batch(seed=7)
    expected, now, state = model(*batch), adapted.predict(*batch), adapted._state.tensors()
    with adapted.source() as inner:
        assert inner is adapted
        for logits in (adapted(*batch), adapted.predict(*batch), adapted.step(*batch).logits):
            assert torch.equal(logits, expected)
        with adapted.source():
            assert torch.equal(adapted(*batch), expected)
        assert torch.equal(adapted(*batch), expected)
        assert int(adapted.step(*batch).n_used) == 0
        assert [torch.equal(r.logits, expected) for r in adapted.stream([batch])] == [True]
    assert all(torch.equal(x, state[name]) for name, x in adapted._state.tensors().items())
    assert torch.equal(adapted.predict(*batch), now)
    with pytest.raises(KeyError, match="inside"), adapted.source():
        raise KeyError("inside")
    assert torch.equal(adapted.predict(*batch), now)


def test_unwrap_merge(tiny_model, tiny_batch, method):
    model = tiny_model()
    adapted = fasttta.adapt(model, method, **METHODS[method])
    adapted(*tiny_batch())
    merged = adapted.unwrap(merge=True)
    batch = tiny_batch(seed=3)
    assert torch.equal(merged(*batch), adapted.predict(*batch))
    assert type(merged) is type(model)
    assert (merged.state_dict().keys()) == model.state_dict().keys()
    adapted(*batch)
    assert not any(
        merged.get_parameter(s.parameter).data_ptr() == leaf.data_ptr()
        for s in adapted._state.slots.values()
        for leaf in adapted._state.leaves.values()
    )


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_contexts_make_no_difference(tiny_model, tiny_batch, tmp_path, method, context):
    outside = fasttta.adapt(tiny_model(), method, **METHODS[method])
    expected = [outside.step(*tiny_batch(seed=s)) for s in range(3)]
    with context():
        adapted = fasttta.adapt(tiny_model(), method, **METHODS[method])
        found = [adapted.step(*tiny_batch(seed=s)) for s in range(3)]
        adapted.save(tmp_path)
        adapted.reset()
        adapted.load_tuned(outside.tuned)
        loaded = fasttta.load(tiny_model(), tmp_path)
    assert all(_same(a, b) for a, b in zip(expected, found, strict=True))
    assert _state_equal(loaded, outside)
    assert _same(loaded.step(*tiny_batch(seed=4)), outside.step(*tiny_batch(seed=4)))


def test_autocast_makes_no_difference(tiny_model, tiny_batch):
    outside = fasttta.adapt(tiny_model(), "abpem", **METHODS["abpem"]).step(*tiny_batch())
    adapted = fasttta.adapt(tiny_model(), "abpem", **METHODS["abpem"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert _same(adapted.step(*tiny_batch()), outside)


def test_results_are_fresh_tensors(tiny_model, tiny_batch, method):
    adapted = fasttta.adapt(tiny_model(), method, **METHODS[method])
    kept = [adapted.step(*tiny_batch(seed=s), trace=True) for s in range(2)]
    copies = [[x.clone() for x in _flat(r)] for r in kept]
    for s in range(2, 5):
        for x in _flat(adapted.step(*tiny_batch(seed=s))):
            assert not x.requires_grad
            assert not x.is_inference()
            x.zero_()
    fresh = fasttta.adapt(tiny_model(), method, **METHODS[method])
    for s in range(5):
        fresh.step(*tiny_batch(seed=s))
    assert _state_equal(adapted, fresh)  # writing into results changes nothing
    for result, values in zip(kept, copies, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(_flat(result), values, strict=True))


def test_tuned_and_load_tuned(tiny_model, tiny_batch):
    adapted = fasttta.adapt(tiny_model(), "read", lr=1e-3)
    start = adapted.tuned
    assert list(start) == [
        f"blocks_u.0.attn.{w}.{part}" for part in ("weight", "bias") for w in "qkv"
    ]
    source = tiny_model().state_dict()["blocks_u.0.attn.qkv.weight"]
    assert torch.equal(start["blocks_u.0.attn.k.weight"], source[12:24])
    start["blocks_u.0.attn.q.weight"].zero_()  # a copy
    assert adapted.tuned["blocks_u.0.attn.q.weight"].abs().sum() > 0
    adapted(*tiny_batch())
    moved, logits = adapted.tuned, adapted.predict(*tiny_batch())
    other = fasttta.adapt(tiny_model(), "read")
    other.load_tuned({k: v.double() for k, v in moved.items()})
    assert torch.equal(other.predict(*tiny_batch()), logits)
    some = {"blocks_u.0.attn.v.bias": torch.ones(12)}
    other.load_tuned(some)
    assert torch.equal(other.tuned["blocks_u.0.attn.v.bias"], torch.ones(12))
    assert torch.equal(other.tuned["blocks_u.0.attn.k.bias"], moved["blocks_u.0.attn.k.bias"])
    before = other.tuned
    good = {"blocks_u.0.attn.v.bias": torch.zeros(12)}
    for bad, error, match in (
        ({**good, "blocks_u.0.attn.q.bias": torch.ones(12, device="meta")}, ValueError, "on meta"),
        (
            {**good, "blocks_u.0.attn.q.bias": torch.full((12,), 1e300, dtype=torch.float64)},
            ValueError,
            "non-f",
        ),
        ({**good, "nothing": torch.ones(3)}, ValueError, "'nothing' is not tuned; tuned: blocks_u"),
        ({**good, "blocks_u.0.attn.q.bias": torch.ones(3)}, ValueError, r"\(3,\), needed \(12,\)"),
        ({**good, "blocks_u.0.attn.q.bias": torch.ones(12).int()}, TypeError, "floating point"),
        (
            {**good, "blocks_u.0.attn.q.bias": torch.full((12,), torch.nan)},
            ValueError,
            "non-finite",
        ),
    ):
        with pytest.raises(error, match=match):
            other.load_tuned(bad)
        assert all(torch.equal(x, before[name]) for name, x in other.tuned.items())


@pytest.mark.filterwarnings("ignore:.*single sample")
def test_stream(tiny_model, tiny_batch, method):
    batches = [tiny_batch(n, seed=i) for i, n in enumerate((5, 5, 3, 1, 4))]
    a, b = (fasttta.adapt(tiny_model(), method, **METHODS[method]) for _ in range(2))
    expected = [a.step(*batch) for batch in batches]
    assert all(_same(x, y) for x, y in zip(expected, b.stream(batches), strict=True))
    for size in (1, 4, 6, 100):
        b.reset()
        found = list(b.stream(iter(batches), encode_batch=size))
        assert len(found) == len(batches)
        for x, y in zip(expected, found, strict=True):
            assert torch.allclose(x.logits, y.logits, atol=1e-5)
    with pytest.raises(ValueError, match="encode_batch=0"):
        b.stream(batches, encode_batch=0)


def test_stream_adapts_batch_by_batch(tiny_model, tiny_batch):
    """A stream that ends early has adapted only on what it gave out."""
    batches = [tiny_batch(5, seed=i) for i in range(4)]
    a, b = (fasttta.adapt(tiny_model(), "read", lr=1e-3) for _ in range(2))
    results = a.stream(batches, encode_batch=10)
    next(results)
    results.close()
    b.step(*batches[0])
    for name, x in a.tuned.items():
        assert torch.allclose(x, b.tuned[name], atol=1e-6)
    with pytest.raises(TypeError, match="needed 2 inputs"):
        list(a.stream([(*batches[0], torch.zeros(5))]))


def test_precisions(tiny_model, tiny_batch):
    reference = fasttta.adapt(tiny_model(), "abpem", k=3, precision="fp64").step(*tiny_batch())
    for precision, dtype, tolerance in (
        ("fp64", torch.float64, 1e-12), ("fp32", torch.float32, 1e-5),
        ("bf16", torch.float32, 0.1), ("auto", torch.float32, 0.1),
    ):  # fmt: skip
        adapted = fasttta.adapt(tiny_model(), "abpem", k=3, precision=precision)
        result = adapted.step(*tiny_batch())
        assert all(x.dtype == dtype for x in adapted.tuned.values())
        assert result.logits.dtype == dtype
        error = (result.logits_before.double() - reference.logits_before).abs().max()
        assert error < tolerance, precision
        assert precision != "bf16" or error > 1e-6  # it does compute in bf16
    assert fasttta.adapt(tiny_model().double(), k=3).precision == "fp64"
    half = tiny_model().bfloat16()
    assert fasttta.adapt(half, k=3, precision="fp32").tuned["blocks_u.0.attn.q.bias"].dtype == (
        torch.float32
    )
    before = half.state_dict()
    assert all(x.dtype == torch.bfloat16 for x in before.values())


def test_half_inputs_are_widened(tiny_model, tiny_batch):
    audio, video = (x.half() for x in tiny_batch())
    a = fasttta.adapt(tiny_model(), "read").step(audio, video)
    b = fasttta.adapt(tiny_model(), "read").step(audio.float(), video.double())
    assert _same(a, b)


def test_moving_is_refused(tiny_model):
    adapted = fasttta.adapt(tiny_model(), "read")
    assert adapted.to("cpu") is adapted
    assert adapted.float() is adapted
    for move in (adapted.double, lambda: adapted.to("meta"), adapted.half):
        with pytest.raises(RuntimeError, match="move or convert the model first"):
            move()
    assert "tuned=468 values" in repr(adapted)


def test_failure_after_the_update_rolls_back(tiny_model, tiny_batch, monkeypatch):
    """A step whose second forward dies leaves the state as it was."""
    adapted = fasttta.adapt(tiny_model(), "abpem", **METHODS["abpem"])
    adapted(*tiny_batch())
    before = adapted._state.tensors()

    def dies(self, model, features):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(methods.ABPEM, "logits", dies)
    with pytest.raises(RuntimeError, match="out of memory"):
        adapted.step(*tiny_batch(seed=2))
    monkeypatch.undo()
    after = adapted._state.tensors()
    assert before.keys() == after.keys()
    assert all(torch.equal(x, after[name]) for name, x in before.items())


def test_device_side_skip(tiny_model, tiny_batch, method):
    """The path a GPU takes, run here: a bad batch changes nothing, now and in later windows."""

    def make():
        adapted = fasttta.adapt(tiny_model(), method, **METHODS[method])
        adapted._step.host_checks = False
        return adapted

    a, b = make(), make()
    bad = tiny_batch(seed=9)
    bad[0][2, 1, 3] = torch.nan
    a.step(*tiny_batch(seed=0))
    b.step(*tiny_batch(seed=0))
    result = a.step(*bad)
    assert int(result.n_used) == 0
    assert torch.isnan(result.logits).all()
    for name, x in a.tuned.items():
        assert torch.equal(x, b.tuned[name])
    if method == "abpem":  # the bad batch takes a place in the window but no part in the loss
        only = fasttta.adapt(tiny_model(), method, **{**METHODS[method], "window": 2})
        only._step.host_checks = False
        only.load_tuned(b.tuned)
        only._state.method = dict(b._state.method)
        next_one = a.step(*tiny_batch(seed=1))
        expected = only.step(*tiny_batch(seed=1))
        assert int(next_one.n_used) == 10
        for name, x in expected.losses.items():
            assert torch.allclose(x, next_one.losses[name], atol=1e-6), name
    elif method != "source":
        assert _same(a.step(*tiny_batch(seed=1)), b.step(*tiny_batch(seed=1)))
    host = fasttta.adapt(tiny_model(), method, **METHODS[method])
    device = make()
    for s in range(3):
        assert _same(host.step(*tiny_batch(seed=s)), device.step(*tiny_batch(seed=s)))


def test_non_finite_loss_skips(tiny_model, tiny_batch):
    """Finite input, overflowing logits: the update is skipped and says so."""
    model = tiny_model()
    with torch.no_grad():
        model.mlp_head[1].weight.fill_(3e38)
    adapted = fasttta.adapt(model, "tent")
    before = adapted._state.tensors()
    with pytest.warns(RuntimeWarning, match="not finite"):
        result = adapted.step(*tiny_batch())
    assert int(result.n_used) == 0
    assert all(torch.equal(x, before[name]) for name, x in adapted._state.tensors().items())


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


def test_several_fusion_blocks(tiny_model, tiny_batch):
    adapted = fasttta.adapt(tiny_model(depth=(1, 1, 2)), "abpem", k=3)
    result = adapted.step(*tiny_batch(), trace=True)
    assert len(adapted.tuned) == 12
    assert all(g.abs().sum() > 0 for n, g in result.grads.items() if "v." in n)


def test_float32_products_are_set_and_given_back():
    """The switches that decide TF32 on CUDA; they can be turned on any build."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [s.fp32_precision for s in switches]
    try:
        for outside in ("tf32", "ieee"):
            for s in switches:
                s.fp32_precision = outside
            for mode in ("ieee", "tf32"):
                with contextlib.suppress(KeyError), _float32_products(torch.device("cuda"), mode):
                    assert {s.fp32_precision for s in switches} == {mode}
                    raise KeyError
                assert {s.fp32_precision for s in switches} == {outside}
    finally:
        for s, value in zip(switches, before, strict=True):
            s.fp32_precision = value


def test_deepcopy_is_independent(tiny_model, tiny_batch):
    adapted = fasttta.adapt(tiny_model(), "read", lr=1e-3)
    adapted(*tiny_batch())
    twin = copy.deepcopy(adapted)
    state = adapted._state.tensors()
    assert _same(twin.step(*tiny_batch(seed=2)), twin_expected := copy.deepcopy(adapted).step(
        *tiny_batch(seed=2)
    ))  # fmt: skip
    assert all(torch.equal(x, state[name]) for name, x in adapted._state.tensors().items())
    assert _same(adapted.step(*tiny_batch(seed=2)), twin_expected)


@pytest.mark.parametrize("host_checks", [True, False])
def test_overflowing_batch_does_not_stay_in_the_window(tiny_model, tiny_batch, host_checks):
    """Finite input whose tokens or logits overflow: skipped now, without weight later."""
    for scale in (3e38, 1e30):
        adapted = fasttta.adapt(tiny_model(), "abpem", k=3, window=3)
        adapted._step.host_checks = host_checks
        adapted.step(*tiny_batch(seed=0))
        audio, video = tiny_batch(seed=1)
        audio[2] = scale
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            bad = adapted.step(audio, video)
        if torch.isfinite(bad.logits_before).all():
            continue  # LayerNorm took it
        assert int(bad.n_used) == 0
        good = adapted.step(*tiny_batch(seed=2))
        assert int(good.n_used) == 10
        assert torch.isfinite(good.losses["total"])
        assert torch.isfinite(good.logits).all()


def test_overflow_in_the_cast_is_refused(tiny_model, tiny_batch):
    audio, video = tiny_batch(dtype=torch.float64)
    audio[0, 0, 0] = 1e300
    adapted = fasttta.adapt(tiny_model(), "read")
    with pytest.raises(ValueError, match="audio holds non-finite values .*in float32"):
        adapted.step(audio, video)
    fasttta.adapt(tiny_model(), "tent", precision="fp64").predict(audio, video)


@pytest.mark.parametrize("encode_batch", [None, 3, 100])
def test_what_came_before_a_failure_is_adapted_on(tiny_model, tiny_batch, encode_batch):
    def loader():
        yield tiny_batch(seed=0)
        yield tiny_batch(seed=1)
        raise OSError("disk gone")

    adapted = fasttta.adapt(tiny_model(), "read", lr=1e-3)
    alone = fasttta.adapt(tiny_model(), "read", lr=1e-3)
    found = []
    with pytest.raises(OSError, match="disk gone"):
        found.extend(adapted.stream(loader(), encode_batch))
    bad = (torch.full((5, 6, 8), torch.nan), tiny_batch()[1])
    with pytest.raises(ValueError, match="audio holds non-finite"):
        found.extend(adapted.stream([tiny_batch(seed=2), bad], encode_batch))
    for s in range(3):
        alone.step(*tiny_batch(seed=s))
    for name, x in adapted.tuned.items():
        assert torch.allclose(x, alone.tuned[name], atol=1e-6)


def test_everything_works_inside_inference_mode(tiny_model, tiny_batch):
    adapted = fasttta.adapt(tiny_model(), "read", lr=1e-3)
    with torch.inference_mode():
        batch = tiny_batch()
        adapted(*batch)
        merged, twin, tuned = adapted.unwrap(merge=True), copy.deepcopy(adapted), adapted.tuned
        with adapted.source():
            inside = adapted.step(*batch)
        assert torch.equal(merged(*batch), adapted.predict(*batch))
        assert _same(twin.step(*batch), adapted.step(*batch))
    tensors = [*tuned.values(), inside.logits, inside.logits_before, inside.n_used]
    assert not any(x.is_inference() for x in (*tensors, *merged.parameters()))


def test_the_users_hooks_stay_with_the_user(tiny_model, tiny_batch):
    model, calls = tiny_model(), []
    model.mlp_head.register_forward_hook(lambda *_: calls.append(1))
    fasttta.adapt(model, "read").step(*tiny_batch())
    assert calls == []
    model(*tiny_batch())
    assert calls == [1]


def test_warnings_point_at_the_caller(tiny_model, tiny_batch):
    for call in (
        lambda a: a(*tiny_batch(1)),
        lambda a: a.step(*tiny_batch(1)),
        lambda a: list(a.stream([tiny_batch(1)])),
    ):
        with pytest.warns(UserWarning, match="single sample") as caught:
            call(fasttta.adapt(tiny_model(), "read"))
        assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="Give larger batches$"):
        fasttta.adapt(tiny_model(), "abpem", k=3).step(*tiny_batch(1))


def test_saving_leaves_other_files_alone(tiny_model, tiny_batch, tmp_path):
    other = tmp_path / "state-of-the-art.safetensors"
    other.write_bytes(b"mine")
    adapted = fasttta.adapt(tiny_model(), "read")
    for s in range(3):
        adapted(*tiny_batch(seed=s))
        adapted.save(tmp_path)
    assert other.read_bytes() == b"mine"
    assert len(list(tmp_path.iterdir())) == 3
    model = tiny_model()
    with torch.no_grad():
        model.blocks_v[0].mlp.fc1.weight.mul_(2)  # frozen, and not what READ tunes
    with pytest.raises(ValueError, match="another model.*its frozen weights differ"):
        fasttta.load(model, tmp_path)
