"""Adapted models: calls, states, single images."""

FAULTS = [
    (
        "head-losses-sum",
        "fasttta/adapted/head.py",
        '{name: x.mean() for name, x in stacked("losses").items()}',
        '{name: x.sum() for name, x in stacked("losses").items()}',
        "models/test_rada_models.py::test_several_images_are_as_many_episodes",
    ),
    (
        "head-n-used",
        "fasttta/adapted/head.py",
        "torch.stack([part.n_used for part in parts]).sum()",
        "parts[0].n_used",
        "models/test_rada_models.py::test_several_images_are_as_many_episodes",
    ),
    (
        "clip-noise-of-others",
        "fasttta/adapted/images.py",
        "return noise if noise is None or len(noise) == 1 else noise[rows]",
        "return noise",
        "adapted/test_adapted_clip.py::test_each_image_has_its_noise",
    ),
    (
        "clip-reset-keeps-the-prompt",
        "fasttta/adapted/images.py",
        "self._publish(self._source_prompt)",
        "pass",
        "adapted/test_adapted_clip.py::test_a_prompt_to_start_from",
    ),
    (
        "clip-source-prompt-adapted",
        "fasttta/adapted/images.py",
        "wanted = self._source_prompt if self._in_source else self._start",
        "wanted = self._start",
        "adapted/test_adapted_clip.py::test_a_prompt_to_start_from",
    ),
    (
        "guard-does-not-reset",
        "fasttta/adapted/fusion.py",
        ("                self._state.reset()\n            else:"),
        ("                self._state.commit({})\n            else:"),
        "engine/test_guard.py::test_begins_anew[tent]",
    ),
    (
        "source-block-is-adapted",
        "fasttta/adapted/fusion.py",
        "value = self._step.model.source_value(self._state.source[name])",
        "value = self._state.leaves[name].detach()",
        "engine/test_state.py::test_source_block[read]",
    ),
    (
        "guard-not-undone",
        "fasttta/adapted/fusion.py",
        "                result = self._step(inputs, **given)\n",
        (
            "                result = self._step(inputs, **given)\n"
            "                self._state.commit(values)\n"
            "                self._state.begin()\n"
        ),
        "engine/test_guard.py::test_a_step_that_reports_nothing_of_the_name_is_undone[abpem]",
    ),
    (
        "head-without-restore",
        "fasttta/adapted/fusion.py",
        "                results.append(result)\n",
        (
            "                results.append(result)\n"
            "                self._state.commit(values)\n"
            "                self._state.begin()\n"
        ),
        "models/test_rada_models.py::test_a_refused_image_undoes_those_before_it[image]",
    ),
    (
        "model-verified-whatever-it-says",
        "fasttta/adapted/fusion.py",
        "verified = self._known.verify(prepared)",
        "verified = True",
        "families/test_families.py::test_a_patched_module_is_noticed",
    ),
]
