"""Adapted models: calls, states, single images."""

FAULTS = [
    (
        "head-losses-sum",
        "fasttta/adapted_head.py",
        '{name: x.mean() for name, x in stacked("losses").items()}',
        '{name: x.sum() for name, x in stacked("losses").items()}',
        "test_rada_models.py::test_several_images_are_as_many_episodes",
    ),
    (
        "head-n-used",
        "fasttta/adapted_head.py",
        "torch.stack([part.n_used for part in parts]).sum()",
        "parts[0].n_used",
        "test_rada_models.py::test_several_images_are_as_many_episodes",
    ),
    (
        "clip-noise-of-others",
        "fasttta/adapted_clip.py",
        "return noise if noise is None or len(noise) == 1 else noise[rows]",
        "return noise",
        "test_adapted_clip.py::test_each_image_has_its_noise",
    ),
    (
        "clip-reset-keeps-the-prompt",
        "fasttta/adapted_clip.py",
        "self._publish(self._source_prompt)",
        "pass",
        "test_adapted_clip.py::test_a_prompt_to_start_from",
    ),
    (
        "clip-source-prompt-adapted",
        "fasttta/adapted_clip.py",
        "wanted = self._source_prompt if self._in_source else self._start",
        "wanted = self._start",
        "test_adapted_clip.py::test_a_prompt_to_start_from",
    ),
    (
        "guard-does-not-reset",
        "fasttta/adapted.py",
        ("                self._state.reset()\n            else:"),
        ("                self._state.commit({})\n            else:"),
        "test_guard.py::test_begins_anew[tent]",
    ),
    (
        "source-block-is-adapted",
        "fasttta/adapted.py",
        "value = self._step.method.unadapted(self._state.source[name])",
        "value = self._state.leaves[name].detach()",
        "test_state.py::test_source_block[read]",
    ),
    (
        "guard-not-undone",
        "fasttta/adapted.py",
        "                result = self._step(inputs, **given)\n",
        (
            "                result = self._step(inputs, **given)\n"
            "                self._state.commit(values)\n"
            "                self._state.begin()\n"
        ),
        "test_guard.py::test_a_step_that_reports_nothing_of_the_name_is_undone[abpem]",
    ),
    (
        "head-without-restore",
        "fasttta/adapted.py",
        "                results.append(result)\n",
        (
            "                results.append(result)\n"
            "                self._state.commit(values)\n"
            "                self._state.begin()\n"
        ),
        "test_rada_models.py::test_a_refused_image_undoes_those_before_it[image]",
    ),
    (
        "model-verified-whatever-it-says",
        "fasttta/adapted.py",
        "verified = self._known.verify(prepared)",
        "verified = True",
        "test_families.py::test_a_patched_module_is_noticed",
    ),
]
