"""BriMPR's masks, odd batches, options and statistics."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as nnf
from cases import METHODS, differing, snapshot, state_equal, tiny_stats
from plain_brimpr import some_ids, stats_for, with_prompts

import fasttta
from fasttta.methods import brimpr_losses

NAMES = ("audio", "video")


def test_masks_are_drawn_from_the_state(tiny_model, tiny_batch, tmp_path):
    options = {**METHODS["brimpr"], "lr": 1e-12, "alignment_weight": 0.0, "contrast_weight": 0.0}
    adapted = fasttta.adapt(tiny_model(), "brimpr", **options, seed=2)
    with_prompts(adapted)
    first = [adapted.step(*tiny_batch()).losses["recombination"] for _ in range(3)]
    assert first[0] != first[1] != first[2]  # anew for each batch
    adapted.save(tmp_path)
    loaded = fasttta.load(tiny_model(), tmp_path)
    assert torch.equal(
        adapted.step(*tiny_batch()).losses["total"], loaded.step(*tiny_batch()).losses["total"]
    )
    adapted.reset()
    with_prompts(adapted)
    again = [adapted.step(*tiny_batch()).losses["recombination"] for _ in range(3)]
    assert first == again
    adapted.predict(*tiny_batch())  # draws nothing
    state = adapted._state.generator.get_state()
    adapted.step(*tiny_batch(), keep=[some_ids(5, 6, 3), some_ids(5, 4, 2)])
    assert torch.equal(adapted._state.generator.get_state(), state)


@pytest.mark.parametrize("seed", [0, 7])
def test_the_seed_is_that_of_the_masks(tiny_model, tiny_batch, seed):
    adapted = fasttta.adapt(tiny_model(), "brimpr", **METHODS["brimpr"], seed=seed)
    for _ in range(2):
        random = snapshot(adapted)["random"]
        assert torch.equal(random, torch.Generator().manual_seed(seed).get_state())
        adapted.step(*tiny_batch())
        assert not torch.equal(snapshot(adapted)["random"], random)
        adapted.reset()


def test_drawn_ids():
    method = fasttta.methods.BriMPR(mask_ratio=0.3)

    class Model:
        spans = (17, 10)

    generator = torch.Generator().manual_seed(0)
    ids = method.draw(Model, (torch.zeros(64, 1),), generator)
    for x, tokens, kept in zip(ids, Model.spans, (11, 7), strict=True):
        assert x.shape == (64, kept)  # int(17 * 0.7), int(10 * 0.7)
        assert x.dtype == torch.int64
        assert all(len(row.unique()) == kept for row in x)
        shares = x.flatten().bincount(minlength=tokens) / 64
        assert (shares - kept / tokens).abs().max() < 0.25  # all tokens alike; 4 sigma
        assert len(shares) == tokens
    assert not torch.equal(ids[0][0], ids[0][1])


def test_nothing_masked(tiny_model, tiny_batch):
    """A mask ratio of 0 is every token kept, in whatever order, for less work."""
    options = {**METHODS["brimpr"], "lr": 1e-3}
    a = fasttta.adapt(tiny_model().double(), "brimpr", **options, mask_ratio=0)
    b = fasttta.adapt(tiny_model().double(), "brimpr", **options)
    batch = tiny_batch(dtype=torch.float64)
    for _ in range(2):
        x, y = a.step(*batch), b.step(*batch, keep=[some_ids(5, 6, 6), some_ids(5, 4, 4)])
        for name in x.losses:
            assert torch.allclose(x.losses[name], y.losses[name], atol=1e-12), name
    for name, value in a.tuned.items():
        assert torch.allclose(value, b.tuned[name], atol=1e-9)


def test_bad_masks(tiny_model, tiny_batch):
    adapted = fasttta.adapt(tiny_model(), "brimpr", **METHODS["brimpr"])
    adapted.step(*tiny_batch())
    twin = fasttta.adapt(tiny_model(), "brimpr", **METHODS["brimpr"])
    twin.step(*tiny_batch())
    a, v = some_ids(5, 6, 3), some_ids(5, 4, 2)
    twice, high = a.clone(), v.clone()
    twice[2, 1], high[4, 0] = twice[2, 0], 4
    for keep, error, match in (
        (a, TypeError, "token ids of each modality"),
        ((a,), TypeError, r"token ids of each modality \(audio, video\)"),
        ((a.float(), v), TypeError, "keep of audio must be an integer tensor .* torch.float32"),
        ((a, None), TypeError, "keep of video must be an integer tensor .* NoneType"),
        ((a > 2, v), TypeError, "torch.bool"),
        ((a[:4], v), ValueError, r"keep of audio has shape \[4, 3\], needed \[5, K\] with K from"),
        ((a[:, :0], v), ValueError, "from 1 to 6"),
        ((a, some_ids(5, 5, 5)), ValueError, "from 1 to 4"),
        ((a[0], v), ValueError, r"shape \[3\]"),
        ((a, high), ValueError, "keep of video has ids from 0 to 4, needed 0 to 3"),
        ((a - 1, v), ValueError, "ids from -1"),
        ((twice, v), ValueError, "keep of audio has an id twice"),
    ):
        with pytest.raises(error, match=match):
            adapted.step(*tiny_batch(), keep=keep)
        assert state_equal(adapted, twin)
    result = adapted.step(*tiny_batch(), keep=(a.int(), v.to(torch.uint8)))
    assert torch.equal(result.logits, twin.step(*tiny_batch(), keep=(a, v)).logits)
    assert state_equal(adapted, twin)
    with pytest.raises(TypeError, match="READ masks no tokens"):
        fasttta.adapt(tiny_model(), "read").step(*tiny_batch(), keep=(a, v))


def test_a_failed_step_draws_nothing(tiny_model, tiny_batch, monkeypatch):
    adapted = fasttta.adapt(tiny_model(), "brimpr", **METHODS["brimpr"], score_at="after")
    adapted.step(*tiny_batch())
    before = snapshot(adapted)

    def dies(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(fasttta.methods.BriMPR, "logits", dies)
    with pytest.raises(RuntimeError, match="out of memory"):
        adapted.step(*tiny_batch())
    assert differing(before, adapted) == []


def test_single_sample(tiny_model, tiny_batch):
    adapted = fasttta.adapt(tiny_model(), "brimpr", **METHODS["brimpr"])
    with_prompts(adapted)
    before, stats = adapted.tuned, METHODS["brimpr"]["source_stats"]
    with pytest.warns(UserWarning, match="BriMPR on a single sample.*Give larger batches"):
        result = adapted.step(*tiny_batch(1), trace=True)
    adapted.step(*tiny_batch(1))  # warns once
    assert all(torch.isfinite(x) for x in (*result.losses.values(), *result.stats.values()))
    assert result.losses["contrast"] == 0
    expected = sum(
        (getattr(stats, n)[1] - result.trace[f"features.{n}"][0] + 1e-6).norm(dim=-1).mean()
        for n in NAMES
    )
    assert torch.allclose(result.losses["alignment"], expected)
    assert result.losses["recombination"] > 0
    assert not any(torch.equal(x, before[name]) for name, x in adapted.tuned.items())
    assert int(result.n_used) == 1


def test_equal_samples(tiny_model, tiny_batch):
    """Features without spread: the root of 0 has no gradient, and none is made up."""
    batch = tuple(x.expand(4, *x.shape[1:]) for x in tiny_batch(1))
    adapted = fasttta.adapt(tiny_model(), "brimpr", **METHODS["brimpr"], mask_ratio=0)
    result = adapted.step(*batch, trace=True)
    assert int(result.n_used) == 4
    assert all(torch.isfinite(x).all() for x in (*result.losses.values(), *result.grads.values()))
    assert torch.allclose(result.losses["contrast"], torch.tensor(4.0).log())


@pytest.mark.parametrize("count", [4, 2, 1])
def test_samples_that_do_not_count(count):
    """Losses with weights are those of the samples that have one, gradients too."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.zeros(6, dtype=torch.float64)
    weight[torch.tensor([4, 1, 5, 2][:count])] = 1

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    features, logits = draw(6, 3, 5), draw(6, 4)
    others, std, mean = [draw(6, 4), draw(6, 4)], draw(3, 5).abs(), draw(3, 5)
    share = [torch.tensor(0.3), torch.tensor(0.7)]
    some = weight > 0
    pairs = (
        (
            brimpr_losses.discrepancy(features, std, mean, weight),
            brimpr_losses.discrepancy(features[some], std, mean),
            [features],
        ),
        (
            brimpr_losses.contrast(others, 0.2, weight),
            brimpr_losses.contrast([x[some] for x in others], 0.2),
            others,
        ),
        (
            recombined(logits, torch.tensor(1.3), others, share, weight),
            recombined(logits[some], torch.tensor(1.3), [x[some] for x in others], share),
            others,
        ),
    )
    for value, expected, of in pairs:
        assert torch.allclose(value, expected, atol=1e-12)
        for a, b in zip(
            torch.autograd.grad(value.sum(), of), torch.autograd.grad(expected.sum(), of),
            strict=True,
        ):  # fmt: skip
            assert torch.allclose(a, b, atol=1e-12)


