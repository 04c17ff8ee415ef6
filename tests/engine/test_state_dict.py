"""The whole state in memory: state_dict, pickle, copies, checkpoints, parameters."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from cases import METHODS, differing, same, snapshot
from clips import EOT, image, tiny_clip, tiny_ids
from fusions import FUSIONS, build
from lookalikes import HFCLIP

import fasttta

IMAGES = {
    "tpt": {"views": 4, "select": 0.5},
    "source": {},
    "rada": {"heads": 3, "views": 4, "select": 0.5},
}


def fusion(tiny_model, method, **options):
    guard = None if method == "source" else fasttta.ShiftDetector(4)
    return fasttta.adapt(tiny_model(), method, guard=guard, **{**METHODS[method], **options})


def through_file(value, weights_only=True):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


# ways to carry a state over: (adapted, a fresh one) -> one with the state
WAYS = {
    "state_dict": lambda adapted, fresh: (
        fresh.load_state_dict(through_file(adapted.state_dict())),
        fresh,
    )[1],
    "pickle": lambda adapted, fresh: pickle.loads(pickle.dumps(adapted)),
    "torch.save": lambda adapted, fresh: through_file(adapted, weights_only=False),
    "deepcopy": lambda adapted, fresh: copy.deepcopy(adapted),
}


@pytest.mark.parametrize("way", WAYS)
def test_bit_exact(tiny_model, tiny_batch, method, way):
    adapted, fresh = fusion(tiny_model, method), fusion(tiny_model, method)
    for seed in range(3):
        adapted.step(*tiny_batch(seed=seed))
    before = snapshot(adapted)
    carried = WAYS[way](adapted, fresh)
    assert differing(before, carried) == []
    assert differing(before, adapted) == []
    for seed in (5, 6):
        assert same(adapted.step(*tiny_batch(seed=seed)), carried.step(*tiny_batch(seed=seed)))
    assert differing(adapted, carried) == []
    carried.reset()
    assert differing(fusion(tiny_model, method), carried) == []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", IMAGES)
def test_bit_exact_on_images(name, way):
    def make():
        return fasttta.adapt(tiny_clip(), name, classes=tiny_ids(), **IMAGES[name])

    adapted = make()
    if adapted.tuned:
        adapted.load_tuned({n: x + 0.1 for n, x in adapted.tuned.items()})
    adapted.step(image(1))
    carried = WAYS[way](adapted, make())
    assert differing(adapted, carried) == []
    assert same(adapted.step(image(2)), carried.step(image(2)))


@pytest.mark.parametrize("name", FUSIONS)
def test_models_by_a_spec_can_be_pickled(name):
    model = build(name)
    adapted = fasttta.adapt(model, "read", spec=model.spec, lr=1e-2)
    adapted.step(*model.batch(4))
    again = pickle.loads(pickle.dumps(adapted))
    assert same(adapted.step(*model.batch(4, seed=1)), again.step(*model.batch(4, seed=1)))
    assert differing(adapted, again) == []


def test_a_pickled_model_shares_its_frozen_weights(tiny_model, tiny_batch):
    """A pickle holds the model once, and is not twice its size."""
    adapted = fasttta.adapt(tiny_model(), "read")
    again = pickle.loads(pickle.dumps(adapted))
    weight = again.unwrap().blocks_a[0].mlp.fc1.weight
    assert again._hidden[1].blocks_a[0].mlp.fc1.weight.data_ptr() == weight.data_ptr()


def test_converted_clips_can_be_pickled():
    """Hugging Face's structure with an end token of its own, and what it is converted to."""
    adapted = fasttta.adapt(HFCLIP("gelu", eos=EOT), "tpt", classes=tiny_ids(), **IMAGES["tpt"])
    again = pickle.loads(pickle.dumps(adapted))
    assert same(adapted.step(image(1)), again.step(image(1)))
    merged = adapted.unwrap(merge=True)
    assert merged.find_end is not None
    copied = pickle.loads(pickle.dumps(merged))
    assert torch.equal(copied.encode_text(tiny_ids()), merged.encode_text(tiny_ids()))


def test_another_process_unpickles_it(tiny_model, tiny_batch, tmp_path):
    adapted = fasttta.adapt(tiny_model(), "read", lr=1e-3)
    adapted.step(*tiny_batch())
    torch.save((adapted, tiny_batch(seed=3)), tmp_path / "adapted.pt")
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        f"adapted, batch = torch.load({str(tmp_path / 'adapted.pt')!r}, weights_only=False)\n"
        f"torch.save(adapted.step(*batch).logits, {str(tmp_path / 'logits.pt')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    expected = adapted.step(*tiny_batch(seed=3)).logits
    logits = torch.load(tmp_path / "logits.pt")
    assert torch.allclose(logits, expected, rtol=0, atol=1e-5)


