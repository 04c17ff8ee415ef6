"""Adapted models: calls, states, single images."""

FAULTS = [
    (
        "head-losses-sum",
        "fasttta/engine/episode.py",
        "torch.cat([loss[name] for loss in losses]).mean()",
        "torch.cat([loss[name] for loss in losses]).sum()",
        "models/test_rada_models.py::test_several_images_are_as_many_episodes",
    ),
    (
        "head-n-used",
        "fasttta/engine/episode.py",
        "torch.cat([part.used for part in parts]).sum()",
        "parts[0].used.sum()",
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
        "    def _first_state(self) -> Tensor:\n        return self._source_prompt\n",
        "    def _first_state(self) -> Tensor:\n        return self._start\n",
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
        "                result = self._step(inputs, **options)\n",
        (
            "                result = self._step(inputs, **options)\n"
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
        "verified = self._family.verify(prepared)",
        "verified = True",
        "families/test_families.py::test_a_patched_module_is_noticed",
    ),
    (
        "warmup-leaves-its-state",
        "fasttta/adapted/warmup.py",
        "            adapted._publish(state)\n",
        "            pass\n",
        "adapted/test_warmup.py::test_the_state_is_the_same_to_the_bit",
    ),
    (
        "warmup-that-fails-leaves-its-state",
        "fasttta/adapted/warmup.py",
        "        finally:\n            adapted._warned_single = warned\n            adapted._publish(state)\n",
        "        except ZeroDivisionError:\n            pass\n        adapted._publish(state)\n",
        "adapted/test_warmup.py::test_a_failure_changes_nothing",
    ),
    (
        "warmup-draws-random-numbers",
        "fasttta/adapted/warmup.py",
        "with torch.random.fork_rng([device]",
        "with torch.random.fork_rng([], False) if True else torch.random.fork_rng([device]",
        "adapted/test_warmup.py::test_a_failure_changes_nothing",
    ),
    (
        "warmup-of-a-full-window-only",
        "fasttta/adapted/warmup.py",
        "        adapted._publish(adapted._first_state())\n",
        "",
        "adapted/test_warmup.py::test_every_count_of_samples_in_a_window_on_a_gpu",
    ),
]