def recombined(logits, temperature, masked, shares, weight=None):
    """The term of a whole batch, in two portions."""
    target, n = brimpr_losses.teacher(logits, temperature), len(logits)
    return sum(
        brimpr_losses.recombination(target, x[rows], share, weight, rows)
        for x, share in zip(masked, shares, strict=True)
        for rows in (slice(0, 2), slice(2, n))
    )


def test_three_modalities():
    generator = torch.Generator().manual_seed(0)
    alone = [torch.randn(5, 7, generator=generator) for _ in range(3)]
    terms = [
        nnf.cross_entropy(nnf.normalize(a) @ nnf.normalize(b).T / 0.3, torch.arange(5))
        for a, b in itertools.permutations(alone, 2)
    ]
    assert torch.allclose(brimpr_losses.contrast(alone, 0.3), torch.stack(terms).mean())
    shares = brimpr_losses.shares([torch.tensor(x) for x in (1.0, 2.0, 5.0)])
    assert torch.allclose(torch.stack(shares), torch.tensor([7.0, 6.0, 3.0]) / 16)
    two = brimpr_losses.shares([torch.tensor(1.0), torch.tensor(3.0)])
    assert torch.allclose(torch.stack(two), torch.tensor([0.75, 0.25]))
    logits, masked = torch.randn(5, 4, generator=generator), [torch.zeros(5, 4)] * 3
    value = recombined(logits, torch.tensor(1.0), masked, shares)
    assert torch.allclose(value, torch.tensor(4.0).log())


