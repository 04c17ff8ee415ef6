"""EATA and SAR where the official code is wrong or the golden vectors do not reach."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as nnf
from cases import differing, snapshot

import fasttta


def _plain_fisher(model, batches):
    """Mean over batches of the squared gradient of the batch's loss, written out."""
    names = list(model.tunable("norm"))
    total = {name: 0.0 for name in names}
    for batch in batches:
        logits = model(*batch)
        loss = nnf.cross_entropy(logits, logits.argmax(1))
        grads = torch.autograd.grad(loss, [model.get_parameter(name) for name in names])
        for name, grad in zip(names, grads, strict=True):
            total[name] = total[name] + grad.square() / len(batches)
    return total


def test_collect_fisher(tiny_model, tiny_batch):
    model = tiny_model()
    batches = [tiny_batch(5, seed=s) for s in range(4)]
    fisher = fasttta.collect_fisher(model, batches, n=13)
    cut = [*batches[:2], tuple(x[:3] for x in batches[2])]
    for name, expected in _plain_fisher(model, cut).items():
        assert torch.allclose(fisher[name], expected, atol=1e-7), name
    with torch.inference_mode():
        again = fasttta.collect_fisher(model, batches, n=13)
    assert all(torch.equal(x, fisher[name]) for name, x in again.items())
    assert all(p.grad is None for p in model.parameters())
    for n in (0, 1.5):
        with pytest.raises(ValueError, match="needed a positive integer"):
            fasttta.collect_fisher(model, batches, n=n)
    with pytest.raises(ValueError, match="yielded no batch"):
        fasttta.collect_fisher(model, [])


def test_fisher_holds_values_back(tiny_model, tiny_batch, tmp_path):
    model, batch = tiny_model(), tiny_batch()
    fisher = fasttta.collect_fisher(model, [batch])
    options = {"e_margin": 5.0, "lr": 1e-2, "d_margin": 2.0}

    def distance(adapted):
        source = model.state_dict()
        return sum((x - source[name]).square().sum() for name, x in adapted.tuned.items()).sqrt()

    free = fasttta.adapt(model, "eata", **options)
    held = fasttta.adapt(model, "eata", **options, fisher_weight=1e8, fisher=fisher)
    for _ in range(20):
        free.step(*batch)
        result = held.step(*batch)
    assert distance(held) < 0.5 * distance(free)
    penalty = sum(
        (fisher[name] * (held.tuned[name] - x) ** 2).sum()
        for name, x in model.state_dict().items()
        if name in fisher
    )
    after = held.step(*batch)
    assert torch.allclose(after.losses["fisher"], penalty, rtol=1e-4)
    total = after.losses["entropy"] + 1e8 * after.losses["fisher"]
    assert torch.allclose(after.losses["total"], total)
    assert "fisher" in result.losses
    held.save(tmp_path)
    loaded = fasttta.load(model, tmp_path)  # the Fisher weights travel with the state
    assert torch.equal(loaded.step(*batch).losses["fisher"], held.step(*batch).losses["fisher"])
    for bad in ("fisher.pkl", {"norm.bias": [1, 2]}):
        with pytest.raises(TypeError, match="fisher must be a dict of tensors"):
            fasttta.adapt(model, "eata", fisher=bad)
    for bad in (torch.full((12,), -1.0), torch.full((12,), torch.nan), torch.ones(3)):
        with pytest.raises(ValueError, match=r"fisher\['norm.bias'\]"):
            fasttta.adapt(model, "eata", fisher={**fisher, "norm.bias": bad})


def test_eata_selects(tiny_model, tiny_batch):
    """Reliable samples only; once seen, alike ones no more; nothing left: nothing updated."""
    model, batch = tiny_model(), tiny_batch(8)
    entropy = fasttta.functional.entropy(model(*batch)).detach()
    margin = entropy.median().item() + 1e-4
    adapted = fasttta.adapt(model, "eata", e_margin=margin, d_margin=0.5)
    first = adapted.step(*batch)
    assert torch.equal(first.stats["used"], entropy < margin)
    assert int(first.n_used) == int((entropy < margin).sum())
    expected = (torch.exp(margin - entropy) * entropy)[entropy < margin].mean()
    assert torch.allclose(first.losses["entropy"], expected)
    state = snapshot(adapted)
    second = adapted.step(*batch)  # cosines of positive vectors this alike are above 0.5
    assert int(second.n_used) == 0
    assert not second.stats["used"].any()
    assert differing(state, adapted) == []
    adapted.reset()
    assert int(adapted.step(*batch).n_used) == int(first.n_used)  # the average is forgotten
    default = fasttta.adapt(model, "eata")
    used = default.step(*batch).stats["used"]
    assert torch.equal(used, entropy < 0.4 * math.log(7))


