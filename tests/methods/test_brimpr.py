"""BriMPR against the plain path: terms, gradients, savings, prompts; and on a trained model."""

from __future__ import annotations

import contextlib
import gc
import weakref

import pytest
import torch
import torch.nn.functional as nnf
from cases import METHODS, tiny_stats
from plain_brimpr import TERMS, plain, some_ids, stats_for, with_prompts

import fasttta
from fasttta.models.cavmae import prompted
from fasttta.models.cavmae.chunked_loss import chunked_loss


@pytest.mark.parametrize("depth", [(1, 2, 1), (3, 1, 2)])
@pytest.mark.parametrize(("batch", "kept"), [(5, (3, 2)), (2, (6, 1))])
def test_against_the_plain_path(tiny_model, tiny_batch, depth, batch, kept, monkeypatch):
    """Every term, its gradient and the prediction; nothing of what is saved changes a number."""
    monkeypatch.setattr(prompted, "samples_at_once", lambda tokens: 2)
    model = tiny_model(depth=depth).double()
    stats, inputs = stats_for(depth), tiny_batch(batch, dtype=torch.float64)
    keep = [some_ids(batch, 6, kept[0], 1), some_ids(batch, 4, kept[1], 2)]
    options = {"prompts": (2, 3), "temperature": 0.3, "teacher_scale": 1.5, "teacher_offset": 2.0}
    for term in (None, *TERMS):
        weights = {f"{t}_weight": 1.0 if term in (None, t) else 0.0 for t in TERMS}
        adapted = fasttta.adapt(model, "brimpr", source_stats=stats, **options, **weights)
        prompts = with_prompts(adapted)
        losses, logits = plain(model, prompts, stats, inputs, keep, tau=0.3, a=1.5, b=2.0)
        grads = torch.autograd.grad(losses[term or "total"], list(prompts.values()))
        result = adapted.step(*inputs, keep=keep, trace=True)
        assert torch.allclose(result.logits, logits, atol=1e-12)
        for name in TERMS:
            assert torch.allclose(result.losses[name], losses[name], atol=1e-12), name
        assert torch.allclose(result.losses["total"], losses[term or "total"], atol=1e-12)
        for name, grad in zip(prompts, grads, strict=True):
            assert grad.abs().max() > 1e-6
            assert torch.allclose(result.grads[f"prompts.{name}"], grad, atol=1e-11), (term, name)


def test_weights_scale_the_total(tiny_model, tiny_batch):
    options = {**METHODS["brimpr"], "mask_ratio": 0}
    adapted = fasttta.adapt(
        tiny_model(), "brimpr", alignment_weight=2.0, recombination_weight=0.5,
        contrast_weight=3.0, **options,
    )  # fmt: skip
    losses = adapted.step(*tiny_batch()).losses
    plain_losses = fasttta.adapt(tiny_model(), "brimpr", **options).step(*tiny_batch()).losses
    assert all(torch.equal(losses[name], plain_losses[name]) for name in TERMS)
    expected = 2 * losses["alignment"] + 0.5 * losses["recombination"] + 3 * losses["contrast"]
    assert torch.allclose(losses["total"], expected)
    off = fasttta.adapt(
        tiny_model(), "brimpr", alignment_weight=0, recombination_weight=0, contrast_weight=0,
        **METHODS["brimpr"],
    )  # fmt: skip
    before = off.tuned
    assert int(off.step(*tiny_batch()).n_used) == 0
    assert all(torch.equal(x, before[name]) for name, x in off.tuned.items())


