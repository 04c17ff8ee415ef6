"""Users' own CAV-MAE modules: recognised by structure, converted, checked, merged back."""

from __future__ import annotations

import copy
import threading
from types import SimpleNamespace

import pytest
import torch
from cases import differing, snapshot
from torch import nn

import fasttta
from fasttta.families import recognise

SPLIT = {"cav-mae": (), "read": ("q", "k", "v"), "abpem": ("qa", "ka", "va", "qv", "kv", "vv")}


class Attention(nn.Module):
    """Attention of a fusion or encoder block as those repositories have it: ``forward_eval``
    computes with split projections, which become views of the packed weight on its first call
    over more than 512 tokens; ``forward`` never uses them."""

    def __init__(self, dim, heads, split=()):
        super().__init__()
        self.num_heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.first_batch = True
        for name in split:
            twin = {"qv": "qa", "kv": "ka", "vv": "va"}.get(name)  # one object under two names
            setattr(self, name, getattr(self, twin) if twin else nn.Linear(dim, dim))
        self.split = split

    def forward(self, x, split=False):
        b, t, dim = x.shape
        if split and self.split and t > 512:
            names = self.split[:3]
            if self.first_batch:
                for i, name in enumerate(names):
                    linear, rows = getattr(self, name), slice(i * dim, (i + 1) * dim)
                    linear.weight.data = self.qkv.weight.data[rows]
                    linear.bias.data = self.qkv.bias.data[rows]
                self.first_batch = False
            qkv = torch.cat([getattr(self, name)(x) for name in names], dim=-1)
        else:
            qkv = self.qkv(x)
        q, k, v = qkv.view(b, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) * self.scale
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, dim)), scores


class MLP(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim, heads, split=()):
        super().__init__()
        for name in ("norm1", "norm1_a", "norm1_v", "norm2", "norm2_a", "norm2_v"):
            setattr(self, name, nn.LayerNorm(dim))
        self.attn, self.mlp = Attention(dim, heads, split), MLP(dim)

    def forward(self, x, split=False):
        y, scores = self.attn(self.norm1(x), split)
        x = x + y
        return x + self.mlp(self.norm2(x)), scores


class PatchEmbed(nn.Module):
    def __init__(self, channels, patch, dim):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class CAVMAEFT(nn.Module):
    """A stand-in of a user's class: same parts and names, none of fasttta's code."""

    def __init__(self, flavour, classes, dim, heads, tokens, depth, patches, channels=3):
        super().__init__()
        self.flavour = flavour
        self.patch_embed_a = PatchEmbed(1, patches[0], dim)
        self.patch_embed_v = PatchEmbed(channels, patches[1], dim)
        for m, n in zip("av", tokens, strict=True):
            setattr(self, f"modality_{m}", nn.Parameter(torch.zeros(1, 1, dim)))
            setattr(self, f"pos_embed_{m}", nn.Parameter(torch.zeros(1, n, dim)))
        for m, n in zip("avu", depth, strict=True):
            split = SPLIT[flavour] if m == "u" else ()
            setattr(self, f"blocks_{m}", nn.ModuleList(Block(dim, heads, split) for _ in range(n)))
        self.norm_a, self.norm_v, self.norm = (nn.LayerNorm(dim) for _ in range(3))
        self.mlp_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, classes))

    def forward(self, a, v, mode):
        return self.run(a, v, mode, False)[0]

    def run(self, a, v, mode, split):
        assert mode == "multimodal"
        a = self.patch_embed_a(a.unsqueeze(1).transpose(2, 3)) + self.pos_embed_a + self.modality_a
        v = self.patch_embed_v(v) + self.pos_embed_v + self.modality_v
        for block in self.blocks_a:
            a, _ = block(a)
        for block in self.blocks_v:
            v, _ = block(v)
        x = torch.cat((a, v), dim=1)
        for block in self.blocks_u:
            x, scores = block(x, split)
        return self.mlp_head(self.norm(x).mean(1)), scores


class Read(CAVMAEFT):
    def forward_eval(self, a, v, mode):
        return self.run(a, v, mode, True)


class Abpem(CAVMAEFT):
    def forward_eval(self, a, v, mode, args):
        assert args.use_cache is False
        return self.run(a, v, mode, True)


CLASSES = {"cav-mae": CAVMAEFT, "read": Read, "abpem": Abpem}


def _logits(module, batch):
    """As the module's own code predicts."""
    if module.flavour == "cav-mae":
        return module(*batch, "multimodal")
    args = [SimpleNamespace(use_cache=False)] if module.flavour == "abpem" else []
    return module.forward_eval(*batch, "multimodal", *args)[0]


