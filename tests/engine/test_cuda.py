"""What only a GPU can show: no host synchronisation, device-side skips, CPU's numbers."""

from __future__ import annotations

import pytest
import torch
from cases import tiny_stats

import fasttta
from fasttta import methods
from fasttta.families.cavmae import CavmaeFamily

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

OPTIONS = {
    "abpem": {"k": 3, "window": 2}, "eata": {"e_margin": 9.0}, "sar": {"e_margin": 9.0},
    "brimpr": {"prompts": (2, 3), "source_stats": tiny_stats()}, "rada": {"heads": 3},
}  # fmt: skip


def _adapted(tiny_model, method, device="cuda", **options):
    model = tiny_model().to(device)
    return fasttta.adapt(model, method, lr=1e-3, **OPTIONS.get(method, {}), **options)


def _on_gpu(batch):
    return tuple(x.cuda() for x in batch)


@pytest.mark.parametrize("method", methods.names("fusion"))
def test_same_numbers_as_on_the_cpu(tiny_model, tiny_batch, method):
    gpu = _adapted(tiny_model, method, precision="fp64")
    cpu = _adapted(tiny_model, method, "cpu", precision="fp64")
    for s in range(3):
        result = gpu.step(*_on_gpu(tiny_batch(seed=s)))
        expected = cpu.step(*tiny_batch(seed=s))
        assert result.logits.is_cuda
        assert torch.allclose(result.logits.cpu(), expected.logits, atol=1e-9)
        assert int(result.n_used) == int(expected.n_used)
        for name, x in expected.losses.items():
            assert torch.allclose(result.losses[name].cpu(), x, atol=1e-9), name
    for name, x in cpu.tuned.items():
        assert torch.allclose(gpu.tuned[name].cpu(), x, atol=1e-7), name


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16"])
@pytest.mark.parametrize("method", methods.names("fusion"))
def test_a_step_does_not_wait_for_the_device(tiny_model, tiny_batch, method, precision):
    adapted = _adapted(tiny_model, method, precision=precision)
    batches = [_on_gpu(tiny_batch(seed=s)) for s in range(4)]
    adapted.step(*batches[0])  # kernels are loaded on first use
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[1:]:
            adapted.step(*batch)
            adapted.predict(*batch)
        adapted.reset()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("method", methods.names("fusion"))
def test_bad_input_is_skipped_on_the_device(tiny_model, tiny_batch, method):
    adapted = _adapted(tiny_model, method)
    adapted.step(*_on_gpu(tiny_batch(seed=0)))
    before = adapted.tuned
    audio, video = _on_gpu(tiny_batch(seed=1))
    audio[2, 1, 1] = torch.nan
    result = adapted.step(audio, video)
    assert int(result.n_used) == 0
    assert torch.isnan(result.logits).all()
    assert all(torch.equal(x, before[name]) for name, x in adapted.tuned.items())
    after = adapted.step(*_on_gpu(tiny_batch(seed=2)))
    assert torch.isfinite(after.logits).all()


@pytest.mark.parametrize("engine", ["eager", "graph"])
@pytest.mark.parametrize("size", [None, 4, 12])
def test_stream_from_host_memory(tiny_model, tiny_batch, size, engine):
    """Copied and encoded beside the steps, with the numbers of one after the other."""
    streamed, stepped = (
        fasttta.adapt(tiny_model().cuda(), "abpem", k=3, precision="fp64", engine=e)
        for e in (engine, "eager")
    )
    batches = [tiny_batch(n, seed=s) for s, n in enumerate((5, 5, 3, 5, 4))]
    results = list(streamed.stream(batches, encode_batch=size))
    expected = [stepped.step(*_on_gpu(batch)) for batch in batches]
    for x, y in zip(results, expected, strict=True):
        assert torch.allclose(x.logits, y.logits, atol=1e-9)


@pytest.mark.parametrize("method", methods.names("fusion"))
def test_captured_steps(tiny_model, tiny_batch, tmp_path, method):
    """One replay a step, no waiting, the eager numbers, partial batches and resets included."""
    options = OPTIONS.get(method, {})
    eager, graph = (
        fasttta.adapt(tiny_model().cuda(), method, precision="fp64", engine=e, lr=1e-3, **options)
        for e in ("eager", "graph")
    )
    batches = [_on_gpu(tiny_batch(n, seed=s)) for s, n in enumerate((5, 5, 5, 3, 5, 5))]
    for again in range(2):
        if again:
            eager.reset()
            graph.reset()
        for i, batch in enumerate(batches):
            torch.cuda.synchronize()
            if i or again:
                torch.cuda.set_sync_debug_mode("error")
            try:
                result = graph.step(*batch)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            expected = eager.step(*batch)
            assert torch.allclose(result.logits, expected.logits, atol=1e-9)
            assert torch.allclose(result.logits_before, expected.logits_before, atol=1e-9)
            assert int(result.n_used) == int(expected.n_used)
            for name, x in expected.stats.items():
                assert torch.allclose(result.stats[name].double(), x.double(), atol=1e-9), name
    plans = list(graph._step.plans.values())
    assert len(plans) == 1
    assert plans[0].graph is not None
    bad = _on_gpu(tiny_batch(seed=9))
    bad[0][1, 1, 1] = torch.nan
    before = graph.tuned
    assert int(graph.step(*bad).n_used) == 0
    assert all(torch.equal(x, before[name]) for name, x in graph.tuned.items())
    graph.save(tmp_path)
    loaded = fasttta.load(tiny_model().cuda(), tmp_path, engine="graph")
    batch = _on_gpu(tiny_batch(seed=10))
    assert torch.equal(loaded.step(*batch).logits, graph.step(*batch).logits)