def test_sar_recovers_once(tiny_model, tiny_batch):
    """A threshold above the loss brings everything back to the start, and only then."""
    batch = tiny_batch()
    calm = fasttta.adapt(tiny_model(), "sar", e_margin=5.0, lr=1e-2, reset_below=0.0)
    sharp = fasttta.adapt(tiny_model(), "sar", e_margin=5.0, lr=1e-2, reset_below=100.0)
    start = {k: x for k, x in snapshot(sharp).items() if not k.startswith("method.")}
    for _ in range(3):
        a, b = calm.step(*batch), sharp.step(*batch)
        assert not a.stats["recovered"]
        assert b.stats["recovered"]
        now = snapshot(sharp)
        for name, x in start.items():
            assert torch.equal(x, now[name]), name
    assert calm.step(*batch).losses["total"] < b.losses["total"]
    # one recovery, then on: not at every step
    adapted = fasttta.adapt(tiny_model(), "sar", e_margin=5.0, lr=1e-3)
    adapted.step(*batch)
    adapted._state.method = {"average": torch.tensor(1e-3)}
    assert adapted.step(*batch).stats["recovered"]
    later = adapted.step(*batch)
    assert not later.stats["recovered"]
    assert torch.equal(later.stats["average"], later.losses["sharp"])


def test_sar_is_two_pass(tiny_model, tiny_batch):
    """Its gradient is the one at the perturbed weights, by plain autograd."""
    model, batch = tiny_model().double(), tiny_batch(dtype=torch.float64)
    rho = 0.3
    result = fasttta.adapt(model, "sar", e_margin=50.0, rho=rho).step(*batch, trace=True)
    names = list(model.tunable("encoder_norm"))
    parameters = [model.get_parameter(name) for name in names]

    def loss():
        return fasttta.functional.entropy(model(*batch), backend="reference").mean()

    grads = torch.autograd.grad(loss(), parameters)
    norm = torch.cat([g.flatten() for g in grads]).norm()
    with torch.no_grad():
        for p, g in zip(parameters, grads, strict=True):
            p.add_(rho * g / norm)
    expected = torch.autograd.grad(loss(), parameters)
    assert result.grads.keys() == set(names)
    for name, grad in zip(names, expected, strict=True):
        assert torch.allclose(result.grads[name], grad, atol=1e-10), name
    assert torch.allclose(result.losses["sharp"], loss())


def test_sar_without_reliable_samples_goes_on_by_momentum(tiny_model, tiny_batch):
    adapted = fasttta.adapt(tiny_model(), "sar", e_margin=1e-6)
    before = adapted.tuned
    result = adapted.step(*tiny_batch())
    assert int(result.n_used) == 0
    assert torch.isnan(result.stats["average"])
    assert all(torch.equal(x, before[name]) for name, x in adapted.tuned.items())  # no momentum yet
    tensors = snapshot(adapted)
    assert all(x == 1 for name, x in tensors.items() if name.startswith("adam.step"))


def test_steps_carry_state(tiny_model, tiny_batch):
    """Several steps on a batch are as many steps on it: average, recovery and all."""
    batch = tiny_batch()
    for method, options in (
        ("sar", {"e_margin": 5.0, "lr": 1e-2, "reset_below": 1.77}),
        ("eata", {"e_margin": 1.9, "d_margin": 0.9999}),
    ):
        one = fasttta.adapt(tiny_model(), method, **options)
        three = fasttta.adapt(tiny_model(), method, **options, steps=3)
        results = [one.step(*batch) for _ in range(3)]
        together = three.step(*batch)
        assert differing(one, three) == []
        if method == "sar":
            assert together.stats["recovered"] == any(r.stats["recovered"] for r in results)


def test_early_blocks_only(golden_model):
    names = golden_model.tunable("encoder_norm")
    assert len(names) == 72
    assert not any(f".{block}." in name for name in names for block in (9, 10))
    assert all(name.startswith(("blocks_a", "blocks_v")) for name in names)


