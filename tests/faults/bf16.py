"""bf16 on CPUs."""

FAULTS = [
    (
        "bf16-attention-key-beyond-the-last",
        "csrc/pair_attention.h",
        "if (s.keys % 2 == 0) return;",
        "return;",
        "ops/test_bf16_attention.py::test_scores_far_from_zero",
    ),
    (
        "bf16-attention-scores-beyond-the-last",
        "csrc/pair_attention.h",
        "for (int64_t i = n - last; i < kLanes<float>; ++i) {",
        "for (int64_t i = n - last + 1; i < kLanes<float>; ++i) {",
        "ops/test_bf16_attention.py::test_scores_far_from_zero",
    ),
    (
        "bf16-attention-on-processors-with-tiles",
        "fasttta/ops/softmax_attention.py",
        "return processor.bf16_vectors() and not processor.bf16_tiles()",
        "return processor.bf16_vectors()",
        "ops/test_bf16_attention.py::test_serves_where_the_processor_has_vectors_but_no_tiles[True]",
    ),
    (
        "packed-weight-that-changed",
        "fasttta/models/blocks/onednn.py",
        "if version != weight._version:",
        "if version < 0:",
        "models/test_packed_linear.py::test_a_change_of_the_weight_is_seen",
    ),
    (
        "packed-master",
        "fasttta/models/blocks/layers.py",
        "kept = weight is self.weight and self.compute_dtype is not None",
        "kept = self.compute_dtype is not None",
        "models/test_blocks.py::test_where_they_are_not_used",
    ),
    (
        "layer-norm-of-the-unrounded-sum",
        "csrc/residual_layer_norm.cpp",
        "x = sums.read(i, space.data());  // as rounded to its type",
        "x = sum;",
        "ops/test_residual_layer_norm_cpp.py::test_forward",
    ),
    (
        "layer-norm-without-the-gradient-of-the-sum",
        "csrc/residual_layer_norm.cpp",
        "- (x[c] - mean) * rstd * product) + other[c];",
        "- (x[c] - mean) * rstd * product);",
        "ops/test_residual_layer_norm_cpp.py::test_backward",
    ),
    (
        "layer-norm-in-cpp-between-float32-products",
        "fasttta/ops/residual_layer_norm.py",
        "mixed = residual.dtype == torch.float32 and dtype == torch.bfloat16",
        "mixed = residual.dtype == torch.float32",
        "ops/test_residual_layer_norm_cpp.py::test_serves_between_products_in_bf16",
    ),
]
