"""Import this before `flwr`: Flower's calls home are switched off and its version is checked, or nothing starts.

Flower reads these switches when it is imported: telemetry (on by default), a check for newer releases (on by
default), and installation of an app's dependencies while it runs (on by default on a server). Its log, which names
every request, is quiet unless FLWR_LOG_LEVEL asks for it: what matters is reported by our own code.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version

from fedml_core.errors import ConfigError

SUPPORTED_FLOWER = "1.41."
FLOWER_SWITCHES = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}


def guard_engine() -> None:
    """Set Flower's switches for this process and its children, check the installed version, and load Flower.

    Guarantees: the switches override what the environment says. Flower's log is left alone where FLWR_LOG_LEVEL is set,
    and where somebody else loaded Flower before.
    Raises: ConfigError: if Flower is missing, or is not the minor version whose inner parts this project uses.
    """
    os.environ.update(FLOWER_SWITCHES)
    try:
        installed = version("flwr")
    except PackageNotFoundError:
        raise ConfigError(f"flwr is not installed; install flwr=={SUPPORTED_FLOWER}*") from None
    if not installed.startswith(SUPPORTED_FLOWER):
        raise ConfigError(
            f"flwr {installed} is installed, and this version needs flwr {SUPPORTED_FLOWER}*; "
            f"install flwr=={SUPPORTED_FLOWER}*"
        )
    quiet = "flwr" not in sys.modules and "FLWR_LOG_LEVEL" not in os.environ
    with warnings.catch_warnings():
        # Flower's own dependencies warn each other while they load; who runs with warnings as errors cannot mend that.
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module("flwr.app")
    if quiet:
        logging.getLogger("flwr").setLevel(logging.CRITICAL)  # Flower sets DEBUG when it loads


guard_engine()
