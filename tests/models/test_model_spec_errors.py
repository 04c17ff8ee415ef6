"""ModelSpecs that do not fit: what the errors say, and that nothing is changed."""

from __future__ import annotations

import pytest
import torch
from cases import state_equal
from fusions import FUSIONS, HuggingFaceStyle, Joint, Packed, Three, build
from torch import nn

import fasttta
from fasttta import ModelSpec

SPANS = {"audio": (0, 4), "video": (4, 7), "depth": (7, 9)}


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"fusion": 3}, TypeError, ("fusion", "found 3", "for example")),
        ({"fusion": []}, TypeError, ("fusion", "found []")),
        ({"spans": {}}, TypeError, ("spans", "for example")),
        ({"spans": [(0, 4)]}, TypeError, ("spans must be a dict", "for example")),
        ({"spans": {"audio": 4}}, TypeError, ("spans['audio']", "found 4", "(start, stop)")),
        ({"spans": {"audio": (0, 4.0)}}, TypeError, ("spans['audio']", "found (0, 4.0)")),
        ({"spans": {"audio": (0, 1)}}, ValueError, ("spans['audio']", "at least 2 tokens")),
        ({"spans": {"a": (0, 5), "b": (4, 8)}}, ValueError, ("a and b overlap", "(4, 8)")),
        ({"qkv": ("q", "k")}, ValueError, ("qkv=", "one name or three")),
        ({"qkv": 3}, TypeError, ("qkv", "found 3")),
        ({"logits": True}, TypeError, ("logits", "found True")),
        ({"encode": 3}, TypeError, ("encode", "found 3", "pair of functions")),
        ({"encode": (print,)}, TypeError, ("encode", "pair of functions")),
        ({"num_heads": 0}, ValueError, ("num_heads=0", "at least 1")),
        ({"num_heads": 2.0}, TypeError, ("num_heads", "found 2.0")),
        ({"scale": "1"}, TypeError, ("scale", "found '1'")),
    ],
)
def test_values(options, kind, words):
    with pytest.raises(kind) as error:
        ModelSpec(**{"fusion": "attn", "spans": SPANS, **options})
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fusion": "attention"}, ("no submodule of Three", "attn")),
        ({"fusion": nn.Linear(2, 2)}, ("this Linear is no submodule",)),
        (
            {"fusion": "norm", "qkv": None},
            ("norm (LayerNorm)", "no projections of a usual name", "qkv=("),
        ),
        ({"qkv": "in_qkv"}, ("no module 'in_qkv'", "qkv, proj")),
        ({"qkv": "norm"}, ("norm is LayerNorm", "needed a linear module")),
        ({"qkv": "head"}, ("head has 4 rows",)),
        ({"num_heads": 5}, ("num_heads=5", "width 12")),
        ({"spans": {"a": (0, 4), "b": (4, 12)}}, ("spans end at 12", "over 9 tokens", "detect")),
        ({"logits": 5}, ("logits=5", "tuple(Tensor[2, 12], Tensor[2, 4])")),
        ({"logits": "logits"}, ("logits='logits'", "tuple(")),
        ({"logits": lambda out: out[0][0]}, ("needed logits [B, C]", "found Tensor[12]")),
        ({"encode": "out"}, ("out", "after the fusion started")),
        ({"encode": "nothing"}, ("nothing", "not called")),
        ({"scale": 3.0}, ("scores that attn computes differ", "scale 3", "num_heads=")),
        ({"num_heads": 3}, ("scores that attn computes differ", "3 heads")),
    ],
)
def test_what_does_not_fit_the_model(options, words):
    model, batch = build("three"), Three.batch(3)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    given = {"fusion": "attn", "spans": SPANS, "qkv": "qkv", "logits": 1, **options}
    with pytest.raises(ValueError) as error:  # noqa: PT011
        fasttta.adapt(model, "read", spec=ModelSpec(**given))(*batch)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(not m._forward_hooks and "forward" not in vars(m) for m in model.modules())


def test_equal_specs_are_one_key():
    spec = ModelSpec("fusion", {"audio": (0, 2), "video": (2, 5)}, scale=0.5)
    other = ModelSpec(["fusion"], {"video": (2, 5), "audio": (0, 2)}, scale=0.5)
    assert {spec: 1}[other] == 1
    assert len({spec, ModelSpec("fusion", {"audio": (0, 2), "video": (2, 6)}, scale=0.5)}) == 2


def test_not_a_spec():
    with pytest.raises(TypeError, match="spec must be a fasttta.ModelSpec, found dict"):
        fasttta.adapt(build("three"), "read", spec={"fusion": "attn"})


def test_unknown_model_says_what_to_type():
    with pytest.raises(TypeError, match=r"looked for.*found children.*ModelSpec.detect\(model"):
        fasttta.adapt(build("three"), "read")