def test_no_row_is_computed_twice(tiny_model, tiny_batch, monkeypatch):
    """Rows through every linear layer, counted: prompts are keys and values only, once a layer;
    the fusion block's q, k, v are projected once for each distinct token."""
    adapted = fasttta.adapt(tiny_model(), "brimpr", **METHODS["brimpr"])
    model = adapted._step.model.model
    rows: dict[tuple[str, str], int] = {}
    linear = nnf.linear
    owner = {p.untyped_storage().data_ptr(): n for n, p in model.named_parameters()}

    def counted(x, weight, bias=None):
        name = owner.get(weight.untyped_storage().data_ptr(), "other")
        part = name, str(len(weight) // 12)
        rows[part] = rows.get(part, 0) + x.numel() // x.shape[-1]
        return linear(x, weight, bias)

    monkeypatch.setattr(nnf, "linear", counted)
    keep = [some_ids(5, 6, 3), some_ids(5, 4, 2)]
    adapted.step(*tiny_batch(), keep=keep)
    for name, tokens, prompts in (("blocks_a.0", 6 + 3, 2), ("blocks_v.1", 4 + 2, 3)):
        assert rows[f"{name}.attn.qkv.weight", "1"] == 5 * tokens  # queries: no prompt
        assert rows[f"{name}.attn.qkv.weight", "2"] == 5 * tokens + prompts  # not 5 * prompts
        assert rows[f"{name}.attn.proj.weight", "1"] == 5 * tokens
        assert rows[f"{name}.mlp.fc1.weight", "4"] == 5 * tokens
    alone = 6 + 4  # under each modality's own LayerNorms
    assert rows["blocks_u.0.attn.qkv.weight", "3"] == 5 * (6 + 3 + 4 + 2 + alone)
    passes = (6 + 4) + (3 + 4) + (6 + 2) + 2 * alone
    assert rows["blocks_u.0.mlp.fc1.weight", "4"] == 5 * passes


def test_gradients_are_taken_at_once(tiny_model, tiny_batch):
    """What a masked stream needs for its gradient is gone when its loss is there; and no gradient
    is taken where none is wanted."""
    prompts = {n: torch.rand(d, 2, 12) for n, d in (("audio", 1), ("video", 2))}
    model = tiny_model().requires_grad_(False).prompted(prompts)
    keep = some_ids(5, 6, 3), some_ids(5, 4, 2)
    kept = []

    def held(x):
        kept.append(weakref.ref(x))
        return x

    streams = model.streams(*tiny_batch(), *keep)
    assert all(x.requires_grad for x in streams.features)
    assert not streams.logits.requires_grad
    assert not streams.joint.requires_grad
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for call in (
                lambda: streams.masked(0, lambda y, rows: y.square().sum()),
                lambda: streams.alone(lambda y: y[0].sum() + y[1].square().sum()),
            ):
                kept.clear()
                with torch.autograd.graph.saved_tensors_hooks(held, lambda x: x):
                    value, _ = call()
                assert value.requires_grad == grad
                assert bool(kept) == grad
                gc.collect()
                alive = {id(x()) for x in kept if x() is not None and x().ndim > 2}
                assert len(alive) < 0.2 * len(kept) or not grad
    _, features = model.layers(*tiny_batch())
    assert torch.allclose(features[0], streams.features[0], atol=1e-6)


def test_chunked_loss():
    """Chunks of a batch, inputs that all share, some without gradient, one unused."""
    torch.manual_seed(0)
    w, unused, x, fixed = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=grad)
        for shape, grad in (((3, 3), True), ((2,), True), ((5, 3), True), ((5, 3), False))
    )

    def part(rows, shared, batched):
        y = (batched[0] @ shared[0] + batched[1]).sin()
        return y.square().sum(), (y,)

    for size in (5, 2):
        loss, (y,) = chunked_loss(part, (w, unused), (x, fixed), 5, size)
        expected = (x @ w + fixed).sin()
        assert torch.allclose(y, expected)
        assert torch.allclose(loss, expected.square().sum())
        gradients = torch.autograd.grad(3 * loss, (w, unused, x))
        grads = torch.autograd.grad(3 * expected.square().sum(), (w, x))
        assert torch.allclose(gradients[0], grads[0])
        assert torch.allclose(gradients[2], grads[1])
        assert not gradients[1].any()

    def sum_of_two(rows, shared, batched):  # autograd gives one tensor for both
        return ((shared[0] + shared[1]) * batched[0]).sum(), (batched[0],)

    first, second = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss, _ = chunked_loss(sum_of_two, (first, second), (fixed,), 5, 2)
    for gradient in torch.autograd.grad(loss, (first, second)):
        assert torch.allclose(gradient, fixed.sum(0))


