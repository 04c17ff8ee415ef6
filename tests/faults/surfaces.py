"""Inputs of users, streams, prompts, sound, the command line."""

KEYS, FEATURES = "fasttta/data/feature_keys.py", "fasttta/data/feature_cache.py"
BRIMPR = "fasttta/methods/brimpr.py"

FAULTS = [
    (
        "a model's key reads the beginning of every weight", KEYS,
        "self._tensors.append(value)", "self._tensors.append(value.detach().flatten()[:64])",
        "data/test_changed_weights.py::test_weights_changed_in_place[a view of the storage]",
    ),
    (
        "a model's key is taken once a stream", FEATURES,
        "kind = self._kind()  # of every batch", "kind = self._last or self._kind()  # of a",
        "data/test_changed_weights.py::test_weights_changed_in_the_middle_of_a_stream[None]",
    ),
    (
        "features of weights that changed meanwhile are kept", FEATURES,
        "if self._kind() == kind:", "if True:",
        "data/test_changed_weights.py::test_weights_changed_while_they_are_used",
    ),
    (
        "inputs of any class are taken", "fasttta/engine/step.py",
        "dense(name, x) if isinstance(x, Tensor) else x", "x",
        "ops/test_dense.py::test_refused[coo-fusion]",
    ),
    (
        "batches that were read ahead are lost", "fasttta/engine/streaming.py",
        "self._waiting.extend(before.give_up())", "pass",
        "engine/test_streams.py::test_what_was_read_ahead_comes_next[eager-break-100]",
    ),
    (
        "labels of a stream are not looked at", "fasttta/evaluate/stream.py",
        "labels = class_labels(labels, _samples(adapted, inputs), classes)", "pass",
        "ops/test_labels.py::test_refused_before_the_step[beyond]",
    ),
    (
        "a template ends at the class name", "fasttta/methods/prompt_text.py",
        "before, place, after = prompt.partition(PLACE)",
        'before, place, after = *prompt.partition(PLACE)[:2], ""',
        "methods/test_prompts.py::test_templates[a photo of a {}.-texts0-source]",
    ),
    (
        "sound at any rate is taken", "fasttta/data/filterbank.py",
        "if sample_rate != RATE:", "if False:",
        "data/test_wav.py::test_another_rate_is_refused[8000]",
    ),
    (
        "masks are drawn in the default type", BRIMPR,
        "generator=generator, dtype=torch.float32,\n", "generator=generator,\n",
        "adapted/test_default_dtype.py::test_fusion_methods[brimpr]",
    ),
    (
        "a single logit is adapted on", "fasttta/methods/base.py",
        "if self.group is not None and model.num_classes == 1:", "if False:",
        "adapted/test_edges.py::test_a_single_logit[read]",
    ),
    (
        "one class of a CLIP is adapted on", "fasttta/adapted/images.py",
        "if len(ids) < 2 and method.group is not None:", "if False:",
        "adapted/test_edges.py::test_one_class_of_a_clip[tpt]",
    ),
    (
        "the command line calls built-in functions", "fasttta/commands/imported_model.py",
        "if inspect.isbuiltin(value):", "if False:",
        "commands/test_cli.py::test_inspect_names_what_makes_no_model[os:system-words11]",
    ),
    (
        "JSON with NaN", "fasttta/evaluate/output.py",
        "json.loads(json.dumps(data), parse_constant=lambda name: None)",
        "json.loads(json.dumps(data))",
        "commands/test_cli.py::test_as_json_is_json",
    ),
]  # fmt: skip
