"""Statistics, evaluation and the command line."""

FAULTS = [
    (
        "stats-variance-of-means",
        "fasttta/adapted/collect.py",
        "moments.std.square().diagonal",
        "moments.std.diagonal",
        "adapted/test_source_stats.py::test_collect_and_anchor[mean]",
    ),
    (
        "stats-biased",
        "fasttta/adapted/collect.py",
        "(self.squares / (self.n - 1)).sqrt()",
        "(self.squares / self.n).sqrt()",
        "adapted/test_source_stats.py::test_features",
    ),
    (
        "stats-merged",
        "fasttta/adapted/collect.py",
        "step.square() * (self.n * len(x) / total)",
        "0",
        "adapted/test_source_stats.py::test_features",
    ),
    (
        "cli-seeds-up-to-2-63",
        "fasttta/demo/command_line.py",
        "if not 0 <= seed < 2**63]",
        "if not 0 <= seed <= 2**70]",
        "commands/test_cli.py::test_values_of_options",
    ),
    (
        "cli-no-heads",
        "fasttta/commands/command_line.py",
        "if number < 1:",
        "if number < 0:",
        (
            "commands/test_cli.py::test_values_of_options[arguments7-argument --num-heads: 0: needed "
            "at least 1]"
        ),
    ),
    (
        "console-interrupt",
        "fasttta/commands/console.py",
        "BROKEN_PIPE, INTERRUPTED = 141, 130",
        "BROKEN_PIPE, INTERRUPTED = 130, 141",
        "commands/test_cli.py::test_no_error_ends_in_a_traceback[error6-130-]",
    ),
    (
        "evaluate-spread",
        "fasttta/evaluate/stream.py",
        "statistics.stdev(scores)",
        "statistics.pstdev(scores)",
        "evaluate/test_measure_stream.py::test_over_seeds",
    ),
    (
        "evaluate-mean-of-batches",
        "fasttta/evaluate/stream.py",
        'samples = sum(series["samples"])',
        'samples = len(series["samples"]) * series["samples"][0]',
        "evaluate/test_measure_stream.py::test_every_sample_is_counted[source]",
    ),
    (
        "evaluate-after",
        "fasttta/evaluate/stream.py",
        'chosen["after"].append(after.argmax(dim=1))',
        'chosen["after"].append(result.logits_before.argmax(dim=1))',
        "evaluate/test_measure_stream.py::test_every_sample_is_counted[read]",
    ),
    (
        "evaluate-predicted",
        "fasttta/evaluate/stream.py",
        'chosen["scored"].append(result.logits.argmax(dim=1))',
        'chosen["scored"].append(result.logits_before.argmax(dim=1))',
        "evaluate/test_measure_stream.py::test_every_sample_is_counted[read]",
    ),
    (
        "evaluate-reads-each-batch",
        "fasttta/evaluate/stream.py",
        'chosen["before"].append(result.logits_before.argmax(dim=1))',
        'chosen["before"].append(result.logits_before.argmax(dim=1).cpu())',
        "evaluate/test_measure_stream.py::test_nothing_of_a_batch_is_read_before_the_stream_ends",
    ),
    (
        "stats-n",
        "fasttta/adapted/collect.py",
        "        n=seen,\n",
        "        n=n,\n",
        "adapted/test_source_stats.py::test_fewer_samples_than_wanted",
    ),
    (
        "fisher-per-sample",
        "fasttta/adapted/collect.py",
        "total / batches for",
        "total / n for",
        "methods/test_eata_sar.py::test_collect_fisher",
    ),
    (
        "chart-colour-of-its-own",
        "fasttta/evaluate/markup.py",
        "names.get(match[0], match[0])",
        "match[0]",
        "evaluate/test_drawing.py::test_a_page_chooses_the_colours",
    ),
    (
        "chart-titles-shifted",
        "fasttta/evaluate/drawing.py",
        'gid=canvas.name("", title),',
        "gid=canvas.name(title),",
        "evaluate/test_drawing.py::test_what_is_drawn_can_be_read",
    ),
]
