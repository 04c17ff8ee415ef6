"""Faults in warm-up and capture, and in streams beside the steps."""

CAPTURE, GRAPH = "fasttta/engine/capture.py", "fasttta/engine/graph.py"
LANE = "fasttta/engine/streaming.py"

FAULTS = [
    (
        "what a failed warm-up left running is not waited for", CAPTURE,
        "            finally:\n                here.wait_stream(self.stream)\n",
        "            except KeyError:\n                pass\n            here.wait_stream(self.stream)\n",
        "engine/test_capture.py::test_what_is_put_back_waits_for_the_side_stream",
    ),
    (
        "a capture out of memory is blamed on the step", CAPTURE,
        " and not isinstance(reason, torch.OutOfMemoryError)", "",
        "engine/test_capture.py::test_other_errors_under_capture_are_raised_as_they_are",
    ),
    (
        "garbage is collected in a capture", CAPTURE, "    gc.disable()\n", "",
        "engine/test_capture.py::test_no_garbage_is_collected_in_a_capture",
    ),
    (
        "no garbage is collected after a failed capture", CAPTURE,
        "    try:\n        yield\n    finally:\n        if enabled:\n            gc.enable()\n",
        "    yield\n    if enabled:\n        gc.enable()\n",
        "engine/test_capture.py::test_no_garbage_is_collected_in_a_capture",
    ),
    (
        "the error of the end of a capture hides its reason", CAPTURE,
        "reason = failure or error", "reason = error",
        "engine/test_capture.py::test_an_error_of_the_capture_gives_the_advice",
    ),
    (
        "a copy waits for the step before", LANE,
        "with torch.cuda.stream(self._copies):", "with torch.cuda.stream(self._side):",
        "engine/test_lane.py::test_a_copy_does_not_wait_for_the_step_before",
    ),
    (
        "a batch is used before it is copied", LANE, "            here.wait_event(copied)\n", "",
        "engine/test_lane.py::test_a_copy_waits_for_nothing",
    ),
    (
        "memory of a copy is given away while it is used", LANE,
        "            x.record_stream(here)\n            if", "            if",
        "engine/test_lane.py::test_a_copy_waits_for_nothing",
    ),
    (
        "the loader refills memory that is being copied", LANE,
        "            if theirs:\n                copied.synchronize()\n", "",
        "engine/test_lane.py::test_pinned_memory_of_the_caller",
    ),
    (
        "steps that cannot be captured are tried again and again", GRAPH,
        "self.given_up, self.current = True, None", "self.current = None",
        "engine/test_capture.py::test_auto_falls_back_to_eager_steps[read]",
    ),
    (
        "a graph reads constants that are no more", GRAPH,
        " or plan.constants is not self.state.constants", "",
        "engine/test_capture.py::test_other_constants_are_captured_anew",
    ),
    (
        "a user's class is captured by default", "fasttta/methods/base.py",
        'vars(type(method)).get("captured_by_default", False)', "method.captured_by_default",
        "engine/test_capture.py::TestAuto::test_what_is_covered[tent]",
    ),
]  # fmt: skip