def _user_module(flavour, model, heads):
    """The stand-in with a CAVMAE's weights, its split projections still random."""
    patches = tuple(e.proj.kernel_size for e in (model.patch_embed_a, model.patch_embed_v))
    depth = tuple(len(b) for b in (model.blocks_a, model.blocks_v, model.blocks_u))
    module = CLASSES[flavour](
        flavour, model.num_classes, model.dim, heads, model.spans, depth, patches
    )
    missing, unexpected = module.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert all(".attn." in name for name in missing)
    return module.to(next(model.parameters()).dtype).eval()


@pytest.fixture(scope="module", params=SPLIT)
def flavour(request):
    return request.param


def test_the_stand_in_is_the_architecture(flavour, tiny_model, tiny_batch):
    model = tiny_model()
    out = _logits(_user_module(flavour, model, 3), tiny_batch())
    assert torch.allclose(out, model(*tiny_batch()), atol=1e-5)


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "after its first forward"])
def test_numbers_of_the_goldens(golden, golden_model, flavour, used):
    """A user's module gives what the checkpoint gives, which test_golden.py checks."""
    module = _user_module(flavour, golden_model, 4)
    batch = tuple(x[:2].float() for x in golden.batch(0))
    if used:
        with torch.no_grad():
            _logits(module, batch)
    before = {name: x.clone() for name, x in module.state_dict().items()}
    pointers = {name: x.data_ptr() for name, x in module.state_dict().items()}
    options = {"k": 8, "window": 2, "precision": "fp32"}
    ours = fasttta.adapt(golden_model, "abpem", **options).step(*batch, trace=True)
    adapted = fasttta.adapt(nn.DataParallel(module) if used else module, "abpem", **options)
    found = adapted.step(*batch, trace=True)
    assert torch.equal(found.logits, ours.logits)
    for name, grad in ours.grads.items():
        assert torch.equal(found.grads[name], grad)
    # untouched, storage included: READ's first forward would have changed it
    for name, x in module.state_dict().items():
        assert torch.equal(x, before[name])
        assert x.data_ptr() == pointers[name]
    assert module.blocks_u[0].attn.first_batch != (used and flavour != "cav-mae")
    with torch.no_grad():
        merged = adapted.unwrap(merge=True)
        inner = merged.module if used else merged
        out = _logits(inner, batch)
    assert type(merged) is type(adapted.unwrap())
    assert torch.allclose(out, adapted.predict(*batch), atol=1e-5)
    assert not torch.allclose(out, found.logits_before, atol=1e-4)


@pytest.mark.parametrize("flavour", ["read", "abpem"])
def test_split_weights_count_once_they_compute(golden, golden_model, flavour):
    """After its first forward such a module computes with its q, k, v, whatever qkv holds: a deep
    copy of a READ module that went on adapting."""
    module = _user_module(flavour, golden_model, 4)
    batch = tuple(x[:1].float() for x in golden.batch(0))
    with torch.no_grad():
        _logits(module, batch)
        linear = getattr(module.blocks_u[0].attn, {"read": "v", "abpem": "va"}[flavour])
        linear.weight = nn.Parameter(linear.weight.detach() * 1.5)  # alias broken
        expected = _logits(module, batch)
    adapted = fasttta.adapt(module, "read")
    assert torch.allclose(adapted.predict(*batch), expected, atol=1e-4)


def test_frozen_weights_are_shared(tiny_model):
    module = _user_module("read", tiny_model(), 3)
    adapted = fasttta.adapt(module, "read")
    mine = {x.data_ptr() for x in module.state_dict().values()}
    for name, x in adapted._hidden[1].named_parameters():
        assert (x.data_ptr() in mine) != name.startswith("blocks_u.0.attn.qkv"), name


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
def test_wrappers(tiny_model, tiny_batch, tmp_path):
    module, batch = _user_module("cav-mae", tiny_model(), 3), tiny_batch()
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
        module = _user_module("abpem", tiny_model().to(dtype), 3)
        result = fasttta.adapt(module, method).step(*tiny_batch())
        assert result.logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_a_patched_module_is_noticed(tiny_model, tiny_batch):
    module = _user_module("cav-mae", tiny_model(), 3)
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

    odd = copy.deepcopy(_user_module("cav-mae", tiny_model(), 3))
    odd.__class__ = Odd
    with pytest.raises(ValueError, match="its forward returns dict, needed logits"):
        fasttta.adapt(odd, "read")(*tiny_batch())

    class Failing(CAVMAEFT):
        def forward(self, a, v, mode):
            raise RuntimeError("no such thing")

    odd.__class__ = Failing
    with pytest.raises(ValueError, match="its forward.*fails: no such thing"):
        fasttta.adapt(odd, "read")(*tiny_batch())
    patched = _user_module("cav-mae", tiny_model(), 3)
    patched.blocks_u[0].attn.scale *= 2
    for collect in (fasttta.collect_stats, fasttta.collect_fisher):
        with pytest.raises(ValueError, match="its own forward differs"):
            collect(patched, [tiny_batch()])


