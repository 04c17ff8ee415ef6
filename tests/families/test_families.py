"""Users' own CAV-MAE modules: recognised by structure, converted, checked, merged back."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from cases import differing, snapshot
from torch import nn
from user_modules import (
    CAVMAEFT,
    SPLIT,
    user_logits,
    user_module,
)

import fasttta
from fasttta.families import recognise


@pytest.fixture(scope="module", params=SPLIT)
def flavour(request):
    return request.param


def test_the_stand_in_is_the_architecture(flavour, tiny_model, tiny_batch):
    model = tiny_model()
    out = user_logits(user_module(flavour, model, 3), tiny_batch())
    assert torch.allclose(out, model(*tiny_batch()), atol=1e-5)


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "after its first forward"])
def test_numbers_of_the_goldens(golden, golden_model, flavour, used):
    """A user's module gives what the checkpoint gives, which methods/test_golden.py checks."""
    module = user_module(flavour, golden_model, 4)
    batch = tuple(x[:2].float() for x in golden.batch(0))
    if used:
        with torch.no_grad():
            user_logits(module, batch)
    before = {name: x.clone() for name, x in module.state_dict().items()}
    pointers = {name: x.data_ptr() for name, x in module.state_dict().items()}
    options = {"k": 8, "window": 2, "precision": "fp32"}
    ours = fasttta.adapt(golden_model, "abpem", **options).step(*batch, trace=True)
    adapted = fasttta.adapt(nn.DataParallel(module) if used else module, "abpem", **options)
    result = adapted.step(*batch, trace=True)
    assert torch.equal(result.logits, ours.logits)
    for name, grad in ours.grads.items():
        assert torch.equal(result.grads[name], grad)
    # untouched, storage included: READ's first forward would have changed it
    for name, x in module.state_dict().items():
        assert torch.equal(x, before[name])
        assert x.data_ptr() == pointers[name]
    assert module.blocks_u[0].attn.first_batch != (used and flavour != "cav-mae")
    with torch.no_grad():
        merged = adapted.unwrap(merge=True)
        inner = merged.module if used else merged
        out = user_logits(inner, batch)
    assert type(merged) is type(adapted.unwrap())
    assert torch.allclose(out, adapted.predict(*batch), atol=1e-5)
    assert not torch.allclose(out, result.logits_before, atol=1e-4)


@pytest.mark.parametrize("flavour", ["read", "abpem"])
def test_split_weights_count_once_they_compute(golden, golden_model, flavour):
    """After its first forward such a module computes with its q, k, v, whatever qkv holds: a deep
    copy of a READ module that went on adapting."""
    module = user_module(flavour, golden_model, 4)
    batch = tuple(x[:1].float() for x in golden.batch(0))
    with torch.no_grad():
        user_logits(module, batch)
        linear = getattr(module.blocks_u[0].attn, {"read": "v", "abpem": "va"}[flavour])
        linear.weight = nn.Parameter(linear.weight.detach() * 1.5)  # alias broken
        expected = user_logits(module, batch)
    adapted = fasttta.adapt(module, "read")
    assert torch.allclose(adapted.predict(*batch), expected, atol=1e-4)


def test_frozen_weights_are_shared(tiny_model):
    module = user_module("read", tiny_model(), 3)
    adapted = fasttta.adapt(module, "read")
    mine = {x.data_ptr() for x in module.state_dict().values()}
    for name, x in adapted._hidden[1].named_parameters():
        assert (x.data_ptr() in mine) != name.startswith("blocks_u.0.attn.qkv"), name


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
def test_wrappers(tiny_model, tiny_batch, tmp_path):
    module, batch = user_module("cav-mae", tiny_model(), 3), tiny_batch()
    expected = fasttta.adapt(tiny_model(), "tent", lr=1e-3).step(*batch).losses["total"]
    prompted = nn.Module()
    prompted.va_model = module
    prompted.prompts_a, prompted.prompts_v = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    for wrapped, prefix in (
        (module, ""),
        (nn.DataParallel(module), "module."),
        (torch.compile(module), "_orig_mod."),
        (nn.DataParallel(torch.compile(module)), "module._orig_mod."),
        (prompted, "va_model."),
        (nn.DataParallel(tiny_model()), "module."),
    ):
        assert recognise(wrapped).prefix == prefix
        adapted = fasttta.adapt(wrapped, "tent", lr=1e-3)
        assert torch.allclose(adapted.step(*batch).losses["total"], expected, atol=1e-6)
        merged = adapted.unwrap(merge=True)
        tuned = adapted.tuned["norm.weight"]
        assert torch.equal(merged.get_parameter(prefix + "norm.weight"), tuned)
        assert not torch.equal(wrapped.get_parameter(prefix + "norm.weight"), tuned)
    adapted.save(tmp_path)  # of one wrapping, into another
    loaded = fasttta.load(module, tmp_path)
    assert all(torch.equal(x, loaded.tuned[name]) for name, x in adapted.tuned.items())


