"""Episodes on static buffers, as a CUDA graph replays them, against eager ones.

Without a GPU the buffers are run without capture; tests/engine/test_cuda_images.py captures.
"""

from __future__ import annotations

import copy

import pytest
import torch
from cases import buffered, flat, state_equal
from cases import same as equal
from clips import METHODS, TUNING, adapt, image, tiny_clip, tiny_ids, tiny_views
from host_copies import HostCopies

import fasttta
from fasttta.engine.episode_graph import GraphEpisodes
from fasttta.methods import atpt, by_name
from fasttta.models import CLIP

EPISODES = [name for name in METHODS if name != "source"]
OPTIONS = {
    "tpt": [{"steps": 3}, {"score_at": "before"}, {"augment": False}],
    "c-tpt": [{"steps": 2}],
    "r-tpt": [{"drop_self": (True, False) * 4}, {"weight_decay": 0.0}],
    "a-tpt": [
        {"steps": 2, "tv_loss": True}, {"ensemble": "similarity"}, {"rollout": "gar"},
        {"rollout": "paper", "mask": "top", "tv_map": "pixel", "base_view": "flip"},
        {"augment": False, "score_at": "before"},
    ],
    "mta": [{"augment": True}],
    "ttc": [{"steps": 4}, {"score_at": "before"}],
}  # fmt: skip
CASES = [(name, o) for name in EPISODES for o in ({}, *OPTIONS[name])]


@pytest.fixture(scope="module")
def model():
    """Nothing may change it."""
    return tiny_clip()


@pytest.fixture(params=EPISODES)
def method(request):
    return request.param


def pair(model, method, **options):
    return adapt(model, method, **options), buffered(adapt(model, method, **options))


def sizes_of(adapted):
    """Images of the captured groups, of each kind of input."""
    return [list(plans) for plans in adapted._captured.plans.values()]


@pytest.mark.parametrize(("method", "options"), CASES)
def test_same_bits_as_eager(model, method, options):
    """One image, several, fewer than before, and the first again: twice bit for bit."""
    eager, graph = pair(model, method, **options)
    calls = [image(1), [image(1), image(2, 50, 20), image(3)], [image(4), image(5)], image(1)]
    results = [(graph.step(x), eager.step(x)) for x in calls]
    for a, b in results:
        assert equal(a, b)
    assert equal(results[0][0], results[-1][0])
    assert sizes_of(graph) == [[1, 3]]


@pytest.mark.parametrize("resnet", [False, True])
def test_views_given(resnet, method):
    """With and without a region; another number of views is captured anew."""
    model = tiny_clip(resnet=resnet)
    eager, graph = pair(model, method)
    for n, region in ((8, False), (8, True), (5, False), (8, False)):
        views = tiny_views(n, model.resolution, region=region)
        assert equal(graph.step(views=views), eager.step(views=views))
    assert sizes_of(graph) == [[1]] * 3


def test_images_with_and_without_a_region(model):
    """In one group: each place of the buffers is of its kind."""
    eager, graph = pair(model, "a-tpt")
    plain, given = tiny_views(8), tiny_views(8, seed=3, region=True)
    for items in ([plain, given], [given, plain], [plain, plain], [plain, given, plain]):
        assert equal(graph.step(items), eager.step(items))
    assert sizes_of(graph) == [[2], [2], [2], [3]]


def test_another_number_of_views_in_one_call(model):
    _, graph = pair(model, "tpt")
    with pytest.raises(ValueError, match="the images have 5, 8 views"):
        graph.step([tiny_views(8), tiny_views(5)])


def test_a_much_smaller_group_is_captured_anew(model):
    """The places that it would leave empty cost as much as images."""
    eager, graph = pair(model, "mta")
    for count in (4, 2, 1, 3, 5):
        images = [image(i) for i in range(count)]
        a, b = graph.step(images), eager.step(images)
        assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(flat(a), flat(b), strict=True))
    assert sizes_of(graph) == [[4, 1, 5]]


def test_noise_of_the_caller(model):
    eager, graph = pair(model, "ttc")
    noise = (torch.rand(3, 3, 24, 24) - 0.5) / 40
    images = [image(i, 24, 24) for i in range(3)]
    for given in (noise, None, noise[:1]):
        assert equal(graph.step(images, noise=given), eager.step(images, noise=given))
    assert equal(graph.step(images[:2], noise=noise[:2]), eager.step(images[:2], noise=noise[:2]))
    assert sizes_of(graph) == [[3]]
    with pytest.raises(ValueError, match="noise must be"):
        graph.step(images, noise=noise[:2])


