"""The tests of the documentation compose its commands the way the tests of the pipeline do."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "pipelines"))  # calling.py
