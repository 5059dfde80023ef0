"""What every test run sets before anything else is imported: import this first, and import it nowhere but in conftest.

Flower, torch and Matplotlib read their variables when they are imported; processes that tests start inherit them.
"""

from __future__ import annotations

import os
import tempfile
import uuid
from pathlib import Path

SCRATCH = Path(tempfile.mkdtemp(prefix="fedveil-tests-"))
"""For what libraries insist on writing; `conftest` removes it at the end."""

MARK = "FEDVEIL_TEST_SESSION"
"""Whoever inherits this variable's value was started by this session, however many processes lie between."""

os.environ.update(
    {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_HOME": str(SCRATCH / "flower"),
        "MPLBACKEND": "Agg",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
        "NO_COLOR": "1",
        "COLUMNS": "120",
        MARK: uuid.uuid4().hex,
    }
)
