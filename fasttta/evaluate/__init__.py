"""Measuring methods on labelled streams, and reporting what was measured.

``measure_stream`` runs an adapted model over a stream, ``Report`` shows what came out: a text
table, JSON, and, with the extra ``report``, one self-contained HTML file and PNG charts.
"""

from .attention import attention_gap, gap_numbers
from .machine import machine
from .output import check_output
from .progress import ProgressBar
from .report import Report
from .stream import measure_stream, over_seeds
from .table import table

__all__ = [
    "ProgressBar",
    "Report",
    "attention_gap",
    "check_output",
    "gap_numbers",
    "machine",
    "measure_stream",
    "over_seeds",
    "table",
]
