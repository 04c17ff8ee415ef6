"""Adaptation methods, one frozen dataclass each. README.md says how to write one."""

from __future__ import annotations

from .abpem import ABPEM
from .atpt import ATPT
from .base import Method, Objective
from .brimpr import BriMPR
from .eata import EATA
from .episodic import Episodic, Images, Prediction, Seen
from .mta import MTA
from .prompt_tuning import CTPT, RTPT, TPT
from .rada import RAda
from .read import READ
from .registry import by_name, names, register
from .sar import SAR
from .source import Source
from .tent import Tent
from .ttc import TTC

__all__ = [
    "ABPEM", "ATPT", "CTPT", "EATA", "MTA", "READ", "RTPT", "SAR", "TPT", "TTC", "BriMPR",
    "Episodic", "Images", "Method", "Objective", "Prediction", "RAda", "Seen", "Source", "Tent",
    "by_name", "names", "register",
]  # fmt: skip
