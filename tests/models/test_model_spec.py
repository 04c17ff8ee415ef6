"""Fusion transformers that are not CAV-MAE, adapted by a ModelSpec."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import same, state_equal
from fusions import FUSIONS, Encoder, HuggingFaceStyle, Joint, Three, build, logits_of
from torch import nn

import fasttta

NAMES = list(FUSIONS)
LR = 1e-2


def attention_input(model, name, inputs):
    """The model's own forward, and what its last fusion attention was given."""
    seen = []
    path = FUSIONS[name].spec.fusion[-1]
    hook = model.get_submodule(path).register_forward_pre_hook(
        lambda _m, args: seen.append(args[0])
    )
    try:
        output = model(*inputs)
    finally:
        hook.remove()
    logits = {"joint": lambda: output, "hugging-face": lambda: output["logits"]}
    return logits.get(name, lambda: output[1])(), seen[-1]


def projections(model, name):
    """Weights and biases [(W, b)] of q and k of the last fusion attention, and the head count."""
    attention = model.get_submodule(FUSIONS[name].spec.fusion[-1])
    if name == "joint":
        weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
        return list(zip(weights, biases, strict=True))[:2], attention.num_heads
    if name == "three":
        return [(w, 0) for w in attention.qkv.weight.chunk(3)[:2]], attention.num_heads
    linears = (attention.query, attention.key)
    return [(x.weight, x.bias) for x in linears], attention.num_attention_heads


def bootstrap(model, name, x):
    """ABPEM's attention loss [n] by its definition, all T x T scores held."""
    (wq, bq), (wk, bk) = projections(model, name)[0]
    heads = projections(model, name)[1]
    q, k = (
        (x @ w.T + b).unflatten(2, (heads, -1)).transpose(1, 2) for w, b in ((wq, bq), (wk, bk))
    )
    scores = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).mean(dim=1)
    spans = list(FUSIONS[name].spec.spans.values())
    loss = 0
    for i, rows in enumerate(spans):
        for j, columns in enumerate(spans):
            if i == j:
                continue
            cross = scores[:, slice(*rows), slice(*columns)].flatten(1)
            own = scores[:, slice(*columns), slice(*columns)].flatten(1).detach()
            p = torch.distributions.Normal(cross.mean(1), cross.std(1))
            loss = loss + torch.distributions.kl_divergence(
                p, torch.distributions.Normal(own.mean(1), own.std(1))
            )
    return loss


def loss_of(method, model, name, inputs):
    logits, x = attention_input(model, name, inputs)
    p = logits.softmax(dim=-1)
    if method == "read":
        top = p.max(dim=-1).values
        mass = p.sum(dim=0).softmax(dim=0)
        return (-top * top.log()).mean() + (mass * mass.log()).sum()
    top = p.topk(2, dim=-1).values
    mass = p.mean(dim=0)
    entropy = -(top * (top + 1e-6).log()).sum(dim=-1).mean()
    return entropy + (mass * mass.log()).sum() + bootstrap(model, name, x).mean()


def joined(batches):
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["read", "abpem"])
def test_gradients_and_steps_are_those_of_plain_autograd(name, method):
    model = build(name, dtype=torch.float64)
    options = {"k": 2, "window": 2} if method == "abpem" else {}
    adapted = fasttta.adapt(model, method, spec=FUSIONS[name].spec, lr=LR, **options)
    plain = copy.deepcopy(model)
    slots = adapted._state.slots
    parameters = sorted({slot.parameter.removeprefix("module.") for slot in slots.values()})
    leaves = {n: plain.get_parameter(n) for n in parameters}
    optimizer = torch.optim.Adam(leaves.values(), lr=LR)
    past = []
    for step in range(3):
        batch = FUSIONS[name].batch(4, step, torch.float64)
        window = joined([*past, batch]) if method == "abpem" else batch
        past = [batch]
        optimizer.zero_grad()
        loss = loss_of(method, plain, name, window)
        loss.backward()
        result = adapted.step(*batch, trace=True)
        assert torch.allclose(result.losses["total"], loss, rtol=1e-9)
        moved = 0
        for tuned, slot in slots.items():
            grad = leaves[slot.parameter.removeprefix("module.")].grad
            grad = grad if slot.rows is None else grad[slice(*slot.rows)]
            assert torch.allclose(result.grads[tuned], grad, rtol=1e-6, atol=1e-12), tuned
            moved += int(grad.abs().max() > 1e-6)
        assert moved >= 3  # the comparison is not one of zeros
        if step == 0 and method == "abpem":
            # a gradient that is zero on paper (a key bias without attention loss) has a sign of
            # noise, which Adam would make a step of
            assert result.stats["attention_gap"].min() > 0
        optimizer.step()
        with torch.no_grad():
            for tuned, slot in slots.items():
                value = leaves[slot.parameter.removeprefix("module.")]
                views = value if slot.rows is None else value[slice(*slot.rows)]
                real = result.grads[tuned].abs() > 1e-9
                assert torch.allclose(adapted.tuned[tuned][real], views[real], rtol=1e-6, atol=1e-9)
                views.copy_(adapted.tuned[tuned])
        with torch.no_grad():
            after, _ = attention_input(plain, name, batch)
        assert torch.allclose(result.logits, after, rtol=1e-9, atol=1e-9)