def test_classes_are_counted_on_the_first_batch():
    adapted = fasttta.adapt(build("three"), "abpem", spec=Three.spec, k=5)
    fresh = fasttta.adapt(build("three"), "abpem", spec=Three.spec, k=5)
    with pytest.raises(ValueError, match="k=5.*4 classes"):
        adapted(*Three.batch(3))
    assert state_equal(adapted, fresh)


class Odd(Three):
    """Three with one thing that a spec cannot describe."""

    def __init__(self, oddity):
        super().__init__()
        self.oddity = oddity

    def forward(self, audio, video, depth):
        if self.oddity == "random":
            audio = audio + 0.1 * torch.randn_like(audio)
        if self.oddity == "batch":
            audio = audio - audio.mean(dim=0)
        pooled, logits = super().forward(audio, video, depth)
        if self.oddity == "pairs":
            logits = logits + self.head((pooled @ pooled.T).mean(1, True).expand(-1, 12))
        if self.oddity == "early stop" and len(audio) > 1:
            self.out(pooled)
        return pooled, logits


@pytest.mark.parametrize(
    ("oddity", "words"),
    [
        ("random", ("differs from its own forward", "random")),
        ("batch", ("differs from its own forward", "mix the samples")),
        ("pairs", ("differs from its own forward", "mix the samples")),
        ("early stop", ("other submodules for two samples than for one",)),
    ],
)
def test_forwards_that_cannot_be_cut(oddity, words):
    torch.manual_seed(0)
    adapted = fasttta.adapt(Odd(oddity), "read", spec=Three.spec)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        adapted(*Three.batch(3))
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("what", ["mask", "causal", "interleaved", "normalised"])
def test_attention_that_is_not_plain(what):
    class Other(Packed):
        def forward(self, x):
            qkv = self.qkv(x)
            if what == "interleaved":
                qkv = qkv.unflatten(2, (self.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)
            else:
                qkv = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            q, k, v = qkv
            if what == "normalised":
                q, k = nn.functional.normalize(q, dim=-1), nn.functional.normalize(k, dim=-1)
            mask = torch.eye(9, dtype=x.dtype) if what == "mask" else None
            out = nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=what == "causal"
            )
            return self.proj(out.transpose(1, 2).flatten(2))

    model = build("three")
    model.attn = Other(12, 2)
    words = "under a mask" if what in ("mask", "causal") else "scores that attn computes differ"
    with pytest.raises(ValueError, match=words):
        fasttta.adapt(model, "read", spec=Three.spec)(*Three.batch(3))


class Multihead(nn.Module):
    """nn.MultiheadAttention as spec'd models may call it."""

    def __init__(self, how, **options):
        super().__init__()
        self.how = how
        self.a, self.b = nn.Linear(3, 8), nn.Linear(5, 8)
        self.attn = nn.MultiheadAttention(8, 2, **options)
        self.head = nn.Linear(8, 4)

    def forward(self, a, b):
        x = torch.cat((self.a(a), self.b(b)), dim=1)
        x = x if self.attn.batch_first else x.transpose(0, 1)
        if self.how == "weights":
            y, weights = self.attn(x, x, x)
            y = y * (1 + weights.sum())
        elif self.how == "cross":
            y, _ = self.attn(x, 2 * x, x)
        elif self.how == "mask":
            y, _ = self.attn(x, x, x, attn_mask=torch.eye(7, dtype=x.dtype))
        else:
            y, _ = self.attn(x, x, x, need_weights=False)
        return self.head((y if self.attn.batch_first else y.transpose(0, 1)).mean(dim=1))


PAIR = ModelSpec("attn", {"a": (0, 4), "b": (4, 7)}, "in_proj_weight")


