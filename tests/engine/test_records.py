"""Fields of a record and of options: every one is checked, with one kind of error."""

from __future__ import annotations

import json
from dataclasses import replace
from hashlib import sha256
from types import SimpleNamespace

import damage
import pytest
import torch
from cases import METHODS, buffered, differing, same, snapshot
from clips import tiny_clip, tiny_ids
from fusions import Three, build

import fasttta
from fasttta.engine import folder as folders
from fasttta.engine.state import restored


@pytest.fixture
def saved(tiny_model, tiny_batch, tmp_path):
    """Makes a save: (method, options) -> adapted, record, tensors, and a way to load it with other
    contents under checksums that fit."""

    def make(method, **options):
        model = tiny_model()
        settings = {**METHODS[method], **options}
        adapted = fasttta.adapt(model, method, guard=fasttta.ShiftDetector(3), **settings)
        for seed in (1, 2, 3):
            adapted.step(*tiny_batch(seed=seed))
        adapted.save(tmp_path)
        record, tensors = damage.opened(tmp_path)

        def load(record=record, tensors=tensors):
            damage.closed(tmp_path, record, tensors)
            return fasttta.load(model, tmp_path)

        assert differing(load(), adapted) == []
        return adapted, record, tensors, load

    return make


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("format", 99, "format: saved in format 99, this version reads 1 and 2"),
        ("format", "2", "format: saved in format '2'"),
        ("method", 5, "method: needed a name, found 5"),
        ("method", "nothing", "method='nothing' is unknown"),
        ("options", [], "options: needed an object"),
        ("precision", "auto", "precision: needed fp64 or"),
        ("seed", 2**63, "seed: needed 0 to 2"),
        ("seed", -1, "seed: needed 0 to 2"),
        ("seed", 1.5, "seed: needed 0 to 2"),
        ("base", {"model": 3, "source": {}}, "base: needed digests"),
        ("guard", {"window": 3}, "guard: needed window"),
        ("state", "../x", "state: needed the name of a tensor file"),
        ("class", "a b", "class: needed the import path"),
        ("more", 1, "'more' is no field"),
    ],
)
def test_fields(saved, tmp_path, field, value, match):
    _, record, _, load = saved("abpem")
    with pytest.raises(ValueError, match=match) as error:
        load({**record, field: value})
    assert str(tmp_path / folders.RECORD) in str(error.value)


@pytest.mark.parametrize("field", ["method", "options", "precision", "seed", "base", "sha256"])
def test_missing_fields(saved, field):
    _, record, _, load = saved("read")
    with pytest.raises(ValueError, match=f"{field} is missing"):
        load({name: value for name, value in record.items() if name != field})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps": 10**30}, "steps=1000.*at most 10000"),
        ({"steps": 10**6}, "at most 10000"),
        ({"steps": True}, "steps=True"),
        ({"window": 2**64}, "window=1844.*at most 1000000"),
        ({"entropy_weight": 2**64}, "entropy_weight=1844.*at most"),
        ({"lr": 1e300}, "lr=1e.300: needed a number of at most 1e.06"),
        ({"lr": "fast"}, "lr='fast'"),
        ({"another": 1}, "options: .*another"),
    ],
)
def test_options(saved, options, match):
    _, record, _, load = saved("abpem")
    with pytest.raises(ValueError, match=match):
        load({**record, "options": {**record["options"], **options}})


def test_a_missing_option(saved):
    """A default would count in its place; of another version it does."""
    adapted, record, _, load = saved("abpem")
    fewer = {name: value for name, value in record["options"].items() if name != "k"}
    with pytest.raises(ValueError, match=r"options\.k is missing"):
        load({**record, "options": fewer})
    fewer = {name: value for name, value in record["options"].items() if name != "pair"}
    later = load({**record, "options": fewer, "fasttta": "0.0.1"})
    assert differing(later, adapted) == []