def test_stats_cover_three_modalities():
    adapted = fasttta.adapt(build("three"), "abpem", spec=Three.spec, k=2, window=1)
    stats = adapted.step(*Three.batch(5)).stats
    assert stats["score_mean"].shape == stats["score_std"].shape == (5, 3, 3)
    m, s = stats["score_mean"], stats["score_std"]
    gap = sum(
        fasttta.functional.gaussian_kl(m[:, i, j], s[:, i, j], m[:, j, j], s[:, j, j])
        for i in range(3)
        for j in range(3)
        if i != j
    )
    assert torch.allclose(stats["attention_gap"], gap, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["read", "abpem", "tent", "eata", "source"])
def test_module_is_not_touched(name, method):
    model = build(name)
    model.train()
    before, hooks = copy.deepcopy(model.state_dict()), []
    model.register_forward_hook(lambda *_: hooks.append(1))
    batch = FUSIONS[name].batch(4)
    kept = [x.clone() for x in batch]
    adapted = fasttta.adapt(model, method, spec=FUSIONS[name].spec, lr=LR, **_options(method))
    for _ in range(2):
        adapted(*batch)
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(batch, kept, strict=True))
    assert model.training
    assert len(hooks) <= 1  # the comparison on the first batch
    assert all("forward" not in vars(m) for m in model.modules())


def _options(method):
    return (
        {"k": 2, "window": 2}
        if method == "abpem"
        else {"e_margin": 2.0}
        if method == "eata"
        else {}
    )


@pytest.mark.parametrize("score_at", ["before", "after"])
def test_return_type_is_the_modules(score_at):
    model, batch = build("hugging-face"), HuggingFaceStyle.batch(3)
    options = {"k": 2, "window": 3, "lr": LR, "score_at": score_at, "spec": HuggingFaceStyle.spec}
    adapted, twin = (fasttta.adapt(model, "abpem", **options) for _ in range(2))
    for step in range(3):
        batch = HuggingFaceStyle.batch(3, step)
        output = adapted(*batch)
        assert torch.equal(output.logits, twin.step(*batch).logits)
        assert type(output).__name__ == "Output"
        assert output["logits"] is output.logits
        if score_at == "after":
            want = adapted.unwrap(merge=True)(*batch)
        assert output.pooled.shape == (3, 12)
        assert not output.pooled.requires_grad
        # the pooled features are those that the logits were made from
        assert torch.allclose(model.classifier(output.pooled), output.logits, atol=1e-5)
        if score_at == "after":
            assert torch.allclose(output.attentions[1], want.attentions[1], atol=1e-5)
    assert type(adapted.predict(*batch)).__name__ == "Output"


def test_tuple_stays_a_tuple():
    model = build("three")
    adapted = fasttta.adapt(model, "tent", spec=Three.spec, lr=LR)
    batch = Three.batch(3)
    pooled, logits = adapted(*batch)
    own = model(*(x.clone() for x in batch))
    assert torch.allclose(logits, own[1], atol=1e-5)  # TENT predicts before its update
    assert torch.allclose(pooled, own[0], atol=1e-5)


def test_encoders_run_once_a_step(monkeypatch):
    calls, plain = [], Encoder.forward
    monkeypatch.setattr(Encoder, "forward", lambda self, x: calls.append(1) or plain(self, x))
    adapted = fasttta.adapt(build("three"), "abpem", spec=Three.spec, k=2, window=3, steps=2)
    adapted(*Three.batch(3))
    calls.clear()
    for step in range(3):
        adapted(*Three.batch(3, step))
        assert len(calls) == 3 * (step + 1)  # not once more in the passes of the step


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["abpem", "tent"])
def test_state(name, method, tmp_path):
    spec, options = FUSIONS[name].spec, _options(method)
    model = build(name)
    make = lambda: fasttta.adapt(model, method, spec=spec, lr=LR, **options)  # noqa: E731
    adapted, fresh = make(), make()
    for step in range(3):
        adapted(*FUSIONS[name].batch(4, step))
    adapted.save(tmp_path)
    again = fasttta.load(model, tmp_path, spec=spec)
    assert state_equal(adapted, again)
    batch = FUSIONS[name].batch(4, 9)
    assert same(adapted.step(*batch), again.step(*batch))
    merged = adapted.unwrap(merge=True)
    with torch.no_grad():
        own = fasttta.models.specified.model.SpecifiedModel(merged, spec).own_logits(merged(*batch))
    assert torch.allclose(logits_of(adapted.predict(*batch)), own, atol=1e-5)
    adapted.reset()
    assert state_equal(adapted, fresh)
    with adapted.source():
        assert torch.allclose(logits_of(adapted(*batch)), logits_of(fresh.predict(*batch)))