def test_prompts(tiny_model, tiny_batch):
    options = METHODS["brimpr"]
    adapted = fasttta.adapt(tiny_model(), "brimpr", **options, seed=4)
    start = adapted.tuned
    assert {n: x.shape for n, x in start.items()} == {
        "prompts.audio": (1, 2, 12), "prompts.video": (2, 3, 12),
    }  # fmt: skip
    values = torch.cat([x.flatten() for x in start.values()])
    assert values.abs().max() <= 1e-4
    assert values.std() > 0.4e-4
    assert values.min() < 0 < values.max()
    again = fasttta.adapt(tiny_model().double(), "brimpr", **options, seed=4).tuned
    assert all(torch.equal(x.float(), start[n]) for n, x in again.items())
    other = fasttta.adapt(tiny_model(), "brimpr", **options, seed=5).tuned
    assert not torch.equal(other["prompts.audio"], start["prompts.audio"])
    with_prompts(adapted)
    merged = adapted.unwrap(merge=True)
    assert torch.equal(merged(*tiny_batch()), adapted.predict(*tiny_batch()))
    assert not torch.allclose(merged(*tiny_batch()), tiny_model()(*tiny_batch()))
    assert adapted.unwrap() is adapted._hidden[0]


def test_prompts_without_length_are_the_source_model(tiny_model, tiny_batch):
    model = tiny_model()
    bare = model.prompted({n: torch.zeros(d, 0, 12) for n, d in (("audio", 1), ("video", 2))})
    assert torch.equal(bare(*tiny_batch()), model(*tiny_batch()))
    tokens, _ = bare.layers(*tiny_batch())
    assert torch.allclose(tokens, model.encode(*tiny_batch()), atol=1e-6)


def test_a_model_of_another_kind(tiny_model):
    from fusions import Three, build

    with pytest.raises(ValueError, match="which are not known of SpecifiedModel; needed a CAV-MAE"):
        fasttta.adapt(build("three"), "brimpr", spec=Three.spec, source_stats=tiny_stats())
    with pytest.raises(ValueError, match="audio blocks=0"):
        fasttta.adapt(tiny_model(depth=(0, 2, 1)), "brimpr", source_stats=tiny_stats())


def accuracies(source_stats, stream_name):
    """Percent correct of the demo's model on six batches: the source's, BriMPR's."""
    from fasttta.demo.digits import load_model, stream

    model, batches, accuracies = load_model(), stream(stream_name, samples=384), []
    for method, options in (("source", {}), ("brimpr", {"source_stats": source_stats, "lr": 3e-4})):
        adapted = fasttta.adapt(model, method, **options)
        hits = torch.cat([adapted(a, v).argmax(dim=1) == y for a, v, y in batches])
        accuracies.append(100 * hits.double().mean().item())
    return accuracies


def test_it_helps_a_trained_model():
    """Seeded; one modality corrupted 94.3 -> 97.1 %, both 28.6 -> 31.8 %; a third of that asked."""
    from fasttta.demo.digits import load_statistics

    for name, least in (("occlusion", 1.0), ("contrast+hum", 1.0)):
        source, adapted = accuracies(load_statistics(), name)
        assert adapted > source + least, name


def test_few_source_samples():
    """Statistics of 8 samples in place of 32: 94.3 -> 96.9 %."""
    from fasttta.demo.digits import load_model, stream

    clean = [batch[:2] for batch in stream("clean", samples=64, seed=77)]
    source, adapted = accuracies(fasttta.collect_stats(load_model(), clean, n=8), "occlusion")
    assert adapted > source + 0.8


def test_few_batches():
    """Three batches, and what they taught on pairs that were not in them: 95.3 -> 96.9 %."""
    from fasttta.demo.digits import load_model, load_statistics, stream

    adapted = fasttta.adapt(load_model(), "brimpr", source_stats=load_statistics(), lr=3e-4)
    fresh, accuracies = stream("occlusion", samples=512, seed=5), []
    for batches in ([], stream("occlusion", samples=192)):
        for audio, video, _ in batches:
            adapted(audio, video)
        with adapted.source() if not batches else contextlib.nullcontext():
            hits = [adapted.predict(a, v).argmax(dim=1) == y for a, v, y in fresh]
        accuracies.append(100 * torch.cat(hits).double().mean().item())
    assert accuracies[1] > accuracies[0] + 0.5
