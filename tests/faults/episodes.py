"""Captured episodes of images."""

GRAPH = "fasttta/engine/episode_graph.py"

FAULTS = [
    (
        "episode-graph-keeps-the-start",
        GRAPH,
        "self._held[0] is now[0] and self._held[1] == now[1]",
        "True",
        "engine/test_episode_graph.py::test_starts_and_their_switches[tpt]",
    ),
    (
        "episode-graph-holds-half-a-start",
        GRAPH,
        "        self._held = None  # until it is computed the buffers hold a mixture\n",
        "        self._held = now\n",
        "engine/test_episode_graph.py::test_an_interrupted_start_is_computed_again",
    ),
    (
        "episode-graph-returns-buffers",
        GRAPH,
        "return {name: x[:size].clone() for name, x in tensors.items()}",
        "return {name: x for name, x in tensors.items()}",
        "engine/test_episode_graph.py::test_same_bits_as_eager[tpt-options0]",
    ),
    (
        "episode-graph-mixes-up-regions",
        GRAPH,
        "regions if alone else regions[:1]",
        "regions[:1]",
        "engine/test_episode_graph.py::test_images_with_and_without_a_region",
    ),
    (
        "episode-graph-old-noise",
        GRAPH,
        "            self.noise[: len(views)].copy_(rows)\n",
        "",
        "engine/test_episode_graph.py::test_noise_of_the_caller",
    ),
    (
        "episode-graph-wide-places",
        GRAPH,
        "(size if alone else 2 * size)",
        "10 * size",
        "engine/test_episode_graph.py::test_a_much_smaller_group_is_captured_anew",
    ),
    (
        "prompt-of-a-bad-image-moves",
        "fasttta/engine/episode.py",
        "torch.where(finite[:, None, None], self.value.detach(), before)",
        "self.value.detach()",
        "engine/test_episode_graph.py::test_a_bad_image_leaves_the_others_alone[tpt]",
    ),
    (
        "views-missing-from-a-captured-image",
        "fasttta/engine/graph.py",
        "views = len(inputs[0]) if self.state.episodic else None",
        "views = None",
        "models/test_rada_models.py::test_views_on_static_buffers",
    ),
]
