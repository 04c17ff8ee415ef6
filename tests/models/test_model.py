"""CAV-MAE: the official forward pass, its modes, checkpoints of every layout."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from fasttta.models import CAVMAE
from fasttta.models.blocks import layers


@pytest.fixture(scope="module")
def official(golden):
    return load_file(golden.root / "model.safetensors")


def test_encode_and_fuse_equal_official(golden, golden_model):
    expected = golden.load("abpem")
    model = golden_model
    audio, video = (x[:2].float() for x in golden.batch(0))
    assert model.spans == (512, 196)
    with torch.no_grad():
        tokens = model.encode(audio, video)
        assert tokens.shape == (2, 708, 48)
        logits = model(audio, video)
        assert torch.equal(model.fuse(tokens), logits)
    if "f32.step0.fusion_input" in expected:
        assert (tokens - expected["f32.step0.fusion_input"][:2]).abs().max() < 5e-5
    assert (logits - expected["f32.step0.logits_before"][:2]).abs().max() < 8e-5


def _plain_attention(attn, x):
    """Softmax attention written out, from the specification rather than from our layers."""
    b, t, dim = x.shape
    h, d = attn.heads, dim // attn.heads
    qkv = (x @ attn.qkv.weight.T + attn.qkv.bias).view(b, t, 3, h, d)
    q, k, v = (qkv[:, :, i].transpose(1, 2) for i in range(3))
    out = (d**-0.5 * q @ k.transpose(-2, -1)).softmax(-1) @ v
    return out.transpose(1, 2).reshape(b, t, dim) @ attn.proj.weight.T + attn.proj.bias


def _norm(norm, x):
    centred = x - x.mean(-1, keepdim=True)
    return (
        centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias
    )


def _plain_block(block, x, suffix=""):
    x = x + _plain_attention(block.attn, _norm(getattr(block, "norm1" + suffix), x))
    y = _norm(getattr(block, "norm2" + suffix), x)
    y = F.gelu(y @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
    return x + y @ block.mlp.fc2.weight.T + block.mlp.fc2.bias


def _plain_encoder(model, x, which):
    embed = getattr(model, f"patch_embed_{which}").proj
    x = x.unsqueeze(1).transpose(2, 3) if which == "a" else x
    x = F.conv2d(x, embed.weight, embed.bias, embed.stride).flatten(2).transpose(1, 2)
    x = x + getattr(model, f"pos_embed_{which}") + getattr(model, f"modality_{which}")
    for block in getattr(model, f"blocks_{which}"):
        x = _plain_block(block, x)
    return x


def _plain_head(model, x):
    linear = model.mlp_head[1]
    return _norm(model.mlp_head[0], x) @ linear.weight.T + linear.bias


def _plain_pool(model, x, which=""):
    suffix = f"_{which}" if which else ""
    for block in model.blocks_u:
        x = _plain_block(block, x, suffix)
    return _norm(getattr(model, "norm" + suffix), x).mean(1)


@pytest.mark.parametrize("depth", [(1, 2, 1), (0, 1, 3)])
def test_every_mode(tiny_model, tiny_batch, depth):
    model = tiny_model(depth=depth).double()
    inputs = dict(zip("av", tiny_batch(dtype=torch.float64), strict=True))
    tokens = {m: _plain_encoder(model, x, m) for m, x in inputs.items()}
    both = torch.cat((tokens["a"], tokens["v"]), 1)
    expected = {"multimodal": _plain_pool(model, both)}
    for m, word in (("a", "audio"), ("v", "video")):
        own = _plain_pool(model, tokens[m], m)
        expected[f"{word}only"] = own
        expected[f"missing{word}only"] = (own + _plain_pool(model, tokens[m])) / 2
    for mode, pooled in expected.items():
        audio = None if "video" in mode else inputs["a"]
        video = None if "audio" in mode else inputs["v"]
        logits = model(audio, video, mode=mode)
        assert torch.allclose(logits, _plain_head(model, pooled), atol=1e-10), mode


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_large_batches_in_parts(tiny_model, tiny_batch, monkeypatch, context):
    """Without gradients, a few samples at a time through all blocks, in place."""
    model, inputs = tiny_model(), tiny_batch()
    kept = [x.clone() for x in inputs]
    with context():
        expected = model.encode(*inputs)
        calls, run = [], model.blocks_a[0].forward
        monkeypatch.setattr(layers, "samples_at_once", lambda tokens: 2)
        monkeypatch.setattr(model.blocks_a[0], "forward", lambda x: calls.append(len(x)) or run(x))
        assert torch.allclose(model.encode(*inputs), expected, atol=1e-6)
    assert calls == [2, 2, 1]
    assert all(map(torch.equal, inputs, kept))


def test_gradients_reach_the_encoders(tiny_model, tiny_batch, monkeypatch):
    """With gradients the encoders are one graph, and nothing changes in place."""
    model = tiny_model()
    monkeypatch.setattr(layers, "samples_at_once", lambda tokens: 2)
    model(*tiny_batch()).sum().backward()
    assert all(x.grad is not None for x in model.blocks_a.parameters() if x.ndim > 1)


def _split(state, names):
    """Adds the split projections of READ's or ABPEM's modules, with values that must not matter."""
    state = dict(state)
    for name in names:
        state[f"module.blocks_u.0.attn.{name}.weight"] = torch.randn(48, 48)
        state[f"module.blocks_u.0.attn.{name}.bias"] = torch.randn(48)
    return state


LAYOUTS = {478: (), 484: ("q", "k", "v"), 490: ("qa", "ka", "va", "qv", "kv", "vv")}


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("keys", LAYOUTS)
def test_layouts(official, golden_model, tmp_path, keys, prefix):
    state = _split(official, LAYOUTS[keys])
    assert len(state) == keys
    if not prefix:
        state = {name.removeprefix("module."): x for name, x in state.items()}
    torch.save(state, tmp_path / "model.pth")
    save_file(state, tmp_path / "model.safetensors")
    for source in (state, tmp_path / "model.pth", str(tmp_path / "model.safetensors")):
        model = CAVMAE.from_checkpoint(source, num_heads=4)
        loaded, expected = model.state_dict(), golden_model.state_dict()
        assert loaded.keys() == expected.keys()
        for name, x in expected.items():
            assert loaded[name].dtype == torch.float32
            assert torch.equal(loaded[name], x.cpu())


def test_wrapped_and_old_pickles(official, tmp_path):
    torch.save({"state_dict": official}, tmp_path / "wrapped.pth")
    torch.save(official, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("wrapped.pth", "old.pth"):
        assert CAVMAE.from_checkpoint(tmp_path / name, num_heads=4).num_classes == 50


def test_sizes_are_inferred(tiny_model, tiny_batch):
    model = tiny_model(hidden=20)
    again = CAVMAE.from_checkpoint(model.state_dict(), num_heads=3)
    assert (again.spans, again.num_classes, again.dim) == ((6, 4), 7, 12)
    assert torch.equal(model(*tiny_batch()), again(*tiny_batch()))
    double = CAVMAE.from_checkpoint(model.double().state_dict(), num_heads=3)
    assert double.norm.weight.dtype == torch.float64


def test_types_and_memory(tiny_model, tiny_batch):
    state = tiny_model().state_dict()
    kept = CAVMAE.from_checkpoint(state, num_heads=3)
    for x in state.values():
        x.zero_()
    assert kept.norm.weight.abs().sum() > 0  # a copy
    mixed = tiny_model().state_dict() | {"norm.bias": torch.zeros(12, dtype=torch.float64)}
    model = CAVMAE.from_checkpoint(mixed, num_heads=3)
    assert {x.dtype for x in model.parameters()} == {torch.float64}
    model(*tiny_batch(dtype=torch.float64))


def test_transposed_audio_is_refused():
    """[B, mel, frames] of the published size has the same number of patches."""
    with torch.device("meta"):
        model = CAVMAE(3, dim=12, num_heads=3, depth=(0, 0, 1))
        video = torch.zeros(1, 3, 224, 224)
        model.check_inputs(torch.zeros(1, 1024, 128), video)
        with pytest.raises(ValueError, match="looks transposed"):
            model.check_inputs(torch.zeros(1, 128, 1024), video)


class _Code:
    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_bad_checkpoints(official, tiny_model, tmp_path, capsys):
    path = tmp_path / "model"

    def fails(match, source=path, error=ValueError, num_heads=4):
        with pytest.raises(error, match=match):
            CAVMAE.from_checkpoint(source, num_heads=num_heads)

    fails("no checkpoint at", error=FileNotFoundError)
    fails("folder", source=tmp_path)
    torch.save({"a": _Code()}, path)
    fails("not a plain checkpoint of tensors")
    with open(path, "wb") as file:
        pickle.dump(_Code(), file)
    fails("not a plain checkpoint of tensors")
    assert "must not run" not in capsys.readouterr().out
    torch.save(official, path)
    data = path.read_bytes()
    for cut in (10, 1000, *range(5000, len(data), len(data) // 40)):
        (tmp_path / "cut").write_bytes(data[:cut])
        fails("damaged|truncated|not a plain checkpoint", source=tmp_path / "cut")
    save_file(official, path)
    (tmp_path / "cut").write_bytes(path.read_bytes()[:5000])
    fails("damaged safetensors", source=tmp_path / "cut")
    (tmp_path / "cut").write_bytes(b"")
    fails("damaged|truncated", source=tmp_path / "cut")
    torch.save([1, 2], path)
    fails("holds an object of type list")
    fails("found nothing", source={})
    fails("epoch", source={**official, "epoch": 3})

    missing = {k: v for k, v in official.items() if "blocks_v.3.attn.proj" not in k}
    fails("2 missing keys: blocks_v.3.attn.proj.bias, blocks_v.3.attn.proj.weight", source=missing)
    fails("mlp_head.1.weight missing", source={
        k: v for k, v in official.items() if "mlp_head.1.weight" not in k
    })  # fmt: skip
    fails("unknown keys: odd", source={**official, "module.odd": torch.zeros(1)})
    fails("normal.*int64|norm.weight int64", source={
        **official, "module.norm.weight": torch.ones(48, dtype=torch.int64)
    })  # fmt: skip
    fails("blocks_a are not numbered", source={
        **official, "module.blocks_a.99999.norm1.weight": torch.ones(48)
    })  # fmt: skip
    wrong = {**official, "module.norm.weight": torch.zeros(3)}
    fails(r"norm.weight \(3,\), needed \(48,\)", source=wrong)
    fails("num_heads=5 does not divide", source=official, num_heads=5)
    pretraining = {k: v for k, v in official.items() if "mlp_head" not in k}
    pretraining["module.decoder_pred_a.weight"] = torch.zeros(3, 3)
    fails("pre-training", source=pretraining)
    fails("not a fine-tuned CAV-MAE", source={"fc.weight": torch.zeros(2, 2)})


def test_bad_inputs_to_forward(tiny_model, tiny_batch):
    model, (audio, video) = tiny_model(), tiny_batch()
    for inputs, error, match in (
        ((audio, video, "both"), ValueError, "mode='both' is unknown"),
        ((None, video, "audioonly"), ValueError, "needs audio, found None"),
        ((audio[0], video), ValueError, "audio must have 3 dimensions"),
        ((audio, video[:, :2]), ValueError, "video has 2 channels, needed 3"),
        ((audio[:, :4], video), ValueError, "positions for 6 tokens"),
        ((audio[:, :, :7], video), ValueError, "1.75 x 3 patches"),
        ((audio[:3], video), ValueError, "audio has 3 samples, video 5"),
        ((audio.int(), video), TypeError, "audio must be floating point"),
        ((audio[:0], video[:0]), ValueError, "audio is an empty batch"),
        ((audio, [1]), TypeError, "video must be a tensor"),
        ((audio, video.to("meta")), ValueError, "video is on meta, the model on cpu"),
    ):
        with pytest.raises(error, match=match):
            model(*inputs)
    for inputs, match in (
        ((audio[0], None, "audioonly"), "audio must have 3 dimensions"),
        ((None, video[:0], "missingvideoonly"), "video is an empty batch"),
        ((None, video[..., :5], "videoonly"), "positions for 4 tokens"),
    ):
        with pytest.raises(ValueError, match=match):
            model(*inputs)
    with pytest.raises(ValueError, match="num_heads=5"):
        CAVMAE(3, dim=12, num_heads=5)
    with pytest.raises(ValueError, match="num_heads='3'"):
        CAVMAE(3, dim=12, num_heads="3")
    with pytest.raises(ValueError, match="needed at least one fusion block"):
        CAVMAE(3, dim=12, num_heads=3, depth=(1, 1, 0))
    with pytest.raises(ValueError, match="group='all' is unknown"):
        model.tunable("all")