def test_precisions(tiny_model, tiny_batch):
    for dtype, method in ((torch.float64, "read"), (torch.bfloat16, "tent")):
        module = user_module("abpem", tiny_model().to(dtype), 3)
        result = fasttta.adapt(module, method).step(*tiny_batch())
        assert result.logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_a_patched_module_is_noticed(tiny_model, tiny_batch):
    module = user_module("cav-mae", tiny_model(), 3)
    module.blocks_u[0].attn.scale *= 2
    adapted = fasttta.adapt(module, "read")
    state = snapshot(adapted)
    for call in (adapted, adapted.predict, lambda *b: list(adapted.stream([b]))):
        with pytest.raises(ValueError, match="recognised as CAV-MAE, but its own forward differs"):
            call(*tiny_batch())
    assert differing(state, adapted) == []

    class Odd(CAVMAEFT):
        def forward(self, a, v, mode):
            return {"logits": super().forward(a, v, mode)}

    odd = copy.deepcopy(user_module("cav-mae", tiny_model(), 3))
    odd.__class__ = Odd
    with pytest.raises(ValueError, match="its forward returns dict, needed logits"):
        fasttta.adapt(odd, "read")(*tiny_batch())

    class Failing(CAVMAEFT):
        def forward(self, a, v, mode):
            raise RuntimeError("no such thing")

    odd.__class__ = Failing
    with pytest.raises(ValueError, match="its forward.*fails: no such thing"):
        fasttta.adapt(odd, "read")(*tiny_batch())
    patched = user_module("cav-mae", tiny_model(), 3)
    patched.blocks_u[0].attn.scale *= 2
    for collect in (fasttta.collect_stats, fasttta.collect_fisher):
        with pytest.raises(ValueError, match="its own forward differs"):
            collect(patched, [tiny_batch()])


def test_other_wrappers_are_not_looked_through(tiny_model):
    """A wrapper with a forward of its own is another model."""
    for inner in (user_module("cav-mae", tiny_model(), 3), tiny_model()):
        wrapper = nn.Module()
        wrapper.module = inner
        with pytest.raises(TypeError, match="Module is not a model that fasttta knows"):
            fasttta.adapt(wrapper, "read")


def test_modules_in_odd_states(tiny_model, tiny_batch):
    """What deepcopy would refuse, autocast, inference mode, non-finite first batches on a GPU."""
    expected = fasttta.adapt(tiny_model(), "read").step(*tiny_batch()).logits
    module, seen = user_module("cav-mae", tiny_model(), 3), []
    module.last, module.lock = module(*tiny_batch(), "multimodal"), threading.Lock()
    module.register_forward_hook(lambda *_: seen.append(1))
    adapted = fasttta.adapt(module, "read")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(adapted(*tiny_batch()), expected, atol=1e-6)
    assert len(seen) == 1  # the comparison on the first batch, with the module's hooks
    with pytest.raises(ValueError, match="cannot be copied, which merge=True needs"):
        adapted.unwrap(merge=True)
    made = user_module("read", tiny_model(), 3)
    with torch.inference_mode():
        born = copy.deepcopy(made)
        assert born.norm.weight.is_inference()
        assert torch.allclose(fasttta.adapt(born, "read")(*tiny_batch()), expected, atol=1e-6)
    late = fasttta.adapt(user_module("abpem", tiny_model(), 3), "read")
    late._step.host_checks = False
    bad = tiny_batch()
    bad[0][0, 0, 0] = torch.nan
    assert int(late.step(*bad).n_used) == 0
    assert not late._verified
    assert torch.allclose(late(*tiny_batch()), expected, atol=1e-6)
    assert late._verified


def test_tied_tensors_are_refused(tiny_model):
    for model in (tiny_model(), user_module("cav-mae", tiny_model(), 3)):
        model.blocks_v[1].norm1 = model.blocks_v[0].norm1
        with pytest.raises(
            ValueError, match=r"blocks_v.0.norm1.weight and blocks_v.1.norm1.weight"
        ):
            fasttta.adapt(model, "tent")
        fasttta.adapt(model, "read")  # tunes neither


def test_the_check_runs_once(tiny_model, tiny_batch, monkeypatch):
    module = user_module("cav-mae", tiny_model(), 3)
    adapted = fasttta.adapt(module, "read")
    calls, verify = [], adapted._family.verify
    monkeypatch.setattr(adapted._family, "verify", lambda x: calls.append(1) or verify(x))
    for s in range(3):
        adapted(*tiny_batch(seed=s))
    assert calls == [1]


def test_errors(tiny_model):
    module = user_module("cav-mae", tiny_model(), 3)
    del module.pos_embed_v
    with pytest.raises(TypeError, match="has patch_embed_a, .* but not pos_embed_v"):
        fasttta.adapt(module)
    module = user_module("cav-mae", tiny_model(), 3)
    del module.mlp_head
    with pytest.raises(TypeError, match="CAV-MAE without mlp_head.*fine-tuned for classification"):
        fasttta.adapt(module)
    module = user_module("cav-mae", tiny_model(), 3)
    module.blocks_u = nn.ModuleList()
    with pytest.raises(ValueError, match="blocks_u of CAVMAEFT is empty"):
        fasttta.adapt(module)
    module = user_module("cav-mae", tiny_model(), 3)
    del module.blocks_u[0].attn.num_heads
    with pytest.raises(ValueError, match="num_heads of CAVMAEFT must be an int, found None"):
        fasttta.adapt(module)
    module = user_module("read", tiny_model(), 3)
    del module.blocks_u[0].attn.k
    with pytest.raises(ValueError, match="separate projections q, v; known: none, q k v"):
        fasttta.adapt(module)
    module = user_module("cav-mae", tiny_model(), 3)
    module.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"unknown keys: extra.bias, extra.weight"):
        fasttta.adapt(module)


def test_statistics_of_a_users_module(tiny_model, tiny_batch):
    module = user_module("abpem", tiny_model(), 3)
    scores, expected = (
        fasttta.collect_stats(m, [tiny_batch()]).scores for m in (module, tiny_model())
    )
    assert all(torch.allclose(a, b) for a, b in zip(scores, expected, strict=True))
    fisher = fasttta.collect_fisher(module, [tiny_batch()])
    assert fisher.keys() == tiny_model().tunable("norm").keys()
