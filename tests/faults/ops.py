"""Operations: the reference and the default implementation."""

FAULTS = [
    (
        "ref-biased-std",
        "fasttta/ops/score_moments.py",
        "b.std((-2, -1))",
        "b.std((-2, -1), correction=0)",
        (
            "ops/test_attention_bootstrap.py::test_bootstrap_equals_reference[(3, 4, (20, 12), 6)-mean-key-False]"
        ),
    ),
    (
        "ref-pair-query-for-key",
        "fasttta/ops/attention_bootstrap.py",
        "a = i if pair_query else j",
        "a = j if pair_query else i",
        (
            "ops/test_attention_bootstrap.py::test_bootstrap_equals_reference[(3, 4, (20, 12), 6)-mean-key-False]"
        ),
    ),
    (
        "ref-anchor-not-detached-mean",
        "fasttta/ops/attention_bootstrap.py",
        "mean[..., a, a].detach() if",
        "mean[..., a, a] if",
        (
            "ops/test_attention_bootstrap.py::test_bootstrap_equals_reference[(3, 4, (20, 12), 6)-mean-key-False]"
        ),
    ),
    (
        "ref-anchor-not-detached-std",
        "fasttta/ops/attention_bootstrap.py",
        "std[..., a, a].detach() if",
        "std[..., a, a] if",
        (
            "ops/test_attention_bootstrap.py::test_bootstrap_equals_reference[(3, 4, (20, 12), 6)-mean-key-False]"
        ),
    ),
    (
        "ref-diagonal-not-excluded",
        "fasttta/ops/attention_bootstrap.py",
        "if i != j:",
        "if True:",
        (
            "ops/test_attention_bootstrap.py::test_bootstrap_equals_reference[(3, 4, (20, 12), 6)-mean-key-True]"
        ),
    ),
    (
        "ref-ties",
        "fasttta/ops/entropies.py",
        "index = logits.sort(dim=-1, descending=True, stable=True).indices[..., :k]",
        "index = logits.shape[-1] - 1 - (-logits.flip(-1)).argsort(dim=-1, stable=True)[..., :k]",
        "ops/test_entropies.py::test_ties_go_to_the_lowest_index[reference]",
    ),
    (
        "second-derivative-is-a-constant",
        "fasttta/ops/registry.py",
        "    if not torch.compiler.is_compiling():\n        other",
        "    if False:\n        other",
        "ops/test_second_derivatives.py::test_kernels_refuse[entropy]",
    ),
    (
        "comp-pair-query-for-key",
        "fasttta/ops/attention_bootstrap.py",
        "dim = -1 if pair_query else -2",
        "dim = -2 if pair_query else -1",
        "adapted/test_adapted.py::test_abpem_is_its_formula[{}]",
    ),
]