@pytest.mark.parametrize("how", ["plain", "weights"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention(how, batch_first):
    torch.manual_seed(0)
    model = Multihead(how, batch_first=batch_first)
    a, b = torch.randn(3, 4, 3), torch.randn(3, 3, 5)
    if how == "weights":  # sums over the batch: the cut refuses it
        with pytest.raises(ValueError, match="mix the samples"):
            fasttta.adapt(model, "read", spec=PAIR)(a, b)
        return
    adapted = fasttta.adapt(model, "abpem", spec=PAIR, k=2)
    result = adapted.step(a, b)
    assert torch.allclose(result.logits_before, model(a, b), atol=1e-6)


@pytest.mark.parametrize(
    ("how", "options", "words"),
    [
        ("cross", {}, "different queries and keys"),
        ("mask", {}, "called with a mask"),
        ("plain", {"add_zero_attn": True}, "add_zero_attn; needed plain self-attention"),
        ("plain", {"add_bias_kv": True}, "add_bias_kv"),
    ],
)
def test_multihead_attention_of_other_kinds(how, options, words):
    model = Multihead(how, batch_first=True, **options)
    with pytest.raises(ValueError, match=words):
        fasttta.adapt(model, "read", spec=PAIR)(torch.randn(3, 4, 3), torch.randn(3, 3, 5))


def test_forward_replaced_on_the_object():
    model = build("three")
    model.attn.forward = lambda x: x
    with pytest.raises(ValueError, match="forward of attn is replaced on the object"):
        fasttta.adapt(model, "read", spec=Three.spec)


def test_bad_batches():
    adapted = fasttta.adapt(build("hugging-face"), "read", spec=HuggingFaceStyle.spec)
    ids, pixels = HuggingFaceStyle.batch(3)
    adapted(ids, pixels)
    before = adapted.tuned
    for inputs, kind, words in (
        ((ids,), TypeError, "needed 2 to 3 inputs"),
        ((ids, pixels[:2]), ValueError, "input_ids has 3 samples, pixel_values 2"),
        ((ids, "pixels"), TypeError, "pixel_values must be a tensor"),
        ((ids, pixels[:0]), ValueError, "pixel_values needs at least one sample"),
        ((ids, pixels * float("nan")), ValueError, "pixel_values holds non-finite"),
        ((ids[:, :3], pixels), (ValueError, RuntimeError), "size"),
        ((ids, torch.zeros(3, 3, 8, 8)), ValueError, "inputs of one size"),
    ):
        with pytest.raises(kind, match=words):
            adapted(*inputs)
    assert all(torch.equal(x, before[name]) for name, x in adapted.tuned.items())


def test_detect_finds_the_specs():
    for name, cls in FUSIONS.items():
        model = build(name)
        model.train()
        spec = ModelSpec.detect(model, *cls.batch(4), **({"logits": 1} if name == "three" else {}))
        assert spec.fusion == cls.spec.fusion[:1]
        assert list(spec.spans.values()) == list(cls.spec.spans.values())
        assert model.training
        again = eval(spec.source(), {"fasttta": fasttta})
        assert again == spec
        fasttta.adapt(model, "abpem", spec=again, k=2)(*cls.batch(3))


def test_detect_says_what_it_saw():
    model = build("three")
    with pytest.raises(ValueError, match=r"Tensor\[4, 12\].*at 0, 1.*detect\(model.*logits="):
        ModelSpec.detect(model, *Three.batch(4))
    with pytest.raises(TypeError, match="at least two different samples"):
        ModelSpec.detect(model, *Three.batch(1), logits=1)
    audio, video, depth = Three.batch(4)
    with pytest.raises(ValueError, match=r"no attention module .*video 4:7"):
        ModelSpec.detect(model, torch.zeros_like(audio), video, torch.zeros_like(depth), logits=1)
    with pytest.raises(ValueError, match="Linear has no attention that fasttta knows"):
        ModelSpec.detect(nn.Linear(3, 3), audio, video)


def test_heads_that_the_module_does_not_tell():
    class Quiet(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)

        def forward(self, x):
            qkv = self.qkv(x).unflatten(2, (3, 2, 6)).permute(2, 0, 3, 1, 4)
            out = nn.functional.scaled_dot_product_attention(*qkv)
            return self.proj(out.transpose(1, 2).flatten(2))

    model = build("three")
    model.attn = Quiet()
    with pytest.raises(ValueError, match=r"attn does not say how many heads.*detect\(.*num_heads"):
        ModelSpec.detect(model, *Three.batch(3), logits=1)
    with pytest.raises(ValueError, match=r"attn \(Quiet\).*how many heads.*num_heads=\.\.\."):
        fasttta.adapt(model, "read", spec=Three.spec)
    spec = ModelSpec.detect(model, *Three.batch(3), logits=1, num_heads=2)
    fasttta.adapt(model, "read", spec=spec)(*Three.batch(3))


def test_detect_two_readings():
    class Two(Three):
        def __init__(self):
            super().__init__()
            self.other = Packed(12, 2)

        def forward(self, audio, video, depth):
            parts = (self.audio_encoder(audio), self.image_encoder(video))
            return super().forward(audio, video, depth)[1] + self.head(
                self.other(torch.cat(parts, dim=1)).mean(dim=1)
            )

    with pytest.raises(ValueError, match=r"several attention modules.*attn: 9 tokens.*other: 7"):
        ModelSpec.detect(Two(), *Three.batch(3))


def test_source_needs_names():
    spec = ModelSpec("attn", SPANS, logits=lambda out: out)
    with pytest.raises(ValueError, match="logits holds a function"):
        spec.source()
    spec = ModelSpec(build("joint").head, SPANS)
    with pytest.raises(ValueError, match="fusion holds a function or a module"):
        spec.source()
    assert 'encode=("a",)' not in ModelSpec("x", SPANS, encode="a").source()


def test_module_in_place_of_a_name():
    model = build("joint")
    spec = ModelSpec(model.fusion.layers[0].self_attn, Joint.spec.spans)
    one = fasttta.adapt(model, "abpem", spec=spec, k=2)
    other = fasttta.adapt(model, "abpem", spec=Joint.spec, k=2)
    assert torch.equal(one(*Joint.batch(3)), other(*Joint.batch(3)))


def test_missing_arguments_name_the_class():
    with pytest.raises(TypeError, match=r"ModelSpec.__init__\(\) missing .* 'spans'"):
        ModelSpec("fusion")