def test_eata_is_its_formula(tiny_model, tiny_batch):
    """Selection, weights, average and gradient of a stream, written out."""
    model = tiny_model().double()
    batches = [tiny_batch(6, seed=s, dtype=torch.float64) for s in range(5)]
    entropies = torch.cat([fasttta.functional.entropy(model(*b)) for b in batches])
    margin, d_margin = float(entropies.detach().quantile(0.7)), 0.9998
    adapted = fasttta.adapt(model, "eata", e_margin=margin, d_margin=d_margin, lr=1e-12)
    names = list(model.tunable("norm"))
    parameters = [model.get_parameter(name) for name in names]
    average, counts, similar_ones = None, [], 0
    for batch in batches:
        p = model(*batch).softmax(-1)
        entropy = -(p * p.log()).sum(-1)
        reliable = (entropy < margin).tolist()
        used = []
        for i in range(6):
            alike = (
                average is not None and float(nnf.cosine_similarity(average, p[i], 0)) >= d_margin
            )
            similar_ones += reliable[i] and alike
            used.append(reliable[i] and not alike)
        loss = sum(
            (margin - entropy[i].detach()).exp() * entropy[i] / sum(used)
            for i in range(6) if used[i]
        )  # fmt: skip
        result = adapted.step(*batch, trace=True)
        assert result.stats["used"].tolist() == used
        assert int(result.n_used) == sum(used)
        counts.append(sum(used))
        if not any(used):
            continue
        assert torch.allclose(result.losses["total"], loss, rtol=1e-9)
        for name, grad in zip(names, torch.autograd.grad(loss, parameters), strict=True):
            assert torch.allclose(result.grads[name], grad, rtol=1e-6, atol=1e-9), name
        mean = torch.stack([p[i].detach() for i in range(6) if used[i]]).mean(0)
        average = mean if average is None else 0.9 * average + 0.1 * mean
        assert torch.allclose(snapshot(adapted)["method.average"], average, rtol=1e-9)
    assert sum(c > 0 for c in counts) >= 3, counts
    assert similar_ones, "the average excluded no sample"


def test_sar_is_its_formula(tiny_model, tiny_batch):
    """Both selections, the moving average of the second loss, and the default margin."""
    model = tiny_model().double()
    batches = [tiny_batch(6, seed=s, dtype=torch.float64) for s in range(4)]
    names = list(model.tunable("encoder_norm"))
    entropies = torch.cat([fasttta.functional.entropy(model(*b)) for b in batches])
    margin, rho = float(entropies.detach().quantile(0.8)), 0.01
    options = {"e_margin": margin, "rho": rho, "lr": 1e-12, "reset_below": 0.0}
    adapted = fasttta.adapt(model, "sar", **options)
    average, dropped = None, 0
    for batch in batches:
        twin = copy.deepcopy(model)
        parameters = [twin.get_parameter(name) for name in names]

        def entropy(twin=twin, batch=batch):
            return fasttta.functional.entropy(twin(*batch), backend="reference")

        first = entropy()
        used = first.detach() < margin
        loss = first[used].mean()
        grads = torch.autograd.grad(loss, parameters)
        norm = torch.cat([g.flatten() for g in grads]).norm()
        with torch.no_grad():
            for p, g in zip(parameters, grads, strict=True):
                p.add_(rho * g / norm)
        second = entropy()
        both = used & (second.detach() < margin)
        dropped += int(used.sum() - both.sum())
        assert both.any()
        sharp = second[both].mean()
        result = adapted.step(*batch, trace=True)
        assert torch.equal(result.stats["used"], both)
        assert torch.allclose(result.losses["entropy"], loss, rtol=1e-8)
        assert torch.allclose(result.losses["sharp"], sharp, rtol=1e-6)
        for name, grad in zip(names, torch.autograd.grad(sharp, parameters), strict=True):
            assert torch.allclose(result.grads[name], grad, rtol=1e-4, atol=1e-8), name
        average = sharp.detach() if average is None else 0.9 * average + 0.1 * sharp.detach()
        assert torch.allclose(result.stats["average"], average, rtol=1e-6)
    assert dropped, "no sample passed the first selection alone"


@pytest.mark.parametrize(("method", "options"), [("sar", {"rho": 1e-9}), ("eata", {})])
def test_default_margin(tiny_model, tiny_batch, method, options):
    """0.4 ln C, with samples on both sides and one between 0.35 and 0.4 or 0.4 and 0.45."""
    model = tiny_model()
    with torch.no_grad():
        model.mlp_head[1].weight.mul_(3.5)
    batch = tiny_batch(64)
    entropy = fasttta.functional.entropy(model(*batch)) / math.log(7)
    used = fasttta.adapt(model, method, **options).step(*batch).stats["used"]
    assert torch.equal(used, entropy < 0.4)
    assert ((entropy > 0.4) & (entropy < 0.45)).any()
    assert ((entropy > 0.35) & (entropy < 0.4)).any()
