"""Faults in what keeps, saves and shares the state."""

STATE, INTERRUPTS, GRAPH = (
    f"fasttta/engine/{name}.py" for name in ("state", "interrupts", "graph")
)
FOLDER, RECORD = "fasttta/engine/folder.py", "fasttta/engine/record.py"
STEP = "fasttta/engine/step.py"
BASE, SAVED = "fasttta/adapted/base.py", "fasttta/adapted/saved.py"

FAULTS = [
    (
        "a step that fails is not undone", STATE,
        "        self.sync()\n        self._live = None\n", "        self.sync()\n",
        "engine/test_state.py::test_failure_after_the_update_rolls_back[forward-RuntimeError-read]",
    ),
    (
        "a step leaves the state where it was", STATE,
        "        self.current = snapshot\n        self._live = snapshot\n",
        "        self._live = snapshot\n",
        "engine/test_state.py::test_reset_is_bitwise[read]",
    ),
    (
        "the guard's values are not those of the step", STATE,
        "snapshot = self._captured(guard, written)",
        "snapshot = self._captured(self.current.guard, written)",
        "engine/test_guard.py::test_begins_anew[read]",
    ),
    (
        "a cleanup that is interrupted is left", INTERRUPTS,
        "            cleanup()\n    finally:\n        cleanup()\n",
        "            cleanup()\n    finally:\n        pass\n",
        "engine/test_interruptions.py::test_every_line_that_puts_the_state[source-files1]",
    ),
    (
        "no lock", BASE,
        "        with self._lock():\n            return method(self, *args, **kwargs)",
        "        return method(self, *args, **kwargs)",
        "engine/test_threads.py::test_no_step_is_lost[read]", "engine/test_threads.py::test_everything_at_once",
    ),
    (
        "a captured step goes on from buffers of no state", GRAPH,
        "published, self.published = self.published, None", "published = self.published",
        "engine/test_interruptions.py::test_a_step_on_buffers_that_ends_before_it_is_published",
    ),
    (
        "the state is memory of the buffers", GRAPH,
        "tokens, count = _copied([[x] for x in newest])",
        "tokens, count = newest",
        "engine/test_state_dict.py::test_handles_of_steps_on_buffers",
    ),
    (
        "the state is memory of the caller", STEP,
        "    if not shared:\n        return state\n", "    return state\n",
        "methods/test_custom_methods.py::test_one_that_tunes_nothing_and_keeps_a_batch",
    ),
    (
        "a gradient whose square overflows counts", STEP,
        "limit = torch.finfo(largest[0].dtype).max ** 0.5",
        "pass",
        "engine/test_records.py::test_a_gradient_whose_square_overflows_is_left_out",
    ),
    (
        "a load gives up where another save came between", FOLDER,
        "if _record(folder)[1] == name:", "if True:",
        "engine/test_sharing.py::test_a_load_goes_on_where_the_record_has_moved_on",
    ),
    (
        "without a lock files of others are removed", FOLDER,
        "if alone or now - path.stat().st_mtime > _OLD:", "if True:",
        "engine/test_sharing.py::test_what_killed_saves_leave_is_removed_and_nothing_else",
    ),
    (
        "a save removes whatever lies in the folder", FOLDER,
        "if path.name == current or not (", "if path.name in (current, RECORD) or False and not (",
        "engine/test_sharing.py::test_what_killed_saves_leave_is_removed_and_nothing_else",
    ),
    (
        "files get their names before they are on the disk", FOLDER,
        "        os.fsync(file.fileno())\n", "",
        "engine/test_sharing.py::test_files_are_on_the_disk_before_they_get_their_names",
    ),
    (
        "the record's own checksum is not compared", RECORD,
        'if record.get("checksum") != _checksum(record) or version == 1:', "if version == 1:",
        "engine/test_records.py::test_one_checksum_over_everything",
    ),
    (
        "NaN in a saved tensor", STATE,
        "if (x.is_floating_point() or x.is_complex()) and not torch.isfinite(x).all():",
        "if False:",
        "engine/test_records.py::test_tensors", "engine/test_records.py::test_constants",
    ),
    (
        "a saved method state is taken as it is", STATE,
        '    check_saved(method, model, groups["constant"], groups["method"])\n', "",
        "engine/test_records.py::test_tensors",
    ),
    (
        "a checkpoint of another object is taken", SAVED,
        "if handle._owner is not self._owner:", "if False:",
        "engine/test_state_dict.py::test_checkpoint_and_rollback[read]",
    ),
    (
        "a state_dict of other settings is taken", SAVED,
        "                self._check_same(record)\n", "",
        "engine/test_state_dict.py::test_state_dicts_that_do_not_fit",
    ),
    (
        "damaged tensors in a state_dict", SAVED,
        'if records.tensors_digest(tensors) != record["sha256"]:', "if False:",
        "engine/test_state_dict.py::test_state_dicts_that_do_not_fit",
    ),
    (
        "a method that no image runs is taken", "fasttta/families/__init__.py",
        "if isinstance(method, Episodic) or kind is Source:",
        "if True:",
        "methods/test_custom_methods.py::test_what_would_not_be_run_is_refused",
    ),
    (
        "a record without its class is read by name", SAVED,
        "if cls is None and path is not None:", "if False:",
        "methods/test_custom_methods.py::test_saved_and_loaded_by_its_class",
    ),
    (
        "episodes begin with what adapt made, whatever was loaded", STATE,
        "                self._recovery.start_at(self._starts())\n", "                pass\n",
        "engine/test_launches.py::test_recovery_follows_another_start",
    ),
    (
        "each tensor is copied on its own", STATE,
        "        torch._foreach_copy_([*tensors.values()], [values[name] for name in tensors])\n",
        "        for name, x in tensors.items():\n            x.copy_(values[name])\n",
        "engine/test_launches.py::test_what_keeps_and_restores_the_state[tent]",
    ),
]  # fmt: skip
