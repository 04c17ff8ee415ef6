"""The engine: state, steps, buffers, guards, files."""

FAULTS = [
    (
        "no-rollback",
        "fasttta/engine/state.py",
        "            _write(self._written(), wanted.written)\n",
        "",
        (
            "engine/test_state.py::test_failure_after_the_update_rolls_back[forward-RuntimeError-tent]"
        ),
    ),
    (
        "rollback-without-the-method-s-state",
        "fasttta/engine/state.py",
        "self.method, self.constants = wanted.method, wanted.constants\n",
        "self.constants = wanted.constants\n",
        "engine/test_state.py::test_failure_after_the_update_rolls_back[result-KeyboardInterrupt-sar]",
    ),
    (
        "rollback-without-the-generator",
        "fasttta/engine/state.py",
        "        self.generator.set_state(wanted.random)\n",
        "",
        (
            "engine/test_state.py::test_failure_after_the_update_rolls_back[forward-RuntimeError-brimpr]"
        ),
    ),
    (
        "state-shares-memory-with-steps",
        "fasttta/engine/state.py",
        ("                written = _copies(self._written())\n        snapshot"),
        ("                written = self._written()\n        snapshot"),
        (
            "engine/test_state.py::test_failure_after_the_update_rolls_back[forward-RuntimeError-tent]"
        ),
    ),
    (
        "first-state-shares-memory",
        "fasttta/engine/state.py",
        "self._captured({}, _copies(self._written()))",
        "self._captured({}, self._written())",
        "engine/test_state.py::test_reset_is_bitwise[tent]",
    ),
    (
        "reset-without-generator",
        "fasttta/engine/state.py",
        "return replace(self.first, constants=self.current.constants)",
        (
            "return replace(self.first, constants=self.current.constants, "
            "random=self.current.random)"
        ),
        "engine/test_state.py::test_reset_is_bitwise[brimpr]",
    ),
    (
        "state-taken-before-the-step",
        "fasttta/engine/state.py",
        ("                written = _copies(self._written())\n        snapshot"),
        ("                written = self.current.written\n        snapshot"),
        "engine/test_state.py::test_save_and_load_are_bitwise[tent-fp32]",
    ),
    (
        "reset-keeps-the-method-s-state",
        "fasttta/engine/state.py",
        "return replace(self.first, constants=self.current.constants)",
        (
            "return replace(self.first, constants=self.current.constants, "
            "method=self.current.method)"
        ),
        "engine/test_state.py::test_reset_is_bitwise[eata]",
    ),
    (
        "reset-keeps-the-start-of-episodes",
        "fasttta/engine/state.py",
        "return replace(self.first, constants=self.current.constants)",
        ("return replace(self.first, constants=self.current.constants, start=self.current.start)"),
        "models/test_rada_models.py::test_every_image_is_an_episode",
    ),
    (
        "recovery-keeps-adam",
        "fasttta/engine/state.py",
        "values.masked_fill_(flag, 0)",
        "pass",
        "methods/test_eata_sar.py::test_sar_recovers_once",
    ),
    (
        "recovery-at-the-wrong-flag",
        "fasttta/engine/state.py",
        "torch.where(flag, self._begin[dtype], values)",
        "torch.where(flag, values, self._begin[dtype])",
        "methods/test_eata_sar.py::test_sar_recovers_once",
    ),
    (
        "source-weights-are-live",
        "fasttta/engine/state.py",
        "self.source = {name: leaf.detach().clone()",
        "self.source = {name: leaf.detach()",
        "engine/test_state.py::test_source_block[read]",
    ),
    (
        "load-tuned-changes-the-state-s-memory",
        "fasttta/engine/state.py",
        "tuned = {name: begin[name].clone() for name in self.leaves}",
        "tuned = {name: begin[name] for name in self.leaves}",
        "engine/test_state.py::test_tuned_and_load_tuned",
    ),
    (
        "reset-keeps-the-guard-s-values",
        "fasttta/engine/state.py",
        "return replace(self.first, constants=self.current.constants)",
        ("return replace(self.first, constants=self.current.constants, guard=self.current.guard)"),
        "engine/test_guard.py::test_reset_forgets_the_values",
    ),
    (
        "load-tuned-forgets-the-start",
        "fasttta/engine/state.py",
        "start=tuned if self.episodic else self.current.start",
        "start=self.current.start",
        "methods/test_rada.py::test_weights_can_be_given",
    ),
    (
        "saved-without-method-state",
        "fasttta/engine/state.py",
        'tensors |= {f"method.{name}": value for name, value in now.method.items()}',
        "pass",
        "engine/test_state.py::test_save_and_load_are_bitwise[abpem-fp32]",
    ),
    (
        "saved-without-constants",
        "fasttta/engine/state.py",
        'tensors |= {f"constant.{name}": value for name, value in now.constants.items()}',
        "pass",
        "engine/test_state.py::test_save_and_load_are_bitwise[brimpr-fp32]",
    ),
    (
        "saved-without-start",
        "fasttta/engine/state.py",
        ('            tensors |= {f"start.{name}": value for name, value in now.start.items()}'),
        "            pass",
        "methods/test_rada.py::test_episodes_begin_alike",
    ),
    (
        "saved-with-a-fresh-generator",
        "fasttta/engine/state.py",
        '{**now.written, "random": now.random}',
        '{**now.written, "random": self.first.random}',
        "engine/test_state.py::test_save_and_load_are_bitwise[brimpr-fp32]",
    ),
    (
        "seed-unused",
        "fasttta/engine/state.py",
        "torch.Generator().manual_seed(seed)",
        "torch.Generator()",
        "methods/test_brimpr_inputs.py::test_the_seed_is_that_of_the_masks[0]",
    ),
    (
        "tuned-weights-are-the-user-s",
        "fasttta/engine/precision.py",
        "parameter.detach().to(precision.master, copy=True)",
        "parameter.detach().to(precision.master)",
        "adapted/test_adapted.py::test_the_users_model_is_untouched[read]",
    ),
    (
        "tied-weights-untied",
        "fasttta/engine/precision.py",
        "if id(parameter) not in shared:",
        "if True:",
        "adapted/test_adapted.py::test_what_is_one_object_stays_one",
    ),
    (
        "shared-modules-copied-twice",
        "fasttta/models/copies.py",
        "if id(module) in twins:",
        "if False:",
        "adapted/test_adapted.py::test_what_is_one_object_stays_one",
    ),
    (
        "graph-publishes-one-batch-too-many",
        "fasttta/engine/graph.py",
        "self.past = [*self.past, (tokens, count)][-(self._window - 1) :]",
        "self.past = [*self.past, (tokens, count)]",
        "engine/test_graph.py::test_state_is_that_of_eager_steps[abpem]",
    ),
    (
        "graph-publish-counts",
        "fasttta/engine/graph.py",
        ": self.rows[-1]], counts[self.place, 0]",
        ": self.rows[-1]], torch.ones_like(counts[self.place, 0])",
        (
            "adapted/test_numerics.py::test_overflowing_batch_does_not_stay_in_the_window[3-logits-buffers]"
        ),
    ),
    (
        "graph-publishes-its-buffers",
        "fasttta/engine/graph.py",
        "tokens, count = _copied([[x] for x in newest])",
        "tokens, count = newest",
        "engine/test_graph.py::test_a_state_is_apart_from_the_buffers[abpem]",
    ),
    (
        "copy-in-training-mode",
        "fasttta/models/copies.py",
        "new.training = False",
        "new.training = module.training",
        "models/test_model_spec.py::test_a_model_in_training_mode_is_run_in_evaluation_mode",
    ),
    (
        "perturbed-weights-stay",
        "fasttta/engine/step.py",
        "            torch._foreach_copy_(leaves, kept)\n",
        "            pass\n",
        "methods/test_eata_sar.py::test_sar_is_its_formula",
    ),
    (
        "non-finite-gradients-are-taken",
        "fasttta/engine/step.py",
        "< limit) if largest else counted",
        "< limit) * 0 + counted if largest else counted",
        (
            "adapted/test_numerics.py::test_overflowing_batch_does_not_stay_in_the_window[3-gradient-eager]"
        ),
    ),
    (
        "ring-keeps-a-spoiled-batch",
        "fasttta/engine/graph.py",
        'state["places"][1:2]',
        'state["place"]',
        (
            "adapted/test_numerics.py::test_overflowing_batch_does_not_stay_in_the_window[3-logits-buffers]"
        ),
    ),
    (
        "a result is memory of the buffers",
        "fasttta/engine/graph.py",
        "return x.detach().clone() if x.untyped_storage()._cdata in written else x.detach()",
        "return x.detach()",
        "engine/test_graph_options.py::test_a_result_that_is_memory_of_the_state",
    ),
    (
        "two results are one memory",
        "fasttta/engine/graph.py",
        "            copies.append(torch.empty_like(parts[0]))\n",
        "            copies.append(parts[0])\n",
        "engine/test_graph.py::test_a_state_is_apart_from_the_buffers[abpem]",
    ),
    (
        "rows-are-present-as-in-the-last-batch",
        "fasttta/engine/graph.py",
        "if plan.filled != size:",
        "if not plan.filled:",
        "engine/test_graph.py::test_same_as_eager_with_partial_batches[abpem]",
    ),
    (
        "graph-present",
        "fasttta/engine/graph.py",
        "plan.present.fill_(0)[:size].fill_(1)",
        "plan.present.fill_(1)",
        "engine/test_graph.py::test_same_as_eager_with_partial_batches[abpem]",
    ),
    (
        "graph-enters-never-again",
        "fasttta/engine/graph.py",
        "if plan is not self.current or self.state.method is not published:",
        "if plan is not self.current:",
        "engine/test_graph.py::test_a_state_is_apart_from_the_buffers[abpem]",
    ),
    (
        "shift-biased-std",
        "fasttta/engine/shift_detector.py",
        "statistics.stdev(self.values)",
        "statistics.pstdev(self.values)",
        "engine/test_shift_detector.py::test_official_sequence",
    ),
    (
        "update-on-no-sample",
        "fasttta/engine/step.py",
        "if not finite or not objective.apply:",
        "if not finite:",
        "methods/test_eata_sar.py::test_eata_selects",
    ),
    (
        "restored-without-the-guard",
        "fasttta/engine/state.py",
        "            guard=guard,\n",
        "            guard={},\n",
        "engine/test_guard.py::test_saved_with_the_state",
    ),
    (
        "inputs-finite-unchecked",
        "fasttta/engine/step.py",
        "if check_finite and not",
        "if False and not",
        "adapted/test_bad_input.py::test_a_bad_batch_changes_nothing[read]",
    ),
    (
        "autocast-stays",
        "fasttta/engine/step.py",
        "        torch.autocast(device.type, enabled=False),\n",
        "",
        "adapted/test_numerics.py::test_autocast_makes_no_difference",
    ),
    (
        "record-moved-before-the-tensors",
        "fasttta/engine/folder.py",
        (
            "        os.replace(parts[0], folder / name)\n"
            "        _flush(folder)\n"
            "        _write(parts[1], text.encode())\n"
            "        os.replace(parts[1], folder / RECORD)\n"
        ),
        (
            "        _write(parts[1], text.encode())\n"
            "        os.replace(parts[1], folder / RECORD)\n"
            "        os.replace(parts[0], folder / name)\n"
        ),
        "engine/test_state.py::test_interrupted_save_keeps_the_earlier_one",
    ),
    (
        "checksum-of-tensors-unchecked",
        "fasttta/engine/folder.py",
        ('if record["format"] != 1 and records.tensors_digest(tensors) != record["sha256"]:'),
        "if False:",
        "engine/test_state.py::test_damaged_saves",
    ),
    (
        "update-on-a-bad-batch-on-the-device",
        "fasttta/engine/step.py",
        "(1 - _applied(finite, objective))",
        "(1 - _applied(torch.ones_like(finite), objective))",
        "adapted/test_numerics.py::test_device_side_skip[read]",
    ),
]