@pytest.mark.parametrize(
    ("guard", "match"),
    [
        ({"window": 1}, "window=1: needed an integer from 2"),
        ({"window": 2**70}, "window=.*needed an integer from 2"),
        ({"threshold": 0}, "threshold=0: needed a finite number above 0"),
        ({"watch": 5}, "watch=5: needed names"),
        ({"values": []}, "guard.values: needed an object"),
        ({"values": {"entropy": [1, "2"]}}, r"guard\.values\.entropy: needed at most 3"),
        ({"values": {"entropy": [1.0] * 4}}, r"guard\.values\.entropy: needed at most 3"),
        ({"values": {"entropy": [1e300]}}, "below 1e150"),
        ({"watch": ["total"], "values": {"entropy": [1.0]}}, "'entropy' is not watched"),
    ],
)
def test_guards(saved, guard, match):
    _, record, _, load = saved("abpem")
    with pytest.raises(ValueError, match=match):
        load({**record, "guard": {**record["guard"], **guard}})


QUEUE, VALID = "method.queue.0", "method.valid.0"
BIAS = "blocks_u.0.attn.qkv.bias"


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        (QUEUE, lambda x: x[:, 1:], r"method\.queue\.0 is .*needed samples \[10, 12\]"),
        (QUEUE, lambda x: x.double(), r"method\.queue\.0 is float64"),
        (QUEUE, lambda x: x * torch.nan, r"method\.queue\.0 holds non-finite values"),
        (QUEUE, lambda x: None, r"method\.\w+\.\d is missing"),
        (VALID, lambda x: x + 1, r"method\.valid\.0: needed 0 or 1"),
        ("random", lambda x: x[:-1], "random was saved as"),
        ("random", lambda x: x * 0, "random is no state of a generator"),
        (f"adam.step.{BIAS}", lambda x: x + 0.5, "needed a count of steps"),
        (f"adam.exp_avg_sq.{BIAS}", lambda x: -x - 1, "needed squares"),
        (f"tuned.{BIAS}", lambda x: x / 0, "non-finite"),
        (f"tuned.{BIAS}", lambda x: None, "of another model or method"),
    ],
)
def test_tensors(saved, name, change, match):
    adapted, record, tensors, load = saved("abpem")
    before, value = snapshot(adapted), change(tensors[name])
    others = {n: x for n, x in tensors.items() if n != name}
    with pytest.raises(ValueError, match=match):
        load(record, others if value is None else {**others, name: value.contiguous()})
    assert differing(before, adapted) == []


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x: {n: v for n, v in x.items() if n != "constant.audio.std"}, "audio.std is miss"),
        (lambda x: {**x, "constant.more": torch.ones(2)}, "constant.more is missing, or of an"),
        (lambda x: {**x, "constant.audio.std": -x["constant.audio.std"]}, "std at least 0"),
        (lambda x: {**x, "constant.audio.std": torch.ones(2, 2)}, "audio"),
        (lambda x: {**x, "constant.joint.mean": torch.ones(1, 12) / 0}, "non-finite"),
    ],
)
def test_constants(saved, change, match):
    _, record, tensors, load = saved("brimpr")
    with pytest.raises(ValueError, match=match):
        load(record, change(tensors))


def test_constants_of_eata(saved, tiny_model, tiny_batch):
    fisher = fasttta.collect_fisher(tiny_model(), [tiny_batch()])
    _, record, tensors, load = saved("eata", fisher=fisher)
    name = next(n for n in tensors if n.startswith("constant.source."))
    with pytest.raises(ValueError, match="is not what this model's source values are"):
        load(record, {**tensors, name: tensors[name] + 1})
    name = next(n for n in tensors if n.startswith("constant.fisher."))
    with pytest.raises(ValueError, match="finite and not negative"):
        load(record, {**tensors, name: tensors[name] - 1e3})


def test_one_checksum_over_everything(saved, tmp_path):
    """A value that is changed alone is noticed, wherever it is."""
    adapted, *_ = saved("abpem")
    file = tmp_path / folders.RECORD
    text, changes = file.read_text(), 0
    for path in damage.places(json.loads(text)):
        if not path or path[0] == "format":
            continue
        changed = json.loads(text)
        inner = changed
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = 0.123
        file.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match="checksum is not the recorded one"):
            fasttta.load(adapted.unwrap(), tmp_path)
        changes += 1
    assert changes > 25


