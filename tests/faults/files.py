"""Files from outside, and the folder of the native library."""

ARCHIVE, PICKLE, WEIGHTS = (
    f"fasttta/files/{name}.py" for name in ("archive", "inert_pickle", "weights")
)
CACHE, CONVERT = "fasttta/ops/native_cache.py", "fasttta/models/clip/convert.py"
CAVMAE, FISHER = "fasttta/models/cavmae/model.py", "fasttta/methods/fisher.py"

FAULTS = [
    (
        "every tensor of a script counts as a parameter", ARCHIVE,
        "return self.listed[path].get(record.name.name)", "return None",
        "files/test_files.py::test_a_script_is_read_as_its_state_dict",
    ),
    (
        "a member may unpack to any size", ARCHIVE,
        "member.file_size > _MIB and member.file_size > _MOST_RATIO * member.compress_size",
        "False",
        "files/test_files.py::test_bombs",
    ),
    (
        "a pickle may name any class", PICKLE,
        "if isinstance(name, Name) and (is_script(name) or str(name) in _HARMLESS):",
        "if isinstance(name, Name):",
        "files/test_files.py::test_pickles_are_not_run",
    ),
    (
        "a tensor may reach beyond its storage", PICKLE,
        "(not empty and last >= len(memory))", "(not empty and last > len(memory))",
        "files/test_files.py::test_tensors_stay_in_their_storage",
    ),
    (
        "weights may be NaN", WEIGHTS,
        "return bool(torch.isfinite(ends).all())", "return True",
        "files/test_weights.py::test_unfit_tensors_are_named[not finite]",
    ),
    (
        "others may write to the folder of the library", CACHE,
        "status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)", "False",
        "ops/test_native_cache.py::test_who_may_write",
    ),
    (
        "a library whose checksum differs is loaded", CACHE,
        "return bool(body) and trailer ==", "return bool(body) or trailer ==",
        "ops/test_native_cache.py::test_what_is_intact",
    ),
    (
        "tuned prompts count for no prediction", CAVMAE,
        "self.tuned_prompts = tuned\n", "self.tuned_prompts = False\n",
        "methods/test_tuned_prompts.py::test_every_method_predicts_with_tuned_prompts[source-plain]",
    ),
    (
        "the last fusion block is tuned in place of the first", CAVMAE,
        'Slot(f"{path}.qkv.{part}",',
        'Slot(f"blocks_u.{len(self.blocks_u) - 1}.attn.qkv.{part}",',
        "methods/test_tuned_prompts.py::test_two_fusion_blocks",
    ),
    (
        "a mask that is cut is not seen", CONVERT,
        "return length if length is not None and length < positions else None", "return None",
        "models/test_cut_clips.py::test_the_context_is_that_of_the_mask",
    ),
    (
        "Fisher weights of another model are taken", FISHER,
        "            _check_source(name, entry[1], values[short])\n", "            pass\n",
        "methods/test_fisher.py::test_what_is_refused",
    ),
]  # fmt: skip