def test_as_part_of_a_larger_module(tiny_model, tiny_batch):
    class Service(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Linear(2, 2)
            self.adapted = fasttta.adapt(tiny_model(), "read", lr=1e-3)

    service = Service()
    service.adapted.step(*tiny_batch())
    state = through_file(service.state_dict())
    assert "adapted.metadata" in state
    assert "scale.weight" in state
    other = Service()
    other.load_state_dict(state)
    assert differing(service.adapted, other.adapted) == []
    assert torch.equal(service.scale.weight, other.scale.weight)


def test_state_dicts_that_do_not_fit(tiny_model, tiny_batch):
    adapted = fusion(tiny_model, "abpem")
    for seed in range(3):
        adapted.step(*tiny_batch(seed=seed))
    good, before = adapted.state_dict(), snapshot(adapted)
    changed = {n: x.clone() for n, x in good.items()}
    changed["tuned.blocks_u.0.attn.qkv.bias"][0] += 1
    fewer = {n: x for n, x in good.items() if n != "random"}
    text = {**good, "metadata": good["metadata"][:-3]}
    other = fusion(tiny_model, "abpem", lr=5e-3)
    for state, match in (
        (changed, "not those that were saved"),
        (fewer, "not those that were saved"),
        ({**good, "more": torch.ones(2)}, "not those that were saved"),
        (text, "state_dict: is damaged"),
        ({n: x for n, x in good.items() if n != "metadata"}, "metadata is missing"),
        ({}, "metadata is missing"),
        (tiny_model().state_dict(), "metadata is missing"),
        ({**good, "random": 5}, "random: needed a tensor"),
        (fusion(tiny_model, "read").state_dict(), "method: it was saved with 'read'"),
        (other.state_dict(), r"options.lr: it was saved with 0.005, this one has 0.001"),
        (fusion(tiny_model, "abpem", seed=3).state_dict(), "seed: it was saved with 3"),
        (
            fasttta.adapt(tiny_model(seed=4), "abpem", guard=fasttta.ShiftDetector(4),
                          **METHODS["abpem"]).state_dict(),
            "another model",
        ),
        (fasttta.adapt(tiny_model(), "abpem", **METHODS["abpem"]).state_dict(), "guard: it was"),
    ):  # fmt: skip
        for strict in (True, False):
            with pytest.raises(ValueError, match=match):
                adapted.load_state_dict(state, strict=strict)
            assert differing(before, adapted) == []
    with pytest.raises(TypeError):
        adapted.load_state_dict(5)
    adapted.reset()
    adapted.load_state_dict(good)
    assert differing(before, adapted) == []


def test_checkpoint_and_rollback(tiny_model, tiny_batch, method):
    adapted = fusion(tiny_model, method)
    adapted.step(*tiny_batch(seed=0))
    first = adapted.checkpoint()
    states, results = [snapshot(adapted)], []
    for seed in (1, 2):
        results.append(adapted.step(*tiny_batch(seed=seed)))
        states.append(snapshot(adapted))
    second = adapted.checkpoint()
    assert method == "source" or differing(states[0], states[2])
    for _ in range(2):  # a handle is not used up, and later steps do not change it
        adapted.rollback(first)
        assert differing(states[0], adapted) == []
        assert same(adapted.step(*tiny_batch(seed=1)), results[0])
        assert same(adapted.step(*tiny_batch(seed=2)), results[1])
        assert differing(states[2], adapted) == []
        adapted.reset()
        adapted.rollback(second)
        assert differing(states[2], adapted) == []
    twin = copy.deepcopy(adapted)
    for other in (twin, fusion(tiny_model, method), pickle.loads(pickle.dumps(adapted))):
        with pytest.raises(ValueError, match="handle is of another adapted model"):
            other.rollback(first)
    with pytest.raises(TypeError, match="handle must come from checkpoint"):
        adapted.rollback(states[0])
    assert differing(states[2], adapted) == []


def test_handles_of_steps_on_buffers(tiny_model, tiny_batch):
    """The window's batches lie in buffers that later steps write to; a handle holds copies."""
    from cases import buffered

    adapted = buffered(fasttta.adapt(tiny_model(), "abpem", **METHODS["abpem"]))
    for seed in range(4):
        adapted.step(*tiny_batch(seed=seed))
    handle, before = adapted.checkpoint(), snapshot(adapted)
    expected = adapted.step(*tiny_batch(seed=4))
    for seed in range(5, 9):
        adapted.step(*tiny_batch(seed=seed))
    adapted.rollback(handle)
    assert differing(before, adapted) == []
    assert same(adapted.step(*tiny_batch(seed=4)), expected)


def test_parameters_are_the_tuned_tensors(tiny_model, tiny_batch, capsys):
    adapted = fasttta.adapt(tiny_model(), "read", lr=1e-3)
    adapted.step(*tiny_batch())
    named, tuned = dict(adapted.named_parameters()), adapted.tuned
    assert named.keys() == tuned.keys()
    assert all(torch.equal(x, tuned[name]) for name, x in named.items())
    assert all(torch.equal(adapted.get_parameter(name), x) for name, x in tuned.items())
    with pytest.raises(AttributeError, match="'pos_embed_a' is not tuned; tuned: blocks_u.0.attn"):
        adapted.get_parameter("pos_embed_a")
    assert sum(x.numel() for x in adapted.parameters()) == 468
    before = snapshot(adapted)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=1.0)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    adapted.requires_grad_(False).train().zero_grad()
    assert differing(before, adapted) == []
    adapted.step(*tiny_batch(seed=1))
    assert differing(before, adapted)
    adapted.print_tuned()
    total = sum(x.numel() for x in tiny_model().parameters())
    share = f"{100 * 468 / total:.4g} %"
    assert capsys.readouterr().out == (
        f"tuned: 468 of {total:,} values ({share}) in 6 tensors, by 'read'\n"
    )


@pytest.mark.parametrize("name", IMAGES)
def test_device(name, tiny_model):
    assert fasttta.adapt(tiny_model(), "read").device == torch.device("cpu")
    adapted = fasttta.adapt(tiny_clip(), name, classes=tiny_ids(), **IMAGES[name])
    assert adapted.device == torch.device("cpu")
    with pytest.raises(RuntimeError, match="move or convert the model first"):
        adapted.half()
