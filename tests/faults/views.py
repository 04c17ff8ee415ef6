"""Views of images."""

FAULTS = [
    (
        "chains-solarize",
        "fasttta/views/operations.py",
        "thresholds = 256 - (25.6 * level[chosen]).long()",
        "thresholds = 255 - (25.6 * level[chosen]).long()",
        "views/test_views.py::test_reference_is_pillow_from_end_to_end",
    ),
    (
        "chains-translate",
        "fasttta/views/operations.py",
        "int(size / 30 * level)",
        "int(224 / 30 * level)",
        "views/test_views.py::test_reference_is_pillow_from_end_to_end",
    ),
    (
        "draw-corner",
        "fasttta/views/make.py",
        "int(u_top * (height - h + 1))",
        "int(u_top * (height - h))",
        "views/test_views.py::test_distributions",
    ),
    (
        "draw-flip",
        "fasttta/views/make.py",
        "u_flip < 0.5",
        "u_flip < 0.4",
        "views/test_views.py::test_distributions",
    ),
    (
        "draw-area",
        "fasttta/views/make.py",
        "area: tuple[float, float] = (0.08, 1.0)",
        "area: tuple[float, float] = (0.2, 1.0)",
        "views/test_views.py::test_distributions",
    ),
    (
        "draw-level",
        "fasttta/views/make.py",
        "level=0.1 + 0.9 * steps[:, 1]",
        "level=steps[:, 1]",
        "views/test_views.py::test_distributions",
    ),
    (
        "draw-depth",
        "fasttta/views/make.py",
        "depth=1 + (depths * DEPTH).long()",
        "depth=(depths * DEPTH).long()",
        "views/test_views.py::test_distributions",
    ),
    (
        "make-anchor-weight",
        "fasttta/views/make.py",
        "draws.weight.new_ones(1)",
        "draws.weight.new_zeros(1)",
        "views/test_views.py::test_views[shape0-False-crop]",
    ),
    (
        "regions-ties",
        "fasttta/views/views.py",
        "descending=True, stable=True).indices",
        (
            "descending=True, stable=True).indices if False else maps.flip(1).sort(dim=1, "
            "descending=True, stable=True).indices.neg().add(maps.shape[1] - 1)"
        ),
        "views/test_views_regions.py::test_masks_of_the_paper",
    ),
    (
        "axes-advice-for-arrays",
        "fasttta/views/make.py",
        'call = "transpose" if array else "permute"',
        'call = "permute"',
        "adapted/test_image_inputs.py::test_advice_on_the_order_of_axes_is_a_call_that_works",
    ),
    (
        "image-copied-apart",
        "fasttta/views/make.py",
        'image if image.device.type == "cpu" else None',
        "None",
        "views/test_views_on_device.py::test_one_copy[2-options0]",
    ),
    (
        "crops-at-once-not-mirrored",
        "fasttta/views/resample.py",
        "columns = torch.where(mirrored, columns.flip(2), columns)",
        "pass",
        "views/test_views_on_device.py::test_crops_at_once[size0]",
    ),
    (
        "crops-at-once-over-the-edge",
        "fasttta/views/resample.py",
        "weights.masked_fill(i_in >= last, 0.0)",
        "weights",
        "views/test_views_on_device.py::test_crops_at_once[size0]",
    ),
    (
        "packed-tensors-overlap",
        "fasttta/views/transfer.py",
        "end += -(-x.numel() * x.element_size() // _ALIGNED) * _ALIGNED",
        "end += x.numel()",
        "views/test_transfer.py::test_the_same_tensors",
    ),
]
