"""Files of tensors from outside, read without running anything that they hold."""

from .names import plain_name
from .reading import read_file, regular_file
from .weights import check_weights, defect

__all__ = ["check_weights", "defect", "plain_name", "read_file", "regular_file"]
