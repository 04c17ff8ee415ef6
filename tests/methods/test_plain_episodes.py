"""Methods for single images against their formulas, written out for one image in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from clips import adapt, image, tiny_clip, tiny_ids, tiny_views

EXACT = {"rtol": 1e-7, "atol": 1e-9}


@pytest.fixture(scope="module")
def model():
    """Nothing may change it."""
    return tiny_clip()


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def entropy(p):
    return -(p * p.log()).sum(-1)


def features_of(model, pixels):
    return unit(copy.deepcopy(model).double().encode_image(pixels.double()))


def tuned_by_hand(model, features, loss, steps, lr, decay):
    """The prompt after AdamW, the text features with it, and the first loss and gradient."""
    model = copy.deepcopy(model).double()
    prompts, scale = model.prompts(tiny_ids(), 4), model.logit_scale.exp()
    prompt = prompts.initial.clone()
    mean, square, first = torch.zeros_like(prompt), torch.zeros_like(prompt), None
    with torch.no_grad():
        before = scale * features @ unit(prompts.features()[0]).T
    order = sorted(range(len(features)), key=lambda i: float(entropy(before[i].softmax(-1))))
    selected = order[: int(0.3 * len(features))]
    for step in range(1, steps + 1):
        leaf = prompt.clone().requires_grad_()
        text = unit(prompts.features(leaf[None])[0])
        losses = loss((scale * features[selected] @ text.T).softmax(-1), text)
        (grad,) = torch.autograd.grad(losses["total"], leaf)
        first = first or (losses, grad)
        mean, square = 0.9 * mean + 0.1 * grad, 0.999 * square + 0.001 * grad**2
        divisor = (square / (1 - 0.999**step)).sqrt() + 1e-8
        prompt = (1 - lr * decay) * prompt - lr * mean / (1 - 0.9**step) / divisor
    with torch.no_grad():
        after = scale * features @ unit(prompts.features(prompt[None])[0]).T
    return selected, prompt, before, after, *first


def tpt(p, text):
    return {"entropy": entropy(p.mean(0)), "total": entropy(p.mean(0))}


def c_tpt(p, text):
    spread = sum((row - text.mean(0)).norm() for row in text) / len(text)
    value = entropy(p.mean(0))
    return {"entropy": value, "dispersion": spread, "total": value - 50 * spread}


def each(p, text):
    return {"entropy": entropy(p).mean(), "total": entropy(p).mean()}


def agreement(features, after):
    """Weights of R-TPT: softmax of the mean similarity to the (at most 20) nearest others."""
    scores = []
    for i, x in enumerate(features):
        others = sorted(float(x @ y) for j, y in enumerate(features) if j != i)
        scores.append(sum(others[-20:]) / len(others[-20:]))
    weights = (torch.tensor(scores, dtype=torch.float64) / 0.01).softmax(0)
    return weights, weights @ after


LOSSES = {"tpt": tpt, "c-tpt": c_tpt, "r-tpt": each}


@pytest.mark.parametrize("options", [{}, {"steps": 3, "lr": 0.02, "weight_decay": 0.5}], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_prompt_tuning(model, name, options):
    views = tiny_views(8, dtype=torch.float64)
    result = adapt(model, name, precision="fp64", **options).step(views=views, trace=True)
    features = features_of(model, views.augmix)
    steps, lr = options.get("steps", 1), options.get("lr", 5e-3)
    selected, prompt, before, after, losses, grad = tuned_by_hand(
        model, features, LOSSES[name], steps, lr, options.get("weight_decay", 0.01)
    )
    assert result.stats["selected"].tolist() == selected
    assert result.losses.keys() == losses.keys()
    for term, value in losses.items():
        assert torch.allclose(result.losses[term], value, **EXACT), term
    assert torch.allclose(result.grads["prompt"], grad, rtol=1e-6, atol=1e-8)
    assert torch.allclose(result.stats["prompt"], prompt, rtol=1e-6, atol=1e-8)
    assert torch.allclose(result.logits_before[0], before[0], **EXACT)
    weights = torch.zeros(8, dtype=torch.float64)
    weights[0], logits = 1, after[0]
    if name == "r-tpt":
        weights, logits = agreement(features, after)
    assert torch.allclose(result.stats["weights"], weights, rtol=1e-5, atol=1e-9)
    assert torch.allclose(result.logits[0], logits, rtol=1e-6, atol=1e-7)
    assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize("ensemble", ["tv", "mean", "similarity"])
@pytest.mark.parametrize("tv_loss", [False, True])
def test_attention_guided(model, ensemble, tv_loss):
    """A-TPT behind its maps and masks, which other tests hold."""
    views = tiny_views(8, dtype=torch.float64)
    options = {"ensemble": ensemble, "tv_loss": tv_loss, "tv_temperature": 0.7}
    result = adapt(model, "a-tpt", precision="fp64", **options).step(views=views, trace=True)
    region, maps = result.stats["region"], result.stats["attention"]
    tv = torch.stack([m.diff(dim=0).abs().sum() + m.diff(dim=1).abs().sum() for m in maps])
    assert torch.allclose(result.stats["tv"], tv, **EXACT)
    order = maps.flatten(1)
    assert ((order.amin(1) == 0) & (order.amax(1) > 0.999)).all()
    augmix = views.weight[:, None, None].expand(region.shape)
    share = torch.where(region == 2, 0.8, torch.where(region == 0, 0.2, augmix))[:, None]
    pixels = share * views.base.double() + (1 - share) * views.mix.double()
    pixels[0] = views.base[0]
    assert {0, 2} <= set(region.flatten().tolist())
    large = torch.nn.functional.interpolate(maps[:, None], (24, 24), mode="bilinear")[:, 0]
    for view, mask in zip(large, region, strict=True):
        assert view[mask == 2].min() > view[mask == 0].max()
        assert int((mask == 2).sum()) == pytest.approx(0.2 * 576, abs=4)
    assert torch.allclose(result.trace["pixels"], pixels, atol=1e-12)
    features = features_of(model, pixels)

    def loss(p, text):
        weights = torch.full((2,), 0.5, dtype=torch.float64)
        if tv_loss:
            weights = (-tv[result.stats["selected"]] / 0.7).softmax(0)
        value = (weights * entropy(p)).sum()
        return {"entropy": value, "total": value}

    selected, prompt, _, after, losses, grad = tuned_by_hand(model, features, loss, 1, 5e-3, 0.01)
    assert result.stats["selected"].tolist() == selected
    assert torch.allclose(result.losses["total"], losses["total"], **EXACT)
    assert torch.allclose(result.grads["prompt"], grad, rtol=1e-6, atol=1e-8)
    assert torch.allclose(result.stats["prompt"], prompt, rtol=1e-6, atol=1e-8)
    if ensemble == "similarity":
        weights, logits = agreement(features, after)
    else:
        weights = torch.zeros(8, dtype=torch.float64)
        chosen = (-tv[selected] / 0.7).softmax(0)
        weights[selected] = chosen if ensemble == "tv" else torch.tensor(1 / len(selected)).double()
        logits = (weights @ after.softmax(-1)).log()
    assert torch.allclose(result.stats["weights"], weights, rtol=1e-5, atol=1e-9)
    assert torch.allclose(result.logits[0], logits, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"nearest": 0.5, "affinity": 0.5, "temperature": 0.7}])
def test_mean_shift(model, options):
    views = tiny_views(12, dtype=torch.float64)
    result = adapt(model, "mta", views=12, precision="fp64", **options).step(views=views)
    text = unit(copy.deepcopy(model).double().prompts(tiny_ids()).features()[0])
    scale = model.logit_scale.double().exp()
    f = features_of(model, views.augmix)
    nearest, n = int(options.get("nearest", 0.3) * 11), 12
    width = []
    for i in range(n):
        squares = sorted(float((f[i] - f[j]).square().sum()) for j in range(n) if j != i)
        width.append(sum(squares[:nearest]) / nearest / 2)
    width = torch.tensor(width, dtype=torch.float64)
    assert torch.allclose(result.stats["bandwidth"], width.sqrt(), **EXACT)
    p = (scale * f @ text.T).softmax(-1)
    mode, y = f[0], torch.full((n,), 1 / n, dtype=torch.float64)

    def kernel(mode):
        return torch.exp(-(f - mode).square().sum(-1) / (2 * width))

    def until_still(value, update):
        for _ in range(5):
            before, value = value, update(value)
            if (value - before).norm() < 1e-6:
                break
        return value

    weight, temperature = options.get("affinity", 4.0), options.get("temperature", 0.2)
    for _ in range(5):
        k = kernel(mode)
        y = until_still(y, lambda y, k=k: ((k + weight * (p @ p.T) @ y) / temperature).softmax(0))
        mode = until_still(mode, lambda m, y=y: unit((kernel(m) * y) @ f / (kernel(m) * y).sum()))
    assert torch.allclose(result.stats["weights"], y, rtol=1e-5, atol=1e-9)
    assert torch.allclose(result.logits[0], scale * text @ mode, rtol=1e-6, atol=1e-7)
    assert torch.allclose(result.logits_before[0], scale * text @ f[0], **EXACT)
    assert (result.logits - result.logits_before).abs().max() > 1e-2


@pytest.mark.parametrize("threshold", [1e-9, 1e9])
@pytest.mark.parametrize("seed", [None, 5])
def test_counterattack(model, threshold, seed):
    """Falsely stable images (below the threshold) get the weighted steps, others the noise."""
    pixels = image(0, 24, 24).double()
    pixels[:, :4], pixels[:, 4:8] = 0.001, 0.999  # where the range of pixels cuts
    eps, lr, steps, beta = 0.02, 0.008, 4, 1.5
    options = {"eps": eps, "lr": lr, "steps": steps, "beta": beta, "threshold": threshold}
    generator = torch.Generator().manual_seed(seed or 3)
    noise = eps * (2 * torch.rand(3, 24, 24, generator=generator, dtype=torch.float64) - 1)
    given = {} if seed else {"noise": noise[None]}
    adapted = adapt(model, "ttc", precision="fp64", seed=seed or 0, **options)
    result = adapted.step(pixels, **given)
    exact = copy.deepcopy(model).double()

    def encode(x):
        return exact.encode_image(x[None])[0]

    with torch.no_grad():
        clean = encode(pixels)
    delta = first = (pixels + noise).clamp(0, 1) - pixels
    weights = [math.exp(beta * k) for k in range(steps + 1)]
    total = weights[0] * delta
    for k in range(1, steps + 1):
        leaf = delta.clone().requires_grad_()
        moved = (encode(pixels + leaf) - clean).square().sum()
        (grad,) = torch.autograd.grad(moved, leaf)
        if k == 1:
            stability = moved.detach().sqrt() / clean.norm()
        delta = (delta + lr * grad.sign()).clamp(-eps, eps)
        delta = (pixels + delta).clamp(0, 1) - pixels
        total = total + weights[k] * delta
    expected = total / sum(weights) if threshold > 1 else first
    assert torch.allclose(result.stats["stability"], stability, **EXACT)
    assert torch.allclose(result.stats["perturbation"], expected, rtol=1e-9, atol=1e-12)
    text = unit(exact.prompts(tiny_ids()).features()[0])
    for logits, x in ((result.logits, pixels + expected), (result.logits_before, pixels)):
        right = exact.logit_scale.exp() * text @ unit(encode(x))
        assert torch.allclose(logits[0], right, rtol=1e-7, atol=1e-8)