def test_bf16_stays_close(tiny_model, tiny_batch):
    keep = [some_ids(5, 6, 3), some_ids(5, 4, 2)]
    results = {}
    for precision in ("fp32", "bf16"):
        adapted = fasttta.adapt(tiny_model(), "brimpr", **METHODS["brimpr"], precision=precision)
        with_prompts(adapted)
        results[precision] = adapted.step(*tiny_batch(), keep=keep)
        assert all(x.dtype == torch.float32 for x in adapted.tuned.values())
    error = (results["bf16"].logits - results["fp32"].logits).abs().max()
    assert 1e-6 < error < 0.1
    for name, x in results["fp32"].losses.items():
        assert torch.allclose(results["bf16"].losses[name], x, rtol=0.05, atol=0.05), name


def test_presets_and_options():
    default = fasttta.methods.BriMPR()
    assert default == fasttta.methods.BriMPR.preset("one-corrupted")
    assert fasttta.methods.BriMPR.preset("both-corrupted").temperature == 0.25
    assert default.score_at == "before"
    for options, match in (
        ({"prompts": 10}, "prompts=10: needed two integers"),
        ({"prompts": (10, 0)}, "prompts=0"),
        ({"prompts": (1, 2, 3)}, "two integers"),
        ({"mask_ratio": 1.0}, "mask_ratio=1.0: needed a finite number of at least 0 and below 1"),
        ({"mask_ratio": float("nan")}, "mask_ratio=nan"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"teacher_scale": -1.0}, "teacher_scale=-1.0"),
        ({"teacher_offset": "5"}, "teacher_offset='5'"),
        ({"contrast_weight": float("inf")}, "contrast_weight=inf"),
    ):
        with pytest.raises(ValueError, match=match):
            fasttta.methods.BriMPR(**options)


def test_too_much_masked(tiny_model):
    with pytest.raises(ValueError, match="mask_ratio=0.8: needed less.*4 video tokens"):
        fasttta.adapt(tiny_model(), "brimpr", mask_ratio=0.8, source_stats=tiny_stats())


def test_statistics_that_do_not_fit(tiny_model, tiny_batch):
    model, stats = tiny_model(), tiny_stats()
    collected = fasttta.collect_stats(model, [tiny_batch(6)], n=6)
    fasttta.adapt(model, "brimpr", source_stats=collected).step(*tiny_batch())
    fasttta.adapt(model.double(), "brimpr", source_stats=collected)  # the same weights
    other = tiny_model(seed=8)
    for source_stats, error, match in (
        (None, ValueError, r"needs source_stats, found None; make them .*collect_stats"),
        ({"audio": 1}, TypeError, "must be fasttta.SourceStats, found dict"),
        (collected, ValueError, "of another model: weights .*collect them anew"),
        (dataclasses.replace(stats, joint=None), ValueError, "source_stats have no joint"),
        (dataclasses.replace(stats, audio=stats.video), ValueError,
         r"of another model: audio \[2, 12\], needed \[1, 12\]"),
        (stats_for((1, 2), dim=13), ValueError, r"audio \[1, 13\], needed \[1, 12\]"),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            fasttta.adapt(other, "brimpr", source_stats=source_stats)
    fasttta.adapt(other, "brimpr", source_stats=dataclasses.replace(collected, model=None))
