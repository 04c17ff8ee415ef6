"""What the owner's model computes, as it is wrapped, compared and watched."""

SPECIFIED, STATE, DETECT = (
    "fasttta/models/specified/model.py", "fasttta/engine/state.py", "fasttta/models/specified/spec.py",
)  # fmt: skip
WATCH, SCORES = "fasttta/engine/model_watch.py", "fasttta/models/specified/score_checks.py"

FAULTS = [
    (
        "a mask of the fused attention hides unseen", SCORES,
        "        flag = flag | mask\n", "        pass\n",
        "families/test_owner_masks.py::test_padding_is_never_counted[fp32-3-sdpa bool]",
    ),
    (
        "a mask under a softmax hides unseen", SCORES,
        "flag = flag | _other_rows(last, softmax, q.detach(), k.detach())", "pass",
        "families/test_owner_masks.py::test_padding_is_never_counted[fp32-3-eager]",
    ),
    (
        "scores across two sequences are statistics", SPECIFIED,
        "self._learnt.crosses = two.crosses()", "self._learnt.crosses = False",
        "families/test_owner_masks.py::test_cross_attention",
    ),
    (
        "what cannot be tuned is left out", "fasttta/engine/precision.py",
        "for name in sorted(tuned - leaves.keys()):", "for name in ():",
        "families/test_owner_parametrised.py::test_a_wrapped_projection_is_refused_with_advice[query-read-weight_norm]",
    ),
    (
        "gradients are not compared", "fasttta/families/self_check.py",
        "if not error <= tolerance * max(largest, 1e-12):", "if False:",
        "families/test_owner_hooks.py::test_backward_hooks[read-joint]",
    ),
    (
        "flags of gradient checkpointing stay on", "fasttta/models/copies.py",
        "    if not hooks:\n        without_checkpointing(copied)\n", "",
        "families/test_owner_checkpointing.py::test_flags_are_switched_off_in_the_copy[read-True]",
    ),
    (
        "the watch looks at no versions", WATCH,
        "            [x._version for x in self._counted],\n", "            [],\n",
        "engine/test_verify_model.py::test_the_changed_tensor_is_named[user]",
    ),
    (
        "the watch looks at no identities", WATCH,
        "[id(x) for tensors in self._holders for x in tensors.values()]", "[]",
        "engine/test_verify_model.py::test_changed_weights_are_named[before the first batch-assign-joint]",
    ),
    (
        "the watch looks at no hooks", WATCH,
        "[key for hooks in self._hooks if hooks for key in hooks]", "[]",
        "engine/test_verify_model.py::test_hooks_registered_after[user]",
    ),
    (
        "the watch reads no values", WATCH,
        "            if self.mode == \"always\":\n                self._check_values()\n"
        "            return None\n",
        "            return None\n",
        "engine/test_verify_model.py::test_writes_that_nothing_counts[user]",
    ),
    (
        "detect tells a random order from nothing", DETECT,
        "        if odd:  #", "        if False:  #",
        "families/test_owner_detect.py::test_random_order",
    ),
    (
        "detect draws no input anew", DETECT,
        "        if not torch.equal(x, x.flip(0)):\n", "        if False:\n",
        "families/test_owner_detect.py::test_common_beginnings_and_padding",
    ),
    (
        "detect proposes what methods refuse", DETECT,
        "        _try_out(model, spec, inputs)\n", "",
        "families/test_owner_detect.py::test_what_every_method_refuses_is_not_proposed[Masked-under a mask]",
    ),
]  # fmt: skip
