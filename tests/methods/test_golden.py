"""ABPEM, READ and TENT through the public API against the official implementations' numbers."""

from __future__ import annotations

import pytest
import torch

import fasttta

# float32 within 5x the official float32-to-float64 difference, float64 to 1e-9
FACTOR, EXACT = 5, 1e-9

VARIANTS = {
    "abpem": {"k": 8, "window": 1},
    "abpem_cache": {"k": 8, "window": 2},
    "abpem_softbal": {
        "k": 5, "window": 1, "balance": "softmax-sum",
        "attention_weight": 5.0, "balance_weight": 0.5, "entropy_weight": 1.5,
    },
    "abpem_attn_only": {"k": 8, "window": 1, "entropy_weight": 0.0, "balance_weight": 0.0},
    "read": {},
}  # fmt: skip


def _official(name: str, variant: str) -> str:
    """Our name of a tuned tensor -> the official one."""
    which = name.split(".")[-2]
    return f"module.{name.replace(f'.{which}.', f'.{which}a.')}" if variant != "read" else (
        f"module.{name}"
    )  # fmt: skip


def _compare(value, expected, tolerance, what):
    error = (value.double() - expected.double()).abs().max().item()
    assert error <= tolerance, f"{what}: {error:.2e} > {tolerance:.2e}"


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_fusion_methods(golden, golden_model, device, variant, precision):
    method = "read" if variant == "read" else "abpem"
    model = golden_model.to(device)
    adapted = fasttta.adapt(model, method, precision=precision, **VARIANTS[variant])
    expected = {k: v.to(device) for k, v in golden.load(variant).items()}
    differences = golden.json["fp32_vs_fp64_max_abs"][variant]
    short = {"fp32": "f32", "fp64": "f64"}[precision]
    compared = set()

    def check(key, value, kind):
        if f"{short}.{key}" in expected:
            tolerance = FACTOR * differences[kind] if precision == "fp32" else EXACT
            _compare(value, expected[f"{short}.{key}"][-len(value) :] if value.ndim else
                     expected[f"{short}.{key}"], tolerance, key)  # fmt: skip
            compared.add(kind)

    for step in range(golden.steps):
        result = adapted.step(*(x.to(device) for x in golden.batch(step)), trace=True)
        at = f"step{step}."
        check(f"{at}logits_before", result.logits_before, "logits_before")
        check(f"{at}logits_after", result.logits, "logits_after")
        check(f"{at}loss_ra", result.losses["entropy"], "loss_ra")
        check(f"{at}loss_entropy", result.losses["entropy"], "loss_entropy")
        check(f"{at}loss_balance", result.losses["balance"], "loss_balance")
        if method == "abpem":
            assert len(result.stats["attention_gap"]) == 4 * min(step + 1, adapted.options.window)
            check(f"{at}loss_attn", result.losses["attention"], "loss_attn")
            _compare(result.stats["attention_gap"].mean(), result.losses["attention"], 1e-6, "gap")
            for i, row in enumerate("av"):
                for j, column in enumerate("av"):
                    for moment in ("mean", "std"):
                        name = f"{moment}_{row}{column}"
                        value = result.stats[f"score_{moment}"][:, i, j]
                        assert len(value) == len(expected[f"{short}.{at}{name}"])
                        check(at + name, value, name)
        for name, tensor in adapted.tuned.items():
            if method == "read" and name.endswith("k.bias"):
                continue  # its gradient is rounding noise: softmax ignores a constant per row
            official = _official(name, variant)
            if precision == "fp64" or (golden.json["fp32_vs_fp64_max_abs"][variant]["param"] > 0):
                check(f"{at}param.{official}", tensor, "param")
            check(f"{at}grad.{official}", result.grads[name], "grad")
        assert int(result.n_used) == 4 * (min(step + 1, VARIANTS[variant].get("window", 1)))
    assert {"logits_before", "logits_after", "loss_balance", "grad"} <= compared
    assert "param" in compared or (precision == "fp64" and golden.steps < 3)


LAYERNORM_METHODS = {
    "tent": {},
    "eata": {"e_margin": 2.6, "d_margin": 0.6},
    "sar": {"e_margin": 2.6, "rho": 0.05, "reset_below": 0.2},
}


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("method", LAYERNORM_METHODS)
def test_layernorm_methods(golden, golden_model, device, method, precision):
    model = golden_model.to(device)
    adapted = fasttta.adapt(model, method, precision=precision, **LAYERNORM_METHODS[method])
    expected = {k: v.to(device) for k, v in golden.load("tent_eta_sar").items()}
    short = {"fp32": "f32", "fp64": "f64"}[precision]
    # float32: 5x the largest official difference of each kind (logits, gradients, parameters)
    logits, grads, params = (1e-4, 3e-4, 2e-6) if precision == "fp32" else (EXACT,) * 3
    first = tuple(x.to(device) for x in golden.batch(0))
    for step in range(golden.steps):
        result = adapted.step(*(x.to(device) for x in golden.batch(step)), trace=True)
        at = f"{method}.{short}.step{step}."
        _compare(result.logits, expected[f"{at}logits"], logits, "logits")
        _compare(result.losses["total"], expected[f"{at}loss"], logits, "loss")
        assert torch.equal(result.logits, result.logits_before)
        assert len(result.grads) == (72 if method == "sar" else 96)
        if step == 0 and method != "sar":
            for name, grad in result.grads.items():
                _compare(grad, expected[f"{at}grad.module.{name}"], grads, name)
    if golden.steps == 3:
        for name, tensor in adapted.tuned.items():
            _compare(tensor, expected[f"{method}.{short}.final.param.module.{name}"], params, name)
        after = expected[f"{method}.{short}.logits_after_all_steps_batch0"]
        _compare(adapted.predict(*first), after, logits, "logits after all steps")
        if method == "sar":
            _compare(result.stats["average"], expected[f"sar.{short}.ema"], logits, "average")
