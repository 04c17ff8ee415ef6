"""Where things lie in the checkout."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
SUPPORT = TESTS / "support"
ROOT = TESTS.parent
README = ROOT / "README.md"
SHARED = ROOT.parent / "shared"  # the maintainers' files, where they lie beside the checkout