def test_a_step_that_cannot_be_captured_spoils_nothing(tiny_model, tiny_batch):
    """The state and the current stream are as before, eager steps and other captures work."""

    class Waiting(type(tiny_model())):
        def fuse_attention(self, tokens):
            tokens.sum().item()
            return super().fuse_attention(tokens)

    model = tiny_model()
    model.__class__ = Waiting
    batch, stream = _on_gpu(tiny_batch()), torch.cuda.current_stream()
    adapted = fasttta.adapt(model.cuda(), "read", engine="graph", precision="fp64", lr=1e-3)
    before = adapted.tuned
    with pytest.raises(RuntimeError, match='use engine="eager"'):
        adapted.step(*batch)
    assert torch.cuda.current_stream() == stream
    assert all(torch.equal(x, before[name]) for name, x in adapted.tuned.items())
    expected = _adapted(tiny_model, "read", precision="fp64").step(*batch)
    for _ in range(2):
        graph = _adapted(tiny_model, "read", precision="fp64", engine="graph")
        assert torch.allclose(graph.step(*batch).logits, expected.logits, atol=1e-9)
        del graph
        torch.cuda.empty_cache()


def test_captures_do_not_share_what_the_other_frees(tiny_model, tiny_batch):
    """Two captured steps, the first dropped, a third captured: the second still computes."""
    batch = _on_gpu(tiny_batch())
    first, second = (_adapted(tiny_model, "read", engine="graph") for _ in range(2))
    first.step(*batch)
    expected = [second.step(*batch).logits]
    del first
    second.reset()
    _adapted(tiny_model, "tent", engine="graph").step(*batch)
    torch.cuda.empty_cache()
    assert torch.equal(second.step(*batch).logits, expected[0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_on_a_device_that_is_not_the_current_one(tiny_model, tiny_batch, engine):
    """After a capture on the first device, the second's steps are its own."""
    results = []
    for device in ("cuda:0", "cuda:1"):
        adapted = _adapted(tiny_model, "abpem", device, engine=engine, precision="fp64")
        steps = [adapted.step(*(x.to(device) for x in tiny_batch(seed=s))) for s in range(3)]
        results.append([step.logits.cpu() for step in steps])
    for x, y in zip(*results, strict=True):
        assert torch.allclose(x, y, atol=1e-9)


def test_captured_steps_in_low_precision_stay_close(tiny_model, tiny_batch):
    """Over 200 steps with resets the graph errs at most twice as much as eager steps do."""
    runs = {
        (engine, precision): fasttta.adapt(
            tiny_model().cuda(), "abpem", k=3, window=3, lr=1e-4, engine=engine, precision=precision
        )
        for engine, precision in (("eager", "fp64"), ("eager", "bf16"), ("graph", "bf16"))
    }
    errors = {"eager": [], "graph": []}
    for s in range(200):
        batch = _on_gpu(tiny_batch(seed=s))
        if s % 40 == 39:
            for adapted in runs.values():
                adapted.reset()
        logits = {key: adapted.step(*batch).logits.double() for key, adapted in runs.items()}
        for engine, values in errors.items():
            values.append((logits[engine, "bf16"] - logits["eager", "fp64"]).square().mean())
    eager, graph = (torch.stack(errors[e]).mean().sqrt() for e in ("eager", "graph"))
    assert graph <= 2 * eager


def test_state_moves_between_devices(tiny_model, tiny_batch, tmp_path):
    gpu = _adapted(tiny_model, "abpem", precision="fp32")
    for s in range(2):
        gpu.step(*_on_gpu(tiny_batch(seed=s)))
    gpu.save(tmp_path)
    cpu = fasttta.load(tiny_model(), tmp_path)
    assert all(torch.equal(x.cpu(), cpu.tuned[name]) for name, x in gpu.tuned.items())
    logits = cpu.step(*tiny_batch(seed=2)).logits
    assert torch.allclose(logits, gpu.step(*_on_gpu(tiny_batch(seed=2))).logits.cpu(), atol=1e-3)


def test_reset_and_precision(tiny_model, tiny_batch):
    adapted = _adapted(tiny_model, "read", precision="tf32")
    start = adapted.tuned
    adapted.step(*_on_gpu(tiny_batch()))
    adapted.reset()
    assert all(torch.equal(x, start[name]) for name, x in adapted.tuned.items())
    assert _adapted(tiny_model, "read").precision in ("bf16", "fp32")
    with pytest.raises(ValueError, match="audio is on cpu, the model on cuda"):
        adapted.step(*tiny_batch())


def test_a_recognised_module_is_compared_in_float64(tiny_model, tiny_batch):
    """Its convolutions would run in TF32 by default, 1e-3 away from ours."""

    convolving = _Convolving(tiny_model().cuda())
    family = CavmaeFamily("a test's", tiny_model().cuda(), module=convolving)
    assert family.verify(_on_gpu(tiny_batch()))


class _Convolving(torch.nn.Module):
    """A CAV-MAE whose patches are made by convolution, as the official code makes them."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, audio, video, mode):
        m, tokens = self.model, []
        for which, x in (("a", audio.unsqueeze(1).transpose(2, 3)), ("v", video)):
            x = getattr(m, f"patch_embed_{which}").proj(x).flatten(2).transpose(1, 2)
            x = x + getattr(m, f"pos_embed_{which}") + getattr(m, f"modality_{which}")
            for block in getattr(m, f"blocks_{which}"):
                x, _ = block(x)
            tokens.append(x)
        return m.fuse(torch.cat(tokens, dim=1))
