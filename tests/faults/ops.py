"""Operations: the reference and the default implementation."""

FAULTS = [
    (
        "ref-biased-std",
        "fasttta/ops/reference.py",
        "b.std((-2, -1))",
        "b.std((-2, -1), correction=0)",
        (
            "ops/test_attention_bootstrap.py::test_bootstrap_equals_reference[(3, 4, (20, 12), 6)-mean-key-False]"
        ),
    ),
    (
        "ref-pair-query-for-key",
        "fasttta/ops/reference.py",
        "a = i if pair_query else j",
        "a = j if pair_query else i",
        (
            "ops/test_attention_bootstrap.py::test_bootstrap_equals_reference[(3, 4, (20, 12), 6)-mean-key-False]"
        ),
    ),
    (
        "ref-anchor-not-detached-mean",
        "fasttta/ops/reference.py",
        "mean[..., a, a].detach() if",
        "mean[..., a, a] if",
        (
            "ops/test_attention_bootstrap.py::test_bootstrap_equals_reference[(3, 4, (20, 12), 6)-mean-key-False]"
        ),
    ),
    (
        "ref-anchor-not-detached-std",
        "fasttta/ops/reference.py",
        "std[..., a, a].detach() if",
        "std[..., a, a] if",
        (
            "ops/test_attention_bootstrap.py::test_bootstrap_equals_reference[(3, 4, (20, 12), 6)-mean-key-False]"
        ),
    ),
    (
        "ref-diagonal-not-excluded",
        "fasttta/ops/reference.py",
        "if i != j:",
        "if True:",
        (
            "ops/test_attention_bootstrap.py::test_bootstrap_equals_reference[(3, 4, (20, 12), 6)-mean-key-True]"
        ),
    ),
    (
        "top-ties",
        "fasttta/ops/entropies.py",
        "tied.cumsum(dim=-1) <= k - above.sum",
        "tied.cumsum(dim=-1) < k - above.sum",
        ("ops/test_entropies.py::test_head_equals_reference[(8, 50)-ties-mean-False-composite]"),
    ),
    (
        "tv-ties",
        "fasttta/ops/total_variation.py",
        "slope = x.diff(dim=dim).sign_()  # 0 at ties",
        "slope = torch.where(x.diff(dim=dim) >= 0, 1.0, -1.0).to(x.dtype)",
        "ops/test_total_variation.py::test_goldens[composite]",
    ),
    (
        "comp-pair-query-for-key",
        "fasttta/ops/attention_bootstrap.py",
        "dim = -1 if pair_query else -2",
        "dim = -2 if pair_query else -1",
        "adapted/test_adapted.py::test_abpem_is_its_formula[{}]",
    ),
]