def test_json_that_readers_differ_about(saved, tmp_path):
    adapted, *_ = saved("read")
    file = tmp_path / folders.RECORD
    body = file.read_text().rstrip()[:-1]
    for extra, match in (
        ('"seed": NaN', "NaN is no number"), ('"seed": -Infinity', "-Infinity is no number"),
        ('"seed": 1e999', "too large"), ('"seed": 0', "twice"),
        ('"x": ' + "[" * 100_000 + "]" * 100_000, "too deep"), ('"x": ' + "9" * 5000, "damaged"),
    ):  # fmt: skip
        file.write_text(f"{body}, {extra}}}")
        with pytest.raises(ValueError, match=match):
            fasttta.load(adapted.unwrap(), tmp_path)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="damaged"):
        fasttta.load(adapted.unwrap(), tmp_path)


def test_saves_of_format_1_are_read(saved, tmp_path, tiny_batch):
    """Their record has no checksum, and the checksum of the tensors is that of the file."""
    adapted, record, _, _ = saved("abpem")
    data = (tmp_path / record["state"]).read_bytes()
    (tmp_path / record["state"]).unlink()
    old = {n: x for n, x in record.items() if n not in ("checksum", "format", "fasttta")}
    name = f"state-{sha256(data).hexdigest()[:12]}.safetensors"
    old |= {"format": 1, "fasttta": "0.1.0", "state": name, "sha256": sha256(data).hexdigest()}
    (tmp_path / name).write_bytes(data)
    (tmp_path / folders.RECORD).write_text(json.dumps(old))
    loaded = fasttta.load(adapted.unwrap(), tmp_path)
    assert differing(adapted, loaded) == []
    assert same(adapted.step(*tiny_batch(seed=4)), loaded.step(*tiny_batch(seed=4)))
    loaded.save(tmp_path)
    assert json.loads((tmp_path / folders.RECORD).read_text())["format"] == 2
    assert not (tmp_path / name).exists()


def test_images(tmp_path):
    clip = tiny_clip()
    fasttta.adapt(clip, "tpt", classes=tiny_ids(), views=4, select=0.5).save(tmp_path)
    record, tensors = damage.opened(tmp_path)
    for change, match in (
        ({"prompt": tensors["prompt"] / 0}, "prompt holds non-finite values"),
        ({"prompt": tensors["prompt"][:1]}, "prompt has shape"),
        ({"prompt": tensors["prompt"].double()}, "prompt is torch.float64"),
        ({"classes": tensors["classes"].float()}, "classes must be names or int64"),
        ({"more": torch.ones(1)}, "another model or method: more"),
    ):
        damage.closed(tmp_path, record, {**tensors, **change})
        with pytest.raises(ValueError, match=match):
            fasttta.load(clip, tmp_path)


@pytest.mark.parametrize(
    ("method", "options", "match"),
    [
        ("brimpr", {"teacher_offset": 2**64}, "teacher_offset=1844.*at most"),
        ("brimpr", {"prompts": (10**9, 1)}, "prompts=1000000000: needed an integer of at most"),
        ("eata", {"e_margin": 63}, "e_margin=63: needed a number of at most 20"),
        ("read", {"steps": 10**30}, "at most 10000"),
        ("read", {"lr": 10**400}, "lr=1000"),
        ("abpem", {"k": 2**63}, "at most 1000000"),
    ],
)
def test_adapt_refuses_them_too(tiny_model, method, options, match):
    with pytest.raises(ValueError, match=match):
        fasttta.adapt(tiny_model(), method, **{**METHODS[method], **options})


