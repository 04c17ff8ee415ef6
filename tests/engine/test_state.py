"""The state of an adapted model: reset, saved, loaded, rolled back, left for the source."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from cases import METHODS, differing, same, snapshot, state_equal
from safetensors.torch import load_file

import fasttta
from fasttta.engine.step import Step
from fasttta.methods.queue import KeptPasses


def test_reset_is_bitwise(tiny_model, tiny_batch, method):
    adapted = fasttta.adapt(tiny_model(), method, **METHODS[method], seed=3)
    fresh = fasttta.adapt(tiny_model(), method, **METHODS[method], seed=3)
    first = [adapted.step(*tiny_batch(seed=s)) for s in range(3)]
    assert method == "source" or not state_equal(adapted, fresh)
    adapted.reset()
    assert state_equal(adapted, fresh)
    again = [adapted.step(*tiny_batch(seed=s)) for s in range(3)]
    assert all(same(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("take", [lambda adapted: adapted._state.tensors(), snapshot])
def test_a_state_that_was_taken_is_a_copy(tiny_model, tiny_batch, take):
    """On a CPU `.cpu()` and `.contiguous()` give the live memory, which a later step writes to."""
    adapted = fasttta.adapt(tiny_model(), "abpem", **METHODS["abpem"])
    adapted.step(*tiny_batch(seed=0))
    taken = take(adapted)
    kept = copy.deepcopy(taken)
    adapted.step(*tiny_batch(seed=1))
    assert differing(kept, taken) == []
    changed = set(differing(kept, adapted))
    assert {name for name in kept if name.startswith(("tuned.", "adam."))} <= changed
    live = [*adapted._state.leaves.values(), *adapted._state.method.values()]
    for slots in adapted._state.optimizer.state.values():
        live += slots.values()
    memory = {x.untyped_storage().data_ptr() for x in live}
    assert not memory & {x.untyped_storage().data_ptr() for x in take(adapted).values()}


@pytest.mark.parametrize("precision", ["fp32", "fp64", "bf16"])
def test_save_and_load_are_bitwise(tiny_model, tiny_batch, tmp_path, method, precision):
    model = tiny_model()
    adapted = fasttta.adapt(model, method, **METHODS[method], precision=precision, seed=5)
    for s in range(3):
        adapted.step(*tiny_batch(seed=s))
    adapted.save(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 2
    assert names[0] == "fasttta.json"
    again = fasttta.load(model, tmp_path)
    assert (again.method, again.options, again.precision, again.seed) == (
        method, adapted.options, precision, 5,
    )  # fmt: skip
    assert state_equal(adapted, again)
    for s in range(3, 6):
        assert same(adapted.step(*tiny_batch(seed=s)), again.step(*tiny_batch(seed=s)))
    again.save(tmp_path)  # over the earlier one
    assert len(list(tmp_path.iterdir())) == 2
    assert state_equal(again, fasttta.load(model, tmp_path))
    again.reset()
    assert state_equal(
        again, fasttta.adapt(model, method, **METHODS[method], precision=precision, seed=5)
    )


def test_saved_state_is_a_delta(tiny_model, tiny_batch, tmp_path):
    adapted = fasttta.adapt(tiny_model(), "read")
    adapted(*tiny_batch())
    adapted.save(tmp_path)
    record = json.loads((tmp_path / "fasttta.json").read_text())
    tensors = load_file(tmp_path / record["state"])
    tuned = 3 * (12 * 12 + 12)
    values = sum(x.numel() for name, x in tensors.items() if name != "random")
    assert values == 3 * tuned + 2  # tuned, two moments each, a step count a parameter


def test_damaged_saves(tiny_model, tiny_batch, tmp_path):
    model = tiny_model()
    adapted = fasttta.adapt(model, "read")
    adapted(*tiny_batch())
    with pytest.raises(FileNotFoundError, match="no saved state"):
        fasttta.load(model, tmp_path)
    adapted.save(tmp_path)
    with pytest.raises(ValueError, match="another model.*blocks_u.0.attn.qkv"):
        fasttta.load(tiny_model(seed=9), tmp_path)
    with pytest.raises(ValueError, match="another model"):
        fasttta.load(tiny_model(depth=(1, 1, 1)), tmp_path)
    record = tmp_path / "fasttta.json"
    state = tmp_path / json.loads(record.read_text())["state"]
    good = state.read_bytes()
    state.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(ValueError, match="checksum"):
        fasttta.load(model, tmp_path)
    state.unlink()
    with pytest.raises(FileNotFoundError, match="missing") as error:
        fasttta.load(model, tmp_path)
    assert isinstance(error.value, ValueError)
    text = record.read_text()
    for broken, match in (
        (text[:50], "damaged"),
        ("{}", "no record"),
        (text.replace('"format": 2', '"format": 99'), "format 99"),
    ):  # fmt: skip
        record.write_text(broken)
        with pytest.raises(ValueError, match=match):
            fasttta.load(model, tmp_path)


def test_interrupted_save_keeps_the_earlier_one(tiny_model, tiny_batch, tmp_path, monkeypatch):
    model = tiny_model()
    adapted = fasttta.adapt(model, "read", lr=1e-3)
    adapted(*tiny_batch())
    adapted.save(tmp_path)
    saved = fasttta.load(model, tmp_path).tuned
    adapted(*tiny_batch(seed=2))
    from fasttta.engine import folder

    replace, calls = folder.os.replace, []

    def interrupted(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(folder.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        adapted.save(tmp_path)
    tuned = fasttta.load(model, tmp_path).tuned
    assert all(torch.equal(x, saved[name]) for name, x in tuned.items())


def test_source_block(tiny_model, tiny_batch, method):
    model = tiny_model()
    adapted = fasttta.adapt(model, method, **METHODS[method])
    for s in range(2):
        adapted(*tiny_batch(seed=s))
    batch = tiny_batch(seed=7)
    expected, now, state = model(*batch), adapted.predict(*batch), snapshot(adapted)
    with adapted.source() as inner:
        assert inner is adapted
        for logits in (adapted(*batch), adapted.predict(*batch), adapted.step(*batch).logits):
            assert torch.equal(logits, expected)
        with adapted.source():
            assert torch.equal(adapted(*batch), expected)
        assert torch.equal(adapted(*batch), expected)
        assert int(adapted.step(*batch).n_used) == 0
        assert [torch.equal(r.logits, expected) for r in adapted.stream([batch])] == [True]
    assert differing(state, adapted) == []
    assert torch.equal(adapted.predict(*batch), now)
    with pytest.raises(KeyError, match="inside"), adapted.source():
        raise KeyError("inside")
    assert torch.equal(adapted.predict(*batch), now)


def test_unwrap_merge(tiny_model, tiny_batch, method):
    model = tiny_model()
    adapted = fasttta.adapt(model, method, **METHODS[method])
    adapted(*tiny_batch())
    merged = adapted.unwrap(merge=True)
    batch = tiny_batch(seed=3)
    assert torch.equal(merged(*batch), adapted.predict(*batch))
    if method not in ("brimpr", "rada"):  # prompts, a head: no place for them in the user's class
        assert type(merged) is type(model)
        assert (merged.state_dict().keys()) == model.state_dict().keys()
    adapted(*batch)
    assert not any(
        merged.get_parameter(s.parameter).data_ptr() == leaf.data_ptr()
        for s in adapted._state.slots.values()
        for leaf in adapted._state.leaves.values()
    )


def test_tuned_and_load_tuned(tiny_model, tiny_batch):
    adapted = fasttta.adapt(tiny_model(), "read", lr=1e-3)
    start = adapted.tuned
    assert list(start) == [
        f"blocks_u.0.attn.{w}.{part}" for part in ("weight", "bias") for w in "qkv"
    ]
    source = tiny_model().state_dict()["blocks_u.0.attn.qkv.weight"]
    assert torch.equal(start["blocks_u.0.attn.k.weight"], source[12:24])
    start["blocks_u.0.attn.q.weight"].zero_()  # a copy
    assert adapted.tuned["blocks_u.0.attn.q.weight"].abs().sum() > 0
    adapted(*tiny_batch())
    moved, logits = adapted.tuned, adapted.predict(*tiny_batch())
    other = fasttta.adapt(tiny_model(), "read")
    other.load_tuned({k: v.double() for k, v in moved.items()})
    assert torch.equal(other.predict(*tiny_batch()), logits)
    some = {"blocks_u.0.attn.v.bias": torch.ones(12)}
    other.load_tuned(some)
    assert torch.equal(other.tuned["blocks_u.0.attn.v.bias"], torch.ones(12))
    assert torch.equal(other.tuned["blocks_u.0.attn.k.bias"], moved["blocks_u.0.attn.k.bias"])
    before = other.tuned
    good = {"blocks_u.0.attn.v.bias": torch.zeros(12)}
    for bad, error, match in (
        ({**good, "blocks_u.0.attn.q.bias": torch.ones(12, device="meta")}, ValueError, "on meta"),
        (
            {**good, "blocks_u.0.attn.q.bias": torch.full((12,), 1e300, dtype=torch.float64)},
            ValueError,
            "non-f",
        ),
        ({**good, "nothing": torch.ones(3)}, ValueError, "'nothing' is not tuned; tuned: blocks_u"),
        ({**good, "blocks_u.0.attn.q.bias": torch.ones(3)}, ValueError, r"\(3,\), needed \(12,\)"),
        ({**good, "blocks_u.0.attn.q.bias": torch.ones(12).int()}, TypeError, "floating point"),
        (
            {**good, "blocks_u.0.attn.q.bias": torch.full((12,), torch.nan)},
            ValueError,
            "non-finite",
        ),
    ):
        with pytest.raises(error, match=match):
            other.load_tuned(bad)
        assert all(torch.equal(x, before[name]) for name, x in other.tuned.items())
    checkpoint = other.checkpoint()
    other.load_tuned({"blocks_u.0.attn.v.bias": torch.full((12,), 2.0)})
    other.rollback(checkpoint)  # whose memory load_tuned does not write to
    assert all(torch.equal(x, before[name]) for name, x in other.tuned.items())


def test_moving_is_refused(tiny_model):
    adapted = fasttta.adapt(tiny_model(), "read")
    assert adapted.to("cpu") is adapted
    assert adapted.float() is adapted
    for move in (adapted.double, lambda: adapted.to("meta"), adapted.half):
        with pytest.raises(RuntimeError, match="move or convert the model first"):
            move()
    assert "tuned=468 values" in repr(adapted)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "source"])
@pytest.mark.parametrize(
    ("place", "error"), [("forward", RuntimeError), ("forward", KeyboardInterrupt),
                         ("result", KeyboardInterrupt)],
)  # fmt: skip
def test_failure_after_the_update_rolls_back(
    tiny_model, tiny_batch, monkeypatch, method, place, error
):
    """A step whose second forward dies, or what makes its result, leaves the state as it was."""
    options = {**METHODS[method], "score_at": "after"}
    if method == "eata":  # else it finds no sample that counts
        options |= {"e_margin": 5.0, "d_margin": 2.0}
    adapted = fasttta.adapt(tiny_model(), method, **options)
    twin = fasttta.adapt(tiny_model(), method, **options)
    for each in (adapted, twin):
        each.step(*tiny_batch())
    before, changed = snapshot(adapted), []

    def dies(self, *_):
        # the tensors that the step runs on: the state itself is replaced at its end
        changed.extend(differing(before, {**before, **adapted._state._written()}))
        raise error("out of memory")

    if place == "forward":
        monkeypatch.setattr(Step, "_logits", dies)
        monkeypatch.setattr(KeptPasses, "predict", dies)
    else:
        monkeypatch.setattr(Step, "_result", dies)
    with pytest.raises(error, match="out of memory"):
        adapted.step(*tiny_batch(seed=2))
    monkeypatch.undo()
    for part in ("tuned.", "adam.exp_avg.", "adam.exp_avg_sq.", "adam.step."):
        assert any(name.startswith(part) for name in changed), part
    assert differing(before, adapted) == []
    assert same(adapted.step(*tiny_batch(seed=3)), twin.step(*tiny_batch(seed=3)))


def test_deepcopy_is_independent(tiny_model, tiny_batch):
    adapted = fasttta.adapt(tiny_model(), "read", lr=1e-3)
    adapted(*tiny_batch())
    twin = copy.deepcopy(adapted)
    state = snapshot(adapted)
    assert same(twin.step(*tiny_batch(seed=2)), twin_expected := copy.deepcopy(adapted).step(
        *tiny_batch(seed=2)
    ))  # fmt: skip
    assert differing(state, adapted) == []
    assert same(adapted.step(*tiny_batch(seed=2)), twin_expected)


def test_saving_leaves_other_files_alone(tiny_model, tiny_batch, tmp_path):
    other = tmp_path / "state-of-the-art.safetensors"
    other.write_bytes(b"mine")
    adapted = fasttta.adapt(tiny_model(), "read")
    for s in range(3):
        adapted(*tiny_batch(seed=s))
        adapted.save(tmp_path)
    assert other.read_bytes() == b"mine"
    assert len(list(tmp_path.iterdir())) == 3
    model = tiny_model()
    with torch.no_grad():
        model.blocks_v[0].mlp.fc1.weight.mul_(2)  # frozen, and not what READ tunes
    with pytest.raises(ValueError, match="another model.*or its ModelSpec differ"):
        fasttta.load(model, tmp_path)
