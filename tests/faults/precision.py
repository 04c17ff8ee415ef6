"""Faults in the switches of float32 products."""

PRODUCTS = "fasttta/engine/float32_products.py"
TEST = "engine/test_float32_products.py::"

FAULTS = [
    (
        "the legacy switches stay as they were", PRODUCTS,
        "    torch._C._set_cudnn_allow_tf32(switches.convolutions)\n", "",
        TEST + "test_readable_inside_and_put_back",
    ),
    (
        "what a parent decides is put back as set", PRODUCTS,
        '                _set(*node, "none")\n', "                pass\n",
        TEST + "test_readable_inside_and_put_back",
    ),
    (
        "a default of PyTorch is put back as if it had been set", PRODUCTS,
        '            nodes[i] = "none"\n', "            pass\n",
        TEST + "test_a_default_gives_way_to_its_parent_afterwards",
    ),
    (
        "switches that disagree are read as they seem", PRODUCTS,
        "legacy = not tf32", "legacy = tf32", TEST + "test_readable_inside_and_put_back",
    ),
    (
        "a step on a CPU takes switches as they are", "fasttta/engine/step.py",
        "tuple(shown_nodes()) == AT_START", "True",
        TEST + "test_a_step_on_a_cpu_sets_what_is_not_as_pytorch_starts[oneDNN in bf16]",
    ),
    (
        "the first thread to end puts the switches back", PRODUCTS,
        "    if _running:\n", "    if len(_running) > 1:\n",
        TEST + "test_blocks_of_threads_end_in_any_order",
    ),
    (
        "TF32 although another thread asks for float32", PRODUCTS,
        '"ieee" if "ieee" in _running.values() else "tf32"', "[*_running.values()][0]",
        TEST + "test_blocks_of_threads_end_in_any_order",
    ),
    (
        "an interrupted step keeps the switches", PRODUCTS,
        "    except BaseException:\n        for node, value in zip(_NODES, nodes, strict=False):\n"
        "            _set(*node, value)\n        raise\n",
        "    finally:\n        pass\n",
        TEST + "test_an_interrupt_at_any_switch_leaves_the_users",
    ),
]  # fmt: skip