@pytest.mark.parametrize("method", TUNING)
def test_starts_and_their_switches(model, method, tmp_path):
    """Set, saved, loaded, copied, reset, inside ``source()``: the same buffers, no new capture."""
    eager, graph = pair(model, method)
    moved = eager.tuned["prompt"] + 0.1
    for adapted in (eager, graph):
        adapted.step(image(0))
        adapted.load_tuned({"prompt": moved})
    results = [graph.step(image(0))]
    assert equal(results[0], eager.step(image(0)))
    with eager.source(), graph.source():
        assert equal(graph.step(image(0)), eager.step(image(0)))
    assert equal(graph.step(image(0)), results[0])
    graph.save(tmp_path)
    twins = [buffered(fasttta.load(model, tmp_path)), copy.deepcopy(graph)]
    for twin in twins:
        assert state_equal(twin, graph)
        assert equal(twin.step(image(0)), results[0])
    assert twins[1]._captured.plans is not graph._captured.plans
    assert twins[1]._captured.model is twins[1]._clip
    kept = graph.checkpoint()
    graph.reset()
    eager.reset()
    assert equal(graph.step(image(0)), eager.step(image(0)))
    assert not equal(graph.step(image(0)), results[0])
    graph.rollback(kept)
    assert equal(graph.step(image(0)), results[0])
    assert sizes_of(graph) == [[1]]


def test_the_start_is_computed_once(model, monkeypatch):
    _, graph = pair(model, "tpt")
    passes = []
    compute = graph._captured._linearised
    monkeypatch.setattr(graph._captured, "_linearised", lambda: passes.append(1) or compute())
    for _ in range(3):
        graph.step(image(0))
    assert len(passes) == 1
    graph.load_tuned(graph.tuned)
    graph.step(image(0))
    assert len(passes) == 2


def test_trace_runs_eagerly(model, method):
    eager, graph = pair(model, method)
    graph.step(image(0))
    a, b = graph.step(image(0), trace=True), eager.step(image(0), trace=True)
    assert equal(a, b)
    assert a.trace.keys() == b.trace.keys()
    assert a.grads.keys() == b.grads.keys()
    assert graph.step(image(0)).trace is None
    assert sizes_of(graph) == [[1]]


def test_results_do_not_change_later(model, method):
    _, graph = pair(model, method)
    first = graph.step([image(0), image(1)])
    kept = copy.deepcopy(first)
    graph.step([image(2), image(3)])
    graph.step(image(4))
    assert equal(first, kept)


def test_views_of_the_caller_are_copied(model, method):
    """The buffers are no views of the caller's, which may be written to."""
    _, graph = pair(model, method)
    views, other = tiny_views(8), tiny_views(8, seed=9)
    expected = graph.step(views=other)
    graph.step(views=views)
    before = views.base.clone()
    assert equal(graph.step(views=other), expected)
    assert torch.equal(views.base, before)


def test_an_interrupted_start_is_computed_again(model, monkeypatch):
    eager, graph = pair(model, "tpt")
    graph.step(image(0))
    moved = {"prompt": graph.tuned["prompt"] + 0.1}
    graph.load_tuned(moved)
    eager.load_tuned(moved)
    with monkeypatch.context() as patch:
        patch.setattr(graph._captured, "_linearised", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            graph.step(image(0))
    assert equal(graph.step(image(0)), eager.step(image(0)))


def test_a_bad_image_leaves_the_others_alone(model, method, monkeypatch):
    """As on a GPU, where values are not looked at."""
    monkeypatch.setattr(CLIP, "check_pixels", lambda *_: None)
    region_map = atpt.region_map
    monkeypatch.setattr(atpt, "region_map", lambda maps, *a: region_map(maps.nan_to_num(), *a))
    _, graph = pair(model, method)
    good, bad = tiny_views(8), tiny_views(8, seed=5)
    expected = graph.step([good, good])
    bad.base[:, 1, 3, 3] = torch.nan
    result = graph.step([good, bad])
    for name in expected.stats:
        assert torch.equal(result.stats[name][0], expected.stats[name][0]), name
    assert torch.equal(result.logits[0], expected.logits[0])
    assert not result.logits[1].isfinite().all()
    assert int(expected.n_used) == 2
    assert int(result.n_used) == 1
    if method in TUNING:
        assert torch.equal(result.stats["prompt"][1], graph.tuned["prompt"])
    assert equal(graph.step([good, good]), expected)


@pytest.mark.parametrize(("method", "options"), CASES)
def test_nothing_depends_on_values_of_the_device(method, options):
    """On the meta device there are none, and copies from the host are counted."""
    method = by_name(method)(**METHODS[method], **options)
    tower = tiny_clip().to("meta")
    prompts = tower.prompts(tiny_ids(), method.tuned_length if method.group else 0)
    views = tiny_views(8 if method.strategy != "pixels" else 1).to("meta")
    noise = torch.empty(1, 3, 24, 24, device="meta") if method.strategy == "pixels" else None
    graph = GraphEpisodes(method, tower, prompts, capture=False)
    with torch.no_grad(), HostCopies() as copies:
        episodes = graph([views], noise=noise)
    assert episodes.logits.shape == (1, 6)
    assert copies.to_device == []


def test_a_stream(model):
    """Images of one size and several, in an order that a loader gives them."""
    eager, graph = pair(model, "tpt")
    items = [image(0), tiny_views(8), [image(1), image(2)], image(3, 24, 24)]
    for a, b in zip(graph.stream(items), eager.stream(items), strict=True):
        assert equal(a, b)


def test_graph_needs_a_gpu(model):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match='needs a model on a GPU.*use engine="eager"'):
        adapt(model, "tpt", engine="graph")
