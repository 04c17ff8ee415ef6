"""``precision="fp8"``: which layers are in float8, what is kept, saved, checked and refused."""

from __future__ import annotations

import copy
import pickle
import warnings
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from caching import all_same, counting, shards
from cases import buffered, same, snapshot, state_equal
from clips import TUNING, image, tiny_clip, tiny_ids, tiny_views
from clips import adapt as adapt_clip
from fusions import Joint

import fasttta
from fasttta.data import FeatureCache
from fasttta.demo import digits
from fasttta.engine import precision as precisions
from fasttta.methods.mta import MTA
from fasttta.methods.tent import Tent
from fasttta.models.blocks.quantised import QuantisedLinear, QuantisedModalityBlock, quantised
from fasttta.ops.scaled_rows import E4M3

pytestmark = pytest.mark.filterwarnings("ignore:precision=.fp8. is emulated:RuntimeWarning")
OPTIONS = {"abpem": {"k": 3, "window": 2, "lr": 1e-3}, "read": {"lr": 1e-3}, "source": {}}


@pytest.fixture
def model(tiny_model):
    """A CAV-MAE whose widths are multiples of 16, with a bias of every size."""
    return tiny_model(dim=48, hidden=96)


def _adapt(model, method="abpem", **options):
    return fasttta.adapt(
        model, method, **{**OPTIONS.get(method, {}), "precision": "fp8", **options}
    )


def _clip(**changes):
    return tiny_clip(vision={"dim": 32, "hidden": 64, "heads": 2, "depth": 4}, **changes)


def _float8(adapted):
    """Names of a working copy's tensors in float8."""
    working = adapted._hidden[1]
    tensors = (*working.named_parameters(), *working.named_buffers())
    return sorted(name for name, x in tensors if x.dtype == E4M3)


def test_frozen_layers_of_the_encoders_and_nothing_else(model):
    adapted = _adapt(model)
    kinds = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    blocks = ("blocks_a.0", "blocks_v.0", "blocks_v.1")
    assert _float8(adapted) == sorted(f"{b}.{k}.weight" for b in blocks for k in kinds)
    working = dict(adapted._hidden[1].named_parameters())
    assert working["blocks_u.0.attn.qkv.weight"].dtype == torch.float32  # tuned
    assert working["blocks_u.0.mlp.fc1.weight"].dtype == torch.bfloat16
    assert working["patch_embed_a.proj.weight"].dtype == torch.bfloat16
    assert working["blocks_a.0.norm1.weight"].dtype == torch.float32
    assert all(x.dtype == torch.float32 for x in model.state_dict().values())
    assert type(model.blocks_a[0]) is not QuantisedModalityBlock


def test_weights_are_rounded_once_from_what_they_were(model):
    linear = _adapt(model)._hidden[1].blocks_v[1].mlp.fc1
    weight = model.blocks_v[1].mlp.fc1.weight.detach()
    scale = weight.abs().amax(1, keepdim=True) * (1 / 448)
    assert torch.equal(linear.weight_scale, scale)
    assert torch.equal(linear.weight.float(), (weight * (1 / scale)).to(E4M3).float())
    assert torch.equal(linear.bias, model.blocks_v[1].mlp.fc1.bias.detach().bfloat16())


def test_blocks_compute_what_they_did(model):
    """What attention and MLP add, to a few percent: e4m3 has four significant bits."""
    tower = _clip().visual.transformer.resblocks
    for block, shape in ((model.blocks_v[1], (3, 7, 48)), (tower[0], (3, 7, 32))):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            ours, right = (b(x) for b in (quantised(block), block))
            if isinstance(ours, tuple):
                assert ours[1].q.shape == right[1].q.shape
                ours, right = ours[0], right[0]
            error = (ours - right).norm() / (right - x).norm()
        assert 1e-3 < error.item() < 0.1, error


def test_of_a_quantised_weight_no_other_form_is_kept(model):
    working = _adapt(model)._hidden[1]
    held = {}
    for block in (*working.blocks_a, *working.blocks_v):
        for x in (*block.parameters(), *block.buffers()):
            held[x.data_ptr()] = x.numel() * x.element_size()
    weights = sum(
        x.numel() for b in (*model.blocks_a, *model.blocks_v) for x in b.parameters() if x.ndim == 2
    )
    rest = sum(held.values()) - weights  # scales and biases of layers, LayerNorms
    rows = sum(m.out_features for m in working.modules() if isinstance(m, QuantisedLinear))
    norms = 3 * 6 * 2 * 48 * 4
    assert rest == 6 * rows + norms


