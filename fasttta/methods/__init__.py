"""Adaptation methods, one frozen dataclass each. README.md says how to write one."""

from __future__ import annotations

from .abpem import ABPEM
from .atpt import ATPT
from .base import EpisodeMethod, Method, Objective, WeightedMethod
from .brimpr import BriMPR
from .eata import EATA
from .episodic import Episodic, Images, Prediction, Seen
from .mta import MTA
from .prompt_tuning import CTPT, RTPT, TPT
from .queue import WindowedMethod
from .rada import RAda
from .read import READ
from .registry import by_name, names, register
from .sar import SAR
from .source import Source
from .special_bases import DrawingMethod, ExtendingMethod, StatefulMethod, TwoPassMethod
from .tent import Tent
from .ttc import TTC

__all__ = [
    "ABPEM", "ATPT", "CTPT", "EATA", "MTA", "READ", "RTPT", "SAR", "TPT", "TTC", "BriMPR",
    "DrawingMethod", "EpisodeMethod", "Episodic", "ExtendingMethod", "Images", "Method",
    "Objective", "Prediction", "RAda", "Seen", "Source", "StatefulMethod", "Tent",
    "TwoPassMethod", "WeightedMethod", "WindowedMethod", "by_name", "names", "register",
]  # fmt: skip