@pytest.mark.parametrize("name", NAMES)
def test_stream_encodes_ahead(name):
    model, spec = build(name, dtype=torch.float64), FUSIONS[name].spec
    options = {"k": 2, "window": 2, "spec": spec}
    batches = [FUSIONS[name].batch(n, n, torch.float64) for n in (3, 4, 2)]
    one, other = (fasttta.adapt(model, "abpem", **options) for _ in range(2))
    for result, batch in zip(one.stream(batches, encode_batch=5), batches, strict=True):
        assert torch.allclose(result.logits, other.step(*batch).logits, rtol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_source_statistics_and_fisher(name):
    model, cls = build(name), FUSIONS[name]
    loader = [cls.batch(4, s) for s in range(3)]
    stats = fasttta.collect_stats(model, loader, spec=cls.spec)
    assert stats.scores[0].shape == (len(cls.spec.spans),)
    adapted = fasttta.adapt(
        model, "abpem", spec=cls.spec, k=2, anchor="source", source_stats=stats, heads="each"
    )
    assert adapted.step(*loader[0]).n_used == 4
    fisher = fasttta.collect_fisher(model, loader, spec=cls.spec)
    adapted = fasttta.adapt(model, "eata", spec=cls.spec, fisher=fisher, e_margin=3.0, d_margin=2.0)
    assert fisher.keys() == adapted.tuned.keys()
    adapted.step(*loader[0])
    assert adapted.step(*loader[1]).losses["fisher"] > 0


def test_bfloat16_products():
    model, batch = build("joint"), Joint.batch(8)
    spec = Joint.spec
    low = fasttta.adapt(model, "read", spec=spec, precision="bf16", lr=LR)
    full = fasttta.adapt(model, "read", spec=spec, precision="fp32", lr=LR)
    a, b = low.step(*batch), full.step(*batch)
    assert a.logits.dtype == torch.float32
    assert all(x.dtype == torch.float32 for x in low.tuned.values())
    assert (a.logits_before - b.logits_before).norm() < 0.03 * b.logits_before.norm()
    assert not torch.allclose(a.logits_before, b.logits_before, atol=1e-5)  # it is bfloat16


def test_wrapped_in_data_parallel():
    model, batch = build("joint"), Joint.batch(4)
    one = fasttta.adapt(nn.DataParallel(model), "read", spec=Joint.spec, lr=LR)
    other = fasttta.adapt(model, "read", spec=Joint.spec, lr=LR)
    assert torch.equal(one(*batch), other(*batch))
    merged = one.unwrap(merge=True)
    assert isinstance(merged, nn.DataParallel)
    assert torch.allclose(merged.module(*batch), one.predict(*batch), atol=1e-6)


def test_cut_given_as_functions():
    def encode(model, audio, video):
        a = model.audio(audio.transpose(1, 2)).transpose(1, 2)
        v = model.video_norm(model.video(video).flatten(2).transpose(1, 2))
        x = torch.cat((model.token.expand(len(a), -1, -1), a, v), dim=1)
        return x + model.position

    def fuse(model, tokens):
        return model.head(model.fusion(tokens)[:, 0])

    model = build("joint", dtype=torch.float64)
    spec = fasttta.ModelSpec(Joint.spec.fusion, Joint.spec.spans, encode=(encode, fuse))
    for method in ("abpem", "tent"):
        one = fasttta.adapt(model, method, spec=spec, lr=LR, **_options(method))
        other = fasttta.adapt(model, method, spec=Joint.spec, lr=LR, **_options(method))
        for step in range(3):
            batch = Joint.batch(4, step, torch.float64)
            assert torch.allclose(one(*batch), other(*batch), rtol=1e-9)


def test_sar_needs_the_encoders_names():
    model = build("three")
    with pytest.raises(ValueError, match=r"encode=\("):
        fasttta.adapt(model, "sar", spec=Three.spec)
    spec = fasttta.ModelSpec(
        "attn", Three.spec.spans, "qkv", 1, encode=("audio_encoder", "image_encoder")
    )
    adapted = fasttta.adapt(model, "sar", spec=spec, e_margin=3.0)
    assert sorted(adapted.tuned) == [
        f"{m}_encoder.norm.{p}" for m in ("audio", "image") for p in ("bias", "weight")
    ]
    before = adapted.tuned
    adapted(*Three.batch(4))
    assert any(not torch.equal(before[n], x) for n, x in adapted.tuned.items())


def test_a_model_in_training_mode_is_run_in_evaluation_mode():
    model = build("joint")
    batch = FUSIONS["joint"].batch(5)
    expected = model(*batch)
    model.train()
    assert not torch.allclose(model(*batch), expected)  # dropout
    adapted = fasttta.adapt(model, "read", spec=FUSIONS["joint"].spec)
    assert torch.allclose(adapted.predict(*batch), expected, atol=1e-5)
    assert torch.allclose(adapted.step(*batch).logits_before, expected, atol=1e-5)
    assert model.training
    assert all(module.training for module in model.modules())
