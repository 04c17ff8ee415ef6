"""What lies between the products of a block, as on a GPU."""

BLOCKS = "models/test_fused_blocks.py"
KERNELS = "kernels/test_residual_layer_norm.py"

FAULTS = [
    (
        "fused-block-skips-hooks",
        "fasttta/models/blocks/residual.py",
        "and not any(getattr(module, hooks) for hooks in _HOOKS)",
        "and True",
        f"{BLOCKS}::test_hooks_and_replaced_parts_are_called",
    ),
    (
        "fused-block-skips-a-replaced-norm",
        "fasttta/models/blocks/residual.py",
        "type(module) is kind",
        "isinstance(module, kind)",
        f"{BLOCKS}::test_hooks_and_replaced_parts_are_called",
    ),
    (
        "fused-block-needs-our-layers",
        "fasttta/models/blocks/residual.py",
        "getattr(part, name, None) if name else part",
        "getattr(part, name) if name else part",
        f"{BLOCKS}::test_replaced_parts_need_no_layers_of_ours",
    ),
    (
        "waiting-branch-is-lost-before-a-called-block",
        "fasttta/models/blocks/layers.py",
        "block(x if branch is None else x + branch, *alone), None",
        "block(x, *alone), None",
        f"{BLOCKS}::test_hooks_and_replaced_parts_are_called",
    ),
    (
        "gradient-of-scores-is-lost",
        "fasttta/models/blocks/residual.py",
        "            if len(there) == 2:\n                torch.add(*there, out=place)",
        "            if len(there) == 2:\n                place.copy_(there[0])",
        f"{BLOCKS}::test_a_block_alone[]",
    ),
    (
        "gradient-of-the-other-use-is-lost",
        "fasttta/ops/residual_layer_norm.py",
        "grad_normed, grad_total, total, stats, weight, ctx.branch_dtype,",
        "grad_normed, None, total, stats, weight, ctx.branch_dtype,",
        "ops/test_residual_layer_norm.py::test_both_uses_of_a_residual_meet",
    ),
    (
        "fused-blocks-on-a-cpu",
        "fasttta/ops/residual_layer_norm.py",
        "mixed = residual.dtype == torch.float32 and dtype == torch.bfloat16",
        "mixed = True",
        "ops/test_residual_layer_norm.py::test_on_a_cpu_the_calls_are_pytorchs",
    ),
    (
        "triton-norm-mean-of-padding",
        "kernels/residual_layer_norm.py",
        "b_t = tl.where(m_d, b_t - mean, 0.0)",
        "b_t = b_t - mean",
        f"{KERNELS}::test_forward_and_gradients",
    ),
    (
        "triton-norm-rows-beyond-the-last",
        "kernels/residual_layer_norm.py",
        "m = m_d & (i_row < n)",
        "m = m_d & (i_row <= n)",
        f"{KERNELS}::test_forward_and_gradients",
    ),
    (
        "gelu-in-a-product-that-needs-its-gradient",
        "fasttta/ops/gelu.py",
        "        and not (torch.is_grad_enabled() and x.requires_grad)\n    )  # fmt: skip",
        "    )  # fmt: skip",
        "ops/test_gelu.py::test_the_gelu_of_a_product",
    ),
    (
        "triton-gelu-bias-by-program",
        "kernels/gelu.py",
        "tl.load(p_bias + (o_first + o_n) % C, mask",
        "tl.load(p_bias + o_n % C, mask",
        "kernels/test_gelu.py::test_bias",
    ),
]