def test_close_to_bf16_and_not_the_same(model, tiny_batch):
    exact = _adapt(model, precision="fp64").step(*tiny_batch())
    errors = {}
    for precision in ("bf16", "fp8"):
        result = _adapt(model, precision=precision).step(*tiny_batch())
        assert result.logits.dtype == torch.float32
        apart = (result.logits - exact.logits).abs().max() / exact.logits.abs().max()
        errors[precision] = apart.item()
    assert errors["bf16"] < errors["fp8"] < 0.3, errors


@pytest.mark.parametrize("method", OPTIONS)
def test_state_goes_on_bit_for_bit(model, tiny_batch, tmp_path, method):
    adapted = _adapt(model, method, seed=3)
    fresh = snapshot(adapted) if method != "source" else None
    for seed in range(3):
        adapted.step(*tiny_batch(seed=seed))
    adapted.save(tmp_path)
    copies = [
        fasttta.load(model, tmp_path), copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))
    ]  # fmt: skip
    restored = _adapt(model, method, seed=3)
    restored.load_state_dict(adapted.state_dict())
    expected = adapted.step(*tiny_batch(seed=7))
    for other in (*copies, restored):
        assert (other.precision, len(_float8(other))) == ("fp8", 12)
        assert same(other.step(*tiny_batch(seed=7)), expected)
    if method != "source":
        assert adapted.tuned["blocks_u.0.attn.q.weight"].dtype == torch.float32
        adapted.reset()
        assert state_equal(adapted, fresh)


def test_tuned_tensors_are_set_and_the_source_is_untouched(model, tiny_batch):
    adapted = _adapt(model, "read")
    before = adapted.predict(*tiny_batch())
    start = {name: x.clone() for name, x in adapted.tuned.items()}
    adapted.step(*tiny_batch())
    with adapted.source():
        assert torch.equal(adapted.predict(*tiny_batch()), before)
    assert not torch.equal(adapted.predict(*tiny_batch()), before)
    merged = adapted.unwrap(merge=True)
    assert all(x.dtype == torch.float32 for x in merged.parameters())
    name = "blocks_a.0.mlp.fc1.weight"
    assert torch.equal(merged.get_parameter(name), model.get_parameter(name))
    adapted.load_tuned(start)
    assert torch.equal(adapted.predict(*tiny_batch()), before)


def test_steps_on_static_buffers_are_the_same(model, tiny_batch):
    eager, graph = _adapt(model), buffered(_adapt(model))
    for seed, size in enumerate((5, 5, 3)):
        batch = tiny_batch(size, seed=seed)
        # empty places of the window change the shapes of bf16 products
        assert torch.allclose(graph.step(*batch).logits, eager.step(*batch).logits, atol=3e-2)


def test_every_sample_is_quantised_alone(model, tiny_batch):
    """A sample's features do not depend on the others of its batch, not even on NaN."""
    working = _adapt(model)._hidden[1]
    audio, video = tiny_batch(4)
    with torch.no_grad():
        alone = working.encode(audio[1:2], video[1:2])
        video[3, 0, 2, 2] = torch.nan
        together = working.encode(audio, video)
    assert torch.equal(together[1:2], alone)
    assert together[:3].isfinite().all()
    assert together[3].isnan().any()


def test_changed_weights_are_noticed(model, tiny_batch):
    adapted, blind = _adapt(model), _adapt(model, verify_model="never")
    expected = blind.predict(*tiny_batch())
    adapted.predict(*tiny_batch())
    with torch.no_grad():
        model.blocks_a[0].mlp.fc1.weight.mul_(2)
    with pytest.raises(ValueError, match=r"blocks_a\.0\.mlp\.fc1\.weight of the wrapped model"):
        adapted.predict(*tiny_batch())
    # what checks nothing goes on with the weights that it was given, as in bf16
    assert torch.equal(blind.predict(*tiny_batch()), expected)
    assert not torch.equal(_adapt(model).predict(*tiny_batch()), expected)


