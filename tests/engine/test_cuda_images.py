"""What only a GPU can show of episodes on images: one replay, no waiting, the eager numbers."""

from __future__ import annotations

import pytest
import torch
from clips import METHODS, adapt, image, tiny_clip, tiny_views

from fasttta import methods

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

EPISODES = [name for name in METHODS if name != "source"]
OPTIONS = {"a-tpt": {"steps": 2}, "tpt": {"steps": 2}, "r-tpt": {"drop_self": (True, False) * 4}}


@pytest.fixture(scope="module")
def model():
    """Nothing may change it."""
    return tiny_clip().cuda()


def pair(model, method, **options):
    options = {"precision": "fp64", **OPTIONS.get(method, {}), **options}
    return (adapt(model, method, engine=engine, **options) for engine in ("eager", "graph"))


def close(a, b):
    assert torch.allclose(a.logits, b.logits, atol=1e-9)
    assert torch.allclose(a.logits_before, b.logits_before, atol=1e-9)
    assert int(a.n_used) == int(b.n_used)
    assert a.stats.keys() == b.stats.keys()
    for name, x in a.stats.items():
        assert torch.allclose(x.double(), b.stats[name].double(), atol=1e-7), name


@pytest.mark.parametrize("method", EPISODES)
def test_captured_episodes(model, method):
    """One image, several, fewer; with another prompt; bit-identical twice; without waiting."""
    eager, graph = pair(model, method)
    images = [[tiny_views(8, seed=s).to("cuda") for s in range(n)] for n in (1, 3, 2, 3)]
    first = None
    for again in range(2):
        for group in images:
            torch.cuda.synchronize()
            if again:
                torch.cuda.set_sync_debug_mode("error")
            try:
                result = graph.step(group)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            close(result, eager.step(group))
            first = result if first is None else first
    assert torch.equal(graph.step(images[0]).logits, first.logits)
    assert [list(plans) for plans in graph._captured.plans.values()] == [[1, 3]]
    assert all(p.graph is not None for plans in graph._captured.plans.values()
               for p in plans.values())  # fmt: skip
    if method in ("tpt", "a-tpt"):
        moved = {"prompt": graph.tuned["prompt"] + 0.1}
        graph.load_tuned(moved)
        eager.load_tuned(moved)
        close(graph.step(images[1]), eager.step(images[1]))
        graph.reset()
        assert torch.equal(graph.step(images[0]).logits, first.logits)


@pytest.mark.parametrize("engine", ["eager", "graph"])
@pytest.mark.parametrize("method", EPISODES)
def test_same_numbers_as_on_the_cpu(method, engine):
    gpu = adapt(tiny_clip().cuda(), method, precision="fp64", engine=engine)
    cpu = adapt(tiny_clip(), method, precision="fp64")
    picture = image(0)
    for _ in range(2):
        result, expected = gpu.step(picture.cuda()), cpu.step(picture)
        assert torch.allclose(result.logits.cpu(), expected.logits, atol=1e-4)


@pytest.mark.parametrize("method", EPISODES)
def test_a_bad_image_leaves_the_others_alone(model, method):
    _, graph = pair(model, method)
    good, bad = (tiny_views(8, seed=s).to("cuda") for s in (2, 5))
    expected = graph.step([good, good])
    bad.base[:, 1, 3, 3] = torch.nan
    result = graph.step([good, bad])
    assert torch.equal(result.logits[0], expected.logits[0])
    assert int(result.n_used) == 1
    assert torch.equal(graph.step([good, good]).logits, expected.logits)


def test_rada(model):
    eager, graph = (
        adapt(model, "rada", views=8, heads=3, precision="fp64", engine=engine)
        for engine in ("eager", "graph")
    )
    for s in range(3):
        views = tiny_views(8, seed=s).to("cuda")
        close(graph.step(views=views), eager.step(views=views))
    assert methods.by_name("rada") is type(graph.options)


def test_an_episode_that_cannot_be_captured_spoils_nothing():
    class Waiting(type(tiny_clip())):
        def encode_image(self, pixels):
            pixels.sum().item()
            return super().encode_image(pixels)

    model = tiny_clip()
    model.__class__ = Waiting
    stream, views = torch.cuda.current_stream(), tiny_views(8).to("cuda")
    graph = adapt(model.cuda(), "tpt", engine="graph", precision="fp64")
    for _ in range(2):
        with pytest.raises(RuntimeError, match='use engine="eager"'):
            graph.step(views=views)
    assert torch.cuda.current_stream() == stream
    eager, other = pair(tiny_clip().cuda(), "tpt")
    close(other.step(views=views), eager.step(views=views))
