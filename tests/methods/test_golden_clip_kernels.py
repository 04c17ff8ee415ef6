"""The parts of A-TPT and its family, each alone, against the official implementations' numbers."""

from __future__ import annotations

import torch
from clips import near


def test_kernels(atpt_kernels):
    from fasttta import functional as F
    from fasttta.methods import view_ensemble as r
    from fasttta.methods.mta import MTA
    from fasttta.models.clip import vision_transformer as m

    k = atpt_kernels
    tokens, grads = (
        [k[f"rollout.{what}_{layer}"] for layer in ("prev", "last")] for what in ("tokens", "grads")
    )
    inner = [(t * g).sum(-1) for t, g in zip(tokens, grads, strict=True)]
    attention = [k["rollout.attn_prev"].mean(1), k["rollout.attn_last"].mean(1)]
    weights = [m.token_weights(x, m.EPS) for x in inner]
    side = k["rollout.code.cam"].shape[1:]
    near(weights[0], k["rollout.code.token_w_prev"], 1e-12)
    near(weights[1], k["rollout.code.token_w_last"], 1e-12)
    rows = m.rollout_code(*attention, *weights)
    near(rows.unflatten(1, side), k["rollout.code.cam_raw"], 1e-12)
    grid = m.normalise_map(rows, 0.99).unflatten(1, side)
    near(grid, k["rollout.code.cam"], 1e-9)
    near(r.upsampled(grid, k["rollout.code.cam_up8"].shape[1]), k["rollout.code.cam_up8"], 1e-9)
    rows = m.rollout_paper(*attention, *(m.token_weights(x) for x in inner))
    near(rows.unflatten(1, side), k["rollout.paper.cam_raw"], 1e-12)
    assert not m.token_weights(torch.full((1, 4), -1.0)).any()
    for i in range(len([name for name in k if name.endswith(".tv") and name[3:4].isdigit()])):
        near(F.total_variation(k[f"tv.{i}.map"]), k[f"tv.{i}.tv"], 1e-12)
    for t in ("0.25", "1.0"):
        w = F.reliability_weights(k["ens.tv"], float(t))
        near(w, k[f"ens.temp{t}.weights"], 1e-12)
        logits = k["ens.logits"][None]
        near(r.ensemble_log_probabilities(logits, w[None])[0].exp(), k[f"ens.temp{t}.probs"], 1e-12)
        near(r.ensemble_logits(logits, w[None])[0], k[f"ens.temp{t}.weighted_logits"], 1e-12)
    near(F.entropy(k["loss.logits"]), k["loss.entropy_per_view"], 1e-12)
    chosen = k["loss.logits"][k["loss.selected_idx"]]
    near(F.marginal_entropy(chosen[None])[0], k["loss.marginal_selected.value"], 1e-12)
    near(F.entropy(chosen).mean(), k["loss.pointwise_selected.value"], 1e-12)
    for kind, loss in (
        ("marginal", lambda x: F.marginal_entropy(x[None])[0]),
        ("pointwise", lambda x: F.entropy(x).mean()),
    ):
        extreme = k["loss.extreme.logits"].clone().requires_grad_()
        value = loss(extreme)
        near(value.detach(), k[f"loss.extreme.{kind}.value"], 1e-9)
        (grad,) = torch.autograd.grad(value, extreme)
        near(grad, k[f"loss.extreme.{kind}.grad_logits"], 1e-9)
    features = k["rel.features"] / k["rel.features"].norm(dim=-1, keepdim=True)
    near(r.similarity_weights(features[None], 20, 0.01)[0], k["rel.weights"], 1e-9)
    image, text = (k[f"mta.{name}_features"] for name in ("image", "text"))
    image, text = (x / x.norm(dim=-1, keepdim=True) for x in (image, text))
    scale, mta = k["mta.logit_scale"], MTA(len(image))
    p = (scale * image @ text.T).softmax(-1)
    mode, _ = mta._mode(image[None], p[None], mta._bandwidth(image[None]))
    near(scale * mode @ text.T, k["mta.final_logits"], 1e-9)


def test_loss_and_optimiser_kernels(atpt_kernels):
    from fasttta.methods import CTPT, RTPT
    from fasttta.methods.episodic import unit

    k = atpt_kernels
    text, image = (k[f"head.{name}_raw"].clone().requires_grad_() for name in ("text", "image"))
    logits = k["head.scale"] * unit(image) @ unit(text).T
    near(logits.detach(), k["head.logits"], 1e-9)
    loss = RTPT().losses(logits[k["head.selected_idx"]][None], unit(text)[None], None)["total"]
    near(loss[0].detach(), k["head.loss"], 1e-9)
    for gradient, name in zip(torch.autograd.grad(loss.sum(), (text, image)), ("text", "image"),
                           strict=True):  # fmt: skip
        near(gradient, k[f"head.grad_{name}_raw"], 1e-9)
    spread = CTPT().losses(logits[None, :4], unit(text)[None], None)["dispersion"]
    near(spread[0].detach(), k["ctpt.dispersion"], 1e-9)
    (gradient,) = torch.autograd.grad(spread.sum(), text)
    near(gradient, k["ctpt.grad_text_raw"], 1e-9)
    prompt = torch.nn.Parameter(k["adamw.p0"].clone())
    optimizer = RTPT().optimizer([prompt])
    for i in range(3):
        prompt.grad = k[f"adamw.g{i}"]
        optimizer.step()
        near(prompt.detach(), k[f"adamw.p{i + 1}"], 1e-12)