def test_features_of_bf16_are_not_taken(model, tiny_batch, tmp_path):
    batches = [tiny_batch(seed=i) for i in range(2)]
    expected = list(_adapt(model, "read").stream(batches))
    for precision in ("bf16", "fp8", "fp8"):
        adapted = counting(_adapt(model, "read", precision=precision))
        results = list(adapted.stream(batches, cache=FeatureCache(tmp_path)))
        encoded, adapted.encoded = adapted.encoded, None
    assert encoded == []  # the second time with this precision
    assert len(shards(tmp_path)) == 2
    assert all_same(results, expected)


def test_the_users_prompts_run_through_quantised_blocks(model, tiny_batch):
    """Tuned prompts that a model came with are frozen: keys and values of them, too, in float8."""
    generator = torch.Generator().manual_seed(0)
    prompts = {"audio": torch.randn(1, 2, 48, generator=generator),
               "video": torch.randn(2, 3, 48, generator=generator)}  # fmt: skip
    model.take_prompts(prompts)
    low, high = (_adapt(model, "read", precision=p).step(*tiny_batch()) for p in ("fp8", "bf16"))
    apart = ((low.logits - high.logits).abs().max() / high.logits.abs().max()).item()
    assert 1e-4 < apart < 0.3


def test_auto_is_never_fp8(model):
    assert fasttta.adapt(model).precision in ("fp32", "bf16")
    devices = torch.device("cpu"), torch.device("meta")
    names = {precisions.resolve("auto", d, torch.float32).name for d in devices}
    assert names == {"fp32"}
    with pytest.raises(ValueError, match="known: .*\"fp8\"|known: .*'fp8'"):
        fasttta.adapt(model, precision="int8")


