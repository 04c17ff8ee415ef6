"""Precisions, surrounding contexts, and values that are not finite."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from cases import METHODS, buffered, differing, same, snapshot, state_equal

import fasttta


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_contexts_make_no_difference(tiny_model, tiny_batch, tmp_path, method, context):
    outside = fasttta.adapt(tiny_model(), method, **METHODS[method])
    expected = [outside.step(*tiny_batch(seed=s)) for s in range(3)]
    with context():
        adapted = fasttta.adapt(tiny_model(), method, **METHODS[method])
        results = [adapted.step(*tiny_batch(seed=s)) for s in range(3)]
        adapted.save(tmp_path)
        adapted.reset()
        adapted.load_tuned(outside.tuned)
        loaded = fasttta.load(tiny_model(), tmp_path)
    assert all(same(a, b) for a, b in zip(expected, results, strict=True))
    assert state_equal(loaded, outside)
    assert same(loaded.step(*tiny_batch(seed=4)), outside.step(*tiny_batch(seed=4)))


def test_autocast_makes_no_difference(tiny_model, tiny_batch):
    outside = fasttta.adapt(tiny_model(), "abpem", **METHODS["abpem"]).step(*tiny_batch())
    adapted = fasttta.adapt(tiny_model(), "abpem", **METHODS["abpem"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(adapted.step(*tiny_batch()), outside)


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
    assert same(a, b)


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
        b._state.generator.set_state(a._state.generator.get_state())  # masks of the bad batch
        assert same(a.step(*tiny_batch(seed=1)), b.step(*tiny_batch(seed=1)))
    host = fasttta.adapt(tiny_model(), method, **METHODS[method])
    device = make()
    for s in range(3):
        assert same(host.step(*tiny_batch(seed=s)), device.step(*tiny_batch(seed=s)))


def test_non_finite_loss_skips(tiny_model, tiny_batch):
    """Finite input, overflowing logits: the update is skipped and says so."""
    model = tiny_model()
    with torch.no_grad():
        model.mlp_head[1].weight.fill_(3e38)
    adapted = fasttta.adapt(model, "tent")
    before = snapshot(adapted)
    with pytest.warns(RuntimeWarning, match="not finite"):
        result = adapted.step(*tiny_batch())
    assert int(result.n_used) == 0
    assert differing(before, adapted) == []


def _overflow_for_loud_samples(adapted, place):
    """Makes the fusion of batches that hold a loud sample overflow at one place."""
    working = adapted._hidden[1]
    plain = working.fuse_attention

    def fuse_attention(tokens):
        logits, attention = plain(tokens)
        loud = (tokens.detach().abs().amax((1, 2)) > 100).to(tokens.dtype)  # [B]
        if place == "logits":
            logits = logits * (1 + loud * 1e38)[:, None] * (1 + loud * 1e38)[:, None]
        if place == "scores":  # finite ones, whose squares are not
            attention = attention._replace(q=attention.q * (1 + loud * 1e30)[:, None, None, None])
        if place == "gradient":  # what is added is 0
            for _ in range(2):
                logits = logits + (loud * 1e38)[:, None] * (logits - logits.detach())
        return logits, attention

    working.fuse_attention = fuse_attention


@pytest.mark.parametrize("engine", ["eager", "device", "buffers"])
@pytest.mark.parametrize("place", ["tokens", "logits", "scores", "gradient"])
@pytest.mark.parametrize("position", [0, 3])
def test_overflowing_batch_does_not_stay_in_the_window(
    tiny_model, tiny_batch, engine, place, position
):
    """Finite input that overflows on the way: skipped now, without weight later."""

    def make(kind):
        adapted = fasttta.adapt(tiny_model(), "abpem", k=3, window=3, lr=1e-3)
        _overflow_for_loud_samples(adapted, place)
        for seed in range(position):
            adapted.step(*tiny_batch(seed=seed))
        adapted._step.host_checks = kind == "eager"
        return buffered(adapted) if kind == "buffers" else adapted

    adapted, expected = make(engine), make("eager")
    before = snapshot(adapted)
    audio, video = tiny_batch(seed=20)
    audio[2] = 3e38 if place == "tokens" else 1e4
    warned = pytest.warns(RuntimeWarning, match="not finite")
    with warned if engine == "eager" else contextlib.nullcontext():
        bad = adapted.step(audio, video)
    assert int(bad.n_used) == 0
    if place in ("tokens", "logits"):  # nothing that looks like a prediction
        assert not torch.isfinite(bad.logits_before[2]).any()
        assert not torch.isfinite(bad.logits[2]).any()
    if place != "gradient":
        assert not torch.isfinite(bad.losses["total"])
    changed = differing(before, adapted)
    assert [name for name in changed if name.startswith(("tuned.", "adam."))] == []
    state = snapshot(adapted)
    counts = [float(state[name]) for name in sorted(state) if name.startswith("method.valid.")]
    assert counts == [1.0] * min(position, 1) + [0.0]
    # The bad batch takes a place without weight, whatever stands there.
    queue = dict(expected._state.method)
    kept = [(queue[f"queue.{i}"], queue[f"valid.{i}"]) for i in range(min(position, 2))][-1:]
    kept.append((expected._step.encode(tiny_batch(seed=40)), torch.zeros(())))
    expected._state.method = {f"queue.{i}": tokens for i, (tokens, _) in enumerate(kept)} | {
        f"valid.{i}": counts for i, (_, counts) in enumerate(kept)
    }
    for seed, n_used in enumerate((10 if position else 5, 10, 15)):
        good, wanted = (each.step(*tiny_batch(seed=30 + seed)) for each in (adapted, expected))
        assert int(good.n_used) == int(wanted.n_used) == n_used
        for name, x in wanted.losses.items():
            assert torch.allclose(x, good.losses[name], rtol=1e-4, atol=1e-6), name
        assert torch.allclose(good.logits, wanted.logits, atol=1e-4)
    for name, x in expected.tuned.items():
        assert torch.allclose(x, adapted.tuned[name], atol=1e-5), name
    assert differing(before, adapted) != []


def test_overflow_in_the_cast_is_refused(tiny_model, tiny_batch):
    audio, video = tiny_batch(dtype=torch.float64)
    audio[0, 0, 0] = 1e300
    adapted = fasttta.adapt(tiny_model(), "read")
    with pytest.raises(ValueError, match="audio holds non-finite values .*float32"):
        adapted.step(audio, video)
    fasttta.adapt(tiny_model(), "tent", precision="fp64").predict(audio, video)


def test_everything_works_inside_inference_mode(tiny_model, tiny_batch):
    adapted = fasttta.adapt(tiny_model(), "read", lr=1e-3)
    with torch.inference_mode():
        batch = tiny_batch()
        adapted(*batch)
        merged, twin, tuned = adapted.unwrap(merge=True), copy.deepcopy(adapted), adapted.tuned
        with adapted.source():
            inside = adapted.step(*batch)
        assert torch.equal(merged(*batch), adapted.predict(*batch))
        assert same(twin.step(*batch), adapted.step(*batch))
    tensors = [*tuned.values(), inside.logits, inside.logits_before, inside.n_used]
    assert not any(x.is_inference() for x in (*tensors, *merged.parameters()))