def test_a_gradient_whose_square_overflows_is_left_out(tiny_model, tiny_batch, monkeypatch):
    """Adam would keep infinity, and the tensor would never move again."""
    from fasttta.engine.step import Step

    adapted = fasttta.adapt(tiny_model(), "read", lr=1e-3)
    gradients = Step._gradients
    with monkeypatch.context() as patch:
        patch.setattr(
            Step, "_gradients", lambda *args: tuple(2e19 * x.sign() for x in gradients(*args))
        )
        before = snapshot(adapted)
        with pytest.warns(RuntimeWarning, match="or its square is not"):
            assert int(adapted.step(*tiny_batch()).n_used) == 0
    assert differing(before, adapted) == []
    assert int(adapted.step(*tiny_batch()).n_used) == 5


def test_presets(tiny_model):
    model = tiny_model()
    with pytest.raises(ValueError, match="k=8"):  # a preset for 50 classes
        fasttta.adapt(model, "abpem", preset="ks50-video")
    adapted = fasttta.adapt(model, "abpem", preset="ks50-audio")
    assert adapted.options == fasttta.methods.ABPEM.preset("ks50-audio")
    adapted = fasttta.adapt(model, "abpem", preset="ks50-audio", window=2)
    assert (adapted.options.k, adapted.options.window) == (7, 2)
    with pytest.raises(ValueError, match="ABPEM has no preset 'x'; known: 'ks50-video'"):
        fasttta.adapt(model, "abpem", preset="x")
    with pytest.raises(TypeError, match="preset='paper': a method object has its settings"):
        fasttta.adapt(model, fasttta.methods.READ(), preset="paper")


def test_a_model_in_ddp_warns(tiny_model, tiny_batch, tmp_path, recwarn):
    import torch.distributed as dist

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = torch.nn.parallel.DistributedDataParallel(tiny_model())
        with pytest.warns(UserWarning, match="each rank adapts on its own batches") as warned:
            adapted = fasttta.adapt(model, "read")
        assert len(warned) == 1
        recwarn.clear()
        adapted.step(*tiny_batch())
        fasttta.adapt(tiny_model(), "read")
        assert not recwarn.list
    finally:
        dist.destroy_process_group()


def test_tokens_that_a_product_ends_with_are_loaded(tmp_path):
    """Such encoders return them in bf16, and so the queue holds them."""
    model = build("three")
    options = {"spec": Three.spec, "precision": "bf16", **METHODS["abpem"]}
    adapted = fasttta.adapt(model, "abpem", **options)
    for seed in range(3):
        adapted.step(*Three.batch(4, seed))
    assert adapted._state.tensors()["method.queue.1"].dtype == torch.bfloat16
    adapted.save(tmp_path)
    loaded = fasttta.load(model, tmp_path, spec=Three.spec)
    assert same(loaded.step(*Three.batch(4, 5)), adapted.step(*Three.batch(4, 5)))
    assert differing(loaded, adapted) == []
    record, tensors = damage.opened(tmp_path)
    for name, kind in (("method.queue.0", torch.float16), ("method.valid.0", torch.bfloat16)):
        damage.closed(tmp_path, record, {**tensors, name: tensors[name].to(kind)})
        with pytest.raises(ValueError, match=f"{name} is .*, needed torch.float32"):
            fasttta.load(model, tmp_path, spec=Three.spec)


def test_the_place_of_a_window_stays_on_the_host(tiny_model, tiny_batch):
    """A captured step reads it there: on a GPU it would wait for the device."""
    adapted = buffered(fasttta.adapt(tiny_model(), "abpem", **METHODS["abpem"]))
    adapted.step(*tiny_batch())
    tensors = adapted._state.tensors()
    device = torch.device("meta")  # in place of a GPU
    state = SimpleNamespace(
        first=replace(
            adapted._state.first,
            written={n: x.to(device) for n, x in adapted._state.first.written.items()},
        ),
        leaves={n: x.to(device) for n, x in adapted._state.leaves.items()},
        episodic=False,
    )
    parts = {}, adapted.options, adapted._family.model, adapted._numbers
    snapshot = restored(state, tensors, *parts)
    assert snapshot.method["queue.0"].device == device
    assert snapshot.method["place"].device.type == "cpu"