@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is so on a CPU")
def test_emulation_is_said_once(model):
    precisions._warn_of_emulation.cache_clear()
    with pytest.warns(RuntimeWarning, match='is emulated, slower than "bf16": cpu has no fast'):
        _adapt(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _adapt(model)


@dataclass(frozen=True)
class LateTent(Tent):
    """Tunes the LayerNorms of video block 1, and after it."""

    name: ClassVar[str] = "late-tent"

    def tuned(self, model):
        slots = super().tuned(model)
        return {n: s for n, s in slots.items() if n.startswith(("blocks_v.1", "blocks_u", "norm."))}


def test_blocks_before_the_first_tuned_one(model, tiny_batch):
    adapted = _adapt(model, LateTent(lr=1e-3))
    blocks = {name[:10] for name in _float8(adapted)}
    assert blocks == {"blocks_a.0", "blocks_v.0"}
    result = adapted.step(*tiny_batch(), trace=True)
    assert all(x.any() for name, x in result.grads.items() if "weight" in name)


def test_a_gradient_through_float8_is_an_error(model, tiny_batch):
    working = _adapt(model)._hidden[1]
    audio, _ = tiny_batch()
    tokens = working.embed_audio(audio).detach().requires_grad_()
    for run in (working.blocks_a[0], working.blocks_a[0].mlp, working.blocks_a[0].attn.qkv):
        with pytest.raises(RuntimeError, match="a gradient would run through a layer in float8"):
            run(tokens)
    with torch.no_grad():
        working.blocks_a[0](tokens)


class Doubled(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.fc1, self.fc2 = inner.fc1, inner.fc2

    def forward(self, x, add=None):
        x = self.fc2(self.fc1(x, gelu=True)) * 2
        return x if add is None else x + add


@pytest.mark.parametrize("method", ["tent", "eata", "sar", "brimpr"])
def test_methods_that_tune_inside_the_encoders_are_refused(method):
    statistics = {"source_stats": digits.load_statistics()} if method == "brimpr" else {}
    with pytest.raises(ValueError, match='precision="fp8".*gradients run through.*"bf16"'):
        fasttta.adapt(digits.load_model(), method, precision="fp8", **statistics)


def test_models_that_have_no_such_layers_are_refused(model, tiny_model):
    cases = [(tiny_model(), "multiples of 16, attn.qkv.weight of a block is \\[36, 12\\]")]
    doubled = copy.deepcopy(model)
    doubled.blocks_v[0].mlp = Doubled(doubled.blocks_v[0].mlp)
    cases.append((doubled, "mlp of a block is a Doubled"))
    normed = copy.deepcopy(model)
    torch.nn.utils.parametrizations.weight_norm(normed.blocks_a[0].mlp.fc1)
    cases.append((normed, "mlp.fc1 of a block is a Parametrized|parametrised"))
    for odd, reason in cases:
        before = copy.deepcopy(odd.state_dict())
        with pytest.raises((ValueError, TypeError), match=reason):
            _adapt(odd)
        assert all(torch.equal(x, before[name]) for name, x in odd.state_dict().items())


def test_other_models_say_why_not():
    with pytest.raises(ValueError, match="runs a forward of its own"):
        fasttta.adapt(Joint().eval(), "read", spec=Joint.spec, precision="fp8")
    head = fasttta.models.FeatureClassifier(
        fasttta.models.RationalHead(16, heads=2), torch.randn(3, 16), scale=10.0
    )
    with pytest.raises(ValueError, match="FeatureClassifier takes features"):
        fasttta.adapt(head, "rada", precision="fp8")


@pytest.mark.parametrize("method", ["source", *TUNING, "mta"])
def test_the_image_tower_but_for_differentiated_blocks(method):
    model = _clip()
    low, high = (adapt_clip(model, method, precision=p) for p in ("fp8", "bf16"))
    blocks = {int(name.split(".")[3]) for name in _float8(low)}
    assert blocks == set(range(2 if method == "a-tpt" else 4))
    assert all(name.startswith("visual.transformer.resblocks.") for name in _float8(low))
    inputs = {"images": image(0)} if method == "source" else {"views": tiny_views(8)}
    logits = [adapted.step(**inputs).logits for adapted in (low, high)]
    assert torch.cosine_similarity(*logits).item() > 0.9
    assert not torch.equal(*logits)
    assert low.precision == "fp8"
    assert copy.deepcopy(low).precision == "fp8"


@dataclass(frozen=True)
class Attended(MTA):
    """MTA that also looks at attention maps, whose gradients run through two blocks."""

    name: ClassVar[str] = "attended"

    def forward(self, model, images):
        model.attention_maps(images.anchors(), images.text[0])
        return super().forward(model, images)


@dataclass(frozen=True)
class Declared(Attended):
    name: ClassVar[str] = "declared"

    @property
    def differentiated_blocks(self):
        return 2


def test_a_users_method_says_what_it_differentiates():
    options = {"classes": tiny_ids(), "precision": "fp8"}
    silent = fasttta.adapt(_clip(), Attended(views=8), **options)
    with pytest.raises(RuntimeError, match="Episodic.differentiated_blocks"):
        silent.step(views=tiny_views(8))
    declared = fasttta.adapt(_clip(), Declared(views=8), **options)
    assert declared.step(views=tiny_views(8)).logits.isfinite().all()


def test_towers_that_gradients_run_through_are_refused():
    model = _clip()
    with pytest.raises(ValueError, match="gradients through all 4 blocks of the image tower"):
        adapt_clip(model, "ttc", precision="fp8")
    with pytest.raises(ValueError, match="gradients through all 4 blocks of the image tower"):
        adapt_clip(model, "a-tpt", precision="fp8", rollout="gar")
    with pytest.raises(ValueError, match="image tower is a ModifiedResNet"):
        adapt_clip(tiny_clip(resnet=True), "tpt", precision="fp8")


@pytest.mark.parametrize("loss", ["entropy", "views"])
def test_heads_on_quantised_encoders(model, tiny_batch, loss):
    options = {"classes": tiny_ids(), "precision": "fp8", "heads": 2, "loss": loss}
    adapted = fasttta.adapt(_clip(), "rada", **options)
    assert len(_float8(adapted)) == 4 * 4
    assert adapted.step(image(0)).logits.isfinite().all()
    if loss == "entropy":
        adapted = _adapt(model, "rada", heads=3)
        assert len(_float8(adapted)) == 12
        assert adapted.step(*tiny_batch()).logits.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_on_a_gpu(model, tiny_batch, engine):
    """Nothing waits for the device, and the numbers are those of the emulation on a CPU."""
    gpu = fasttta.adapt(copy.deepcopy(model).cuda(), "read", precision="fp8", engine=engine)
    cpu = _adapt(model, "read", lr=gpu.options.lr)
    batches = [tiny_batch(seed=s) for s in range(3)]
    on_gpu = [tuple(x.cuda() for x in batch) for batch in batches]
    results = [gpu.step(*on_gpu[0])]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results += [gpu.step(*batch) for batch in on_gpu[1:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for result, batch in zip(results, batches, strict=True):
        expected = cpu.step(*batch)
        assert torch.cosine_similarity(result.logits.cpu(), expected.logits).min() > 0.99