def test_other_wrappers_are_not_looked_through(tiny_model):
    """A wrapper with a forward of its own is another model."""
    for inner in (_user_module("cav-mae", tiny_model(), 3), tiny_model()):
        wrapper = nn.Module()
        wrapper.module = inner
        with pytest.raises(TypeError, match="Module is not a model that fasttta knows"):
            fasttta.adapt(wrapper, "read")


def test_modules_in_odd_states(tiny_model, tiny_batch):
    """What deepcopy would refuse, autocast, inference mode, non-finite first batches on a GPU."""
    expected = fasttta.adapt(tiny_model(), "read").step(*tiny_batch()).logits
    module, seen = _user_module("cav-mae", tiny_model(), 3), []
    module.last, module.lock = module(*tiny_batch(), "multimodal"), threading.Lock()
    module.register_forward_hook(lambda *_: seen.append(1))
    adapted = fasttta.adapt(module, "read")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(adapted(*tiny_batch()), expected, atol=1e-6)
    assert len(seen) == 1  # the comparison on the first batch, with the module's hooks
    with pytest.raises(ValueError, match="cannot be copied, which merge=True needs"):
        adapted.unwrap(merge=True)
    made = _user_module("read", tiny_model(), 3)
    with torch.inference_mode():
        born = copy.deepcopy(made)
        assert born.norm.weight.is_inference()
        assert torch.allclose(fasttta.adapt(born, "read")(*tiny_batch()), expected, atol=1e-6)
    late = fasttta.adapt(_user_module("abpem", tiny_model(), 3), "read")
    late._step.host_checks = False
    bad = tiny_batch()
    bad[0][0, 0, 0] = torch.nan
    assert int(late.step(*bad).n_used) == 0
    assert not late._verified
    assert torch.allclose(late(*tiny_batch()), expected, atol=1e-6)
    assert late._verified


def test_tied_tensors_are_refused(tiny_model):
    for model in (tiny_model(), _user_module("cav-mae", tiny_model(), 3)):
        model.blocks_v[1].norm1 = model.blocks_v[0].norm1
        with pytest.raises(
            ValueError, match=r"blocks_v.0.norm1.weight and blocks_v.1.norm1.weight"
        ):
            fasttta.adapt(model, "tent")
        fasttta.adapt(model, "read")  # tunes neither


def test_the_check_runs_once(tiny_model, tiny_batch, monkeypatch):
    module = _user_module("cav-mae", tiny_model(), 3)
    adapted = fasttta.adapt(module, "read")
    calls, verify = [], adapted._known.verify
    monkeypatch.setattr(adapted._known, "verify", lambda x: calls.append(1) or verify(x))
    for s in range(3):
        adapted(*tiny_batch(seed=s))
    assert calls == [1]


def test_errors(tiny_model):
    module = _user_module("cav-mae", tiny_model(), 3)
    del module.pos_embed_v
    with pytest.raises(TypeError, match="has patch_embed_a, .* but not pos_embed_v"):
        fasttta.adapt(module)
    module = _user_module("cav-mae", tiny_model(), 3)
    del module.mlp_head
    with pytest.raises(TypeError, match="CAV-MAE without mlp_head.*fine-tuned for classification"):
        fasttta.adapt(module)
    module = _user_module("cav-mae", tiny_model(), 3)
    module.blocks_u = nn.ModuleList()
    with pytest.raises(ValueError, match="blocks_u of CAVMAEFT is empty"):
        fasttta.adapt(module)
    module = _user_module("cav-mae", tiny_model(), 3)
    del module.blocks_u[0].attn.num_heads
    with pytest.raises(ValueError, match="num_heads of CAVMAEFT must be an int, found None"):
        fasttta.adapt(module)
    module = _user_module("read", tiny_model(), 3)
    del module.blocks_u[0].attn.k
    with pytest.raises(ValueError, match="separate projections q, v; known: none, q k v"):
        fasttta.adapt(module)
    module = _user_module("cav-mae", tiny_model(), 3)
    module.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"unknown keys: extra.bias, extra.weight"):
        fasttta.adapt(module)


def test_statistics_of_a_users_module(tiny_model, tiny_batch):
    module = _user_module("abpem", tiny_model(), 3)
    found, expected = (
        fasttta.collect_stats(m, [tiny_batch()]).scores for m in (module, tiny_model())
    )
    assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))
    fisher = fasttta.collect_fisher(module, [tiny_batch()])
    assert fisher.keys() == tiny_model().tunable("norm").keys()
