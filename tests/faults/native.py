"""Kernels in Triton and in C++."""

FAULTS = [
    (
        "triton-shift-of-one-token",
        "kernels/score_moments_per_head.py",
        "b_shift = b_first + tl.sum(b_x, axis=0) / tl.minimum(count, BT).to(tl.float32)",
        "b_shift = b_first",
        "kernels/test_token_moments.py::test_an_outlier_costs_no_digits_wherever_it_stands[0]",
    ),
    (
        "triton-rest-of-halves-dropped",
        "kernels/score_moments_per_head.py",
        "b_c += b_low + tl.trans(b_low)",
        "b_c += 0.0 * b_low",
        "kernels/test_token_moments.py::test_half_precision[torch.float16-sm_90]",
    ),
    (
        "attention-bootstrap-forgets-kept-tokens",
        "fasttta/ops/attention_bootstrap.py",
        "ctx.save_for_backward(q, k, mean, std, *anchors, tokens)",
        "ctx.save_for_backward(q, k, mean, std, *anchors)",
        "ops/test_attention_bootstrap.py::test_the_forward_keeps_token_moments_for_the_backward",
    ),
    (
        "triton-diagonal-not-excluded",
        "kernels/score_blocks.py",
        "tl.where((i_b < M * M) & (i != j), b_kl, 0.0)",
        "tl.where(i_b < M * M, b_kl, 0.0)",
        "kernels/test_attention_bootstrap.py::test_pairs_and_anchors[mean-False]",
    ),
    (
        "triton-pair-query-for-key",
        "kernels/score_blocks.py",
        (
            "    s = i if PAIR_QUERY else j\n"
            "    if p_anchor_mean is not None:\n"
            "        b_mean_s = tl.load(p_anchor_mean + s, mask"
        ),
        (
            "    s = j if PAIR_QUERY else i\n"
            "    if p_anchor_mean is not None:\n"
            "        b_mean_s = tl.load(p_anchor_mean + s, mask"
        ),
        "kernels/test_attention_bootstrap.py::test_shapes[mean-(2, 3, (20, 13), 6)]",
    ),
    (
        "triton-gradient-without-weight",
        "kernels/score_blocks.py",
        "grad_mean = tl.where(upstream != 0, upstream * (mean - mean_s) / variance_s, 0.0)",
        "grad_mean = upstream * (mean - mean_s) / variance_s",
        "kernels/test_attention_bootstrap.py::test_undefined_statistics[mean]",
    ),
    (
        "triton-gradient-of-no-spread",
        "kernels/score_blocks.py",
        "beta = tl.where(std > 0, grad_std * tl.abs(c) / (count - 1.0), 0.0)",
        "beta = grad_std * tl.abs(c) / (count - 1.0)",
        "kernels/test_score_moments.py::test_equal_scores_have_no_direction[mean]",
    ),
    (
        "triton-top-k-ties",
        "kernels/entropies.py",
        "tl.cumsum(m_tied.to(tl.int32), axis=0) <= left",
        "tl.cumsum(m_tied.to(tl.int32), axis=0) < left",
        "kernels/test_adaptation_head.py::test_head[in-one-piece-(2, 309)-random]",
    ),
    (
        "c++-quick-gelu",
        "csrc/quick_gelu.cpp",
        "s + A(1.702) * from[i] * s * (1 - s)",
        "s + A(1.702) * from[i] * s",
        "ops/test_quick_gelu.py",
    ),
    (
        "first-use-silent",
        "fasttta/ops/first_use.py",
        "        timer.start()\n",
        "        pass\n",
        "ops/test_first_use.py::test_standard_error_is_told_where_somebody_waits[on-False-True]",
    ),
    (
        "first-use-said-twice",
        "fasttta/ops/first_use.py",
        "if _log.isEnabledFor(logging.INFO) and _log.hasHandlers():",
        "if False:",
        "ops/test_first_use.py::test_it_is_said_once_where_logging_shows_it",
    ),
    (
        "first-use-records-failures",
        "fasttta/ops/first_use.py",
        "        yield telling\n    finally:\n        if timer is not None:\n            timer.cancel()\n",
        "        yield telling\n    except RuntimeError:\n        pass\n    if timer is not None:\n        timer.cancel()\n",
        "ops/test_first_use.py::test_failures_are_not_recorded_and_end_the_message",
    ),
    (
        "prebuilt-for-another-processor",
        "fasttta/ops/native_prebuilt.py",
        "    if lacking:\n",
        "    if False:\n",
        "ops/test_native_prebuilt.py::test_one_that_does_not_fit_is_not_used",
    ),
    (
        "prebuilt-changed",
        "fasttta/ops/native_prebuilt.py",
        'stored.get("library") != digest',
        "False",
        "ops/test_native_prebuilt.py::test_a_damaged_one_is_not_used[library]",
    ),
    (
        "prebuilt-of-other-sources",
        "fasttta/ops/native_prebuilt.py",
        'stored["sources"] != facts["sources"]',
        "False",
        "ops/test_native_prebuilt.py::test_a_damaged_one_is_not_used[source]",
    ),
    (
        "kernel-compiled-in-silence",
        "kernels/launch.py",
        "    if key not in _started:\n",
        "    if False:\n",
        "kernels/test_first_launch.py::test_once_for_a_plan",
    ),
]
