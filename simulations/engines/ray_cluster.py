"""A Ray cluster for the time of a run: joined where one is named, else started on this machine and taken down again.

A cluster of our own listens on the loopback address alone, asks for a token that only this user's processes know
(Ray 2.52 and newer), has no dashboard, reports to nobody, and keeps its files in a folder that goes with it.
"""

from __future__ import annotations

import gc
import importlib
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

from fedml_core.errors import ConfigError

__all__ = ["joined_cluster", "load_ray", "local_cluster", "some_cluster"]

_RAY = "ray"  # of the extra fedveil[ray]
_LOOPBACK = "127.0.0.1"
# Ray reads these when it is imported and when it starts its processes, which inherit them.
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Its name says where else it is the default; it makes Ray take the loopback address for this machine's.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AUTH_MODE": "token",
}
# Ray's sockets lie deep below its folder, and their paths must stay short: the user's own TMPDIR may be too long.
_SHORT = Path("/tmp")


def load_ray() -> Any:
    """Return the package `ray`.

    Raises: ConfigError: if it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(_RAY)
    except ImportError as error:
        raise ConfigError("the ray engine needs ray, which is not installed; pip install 'fedveil[ray]'") from error


def some_cluster(address: str | None, cpus: float, gpus: float) -> AbstractContextManager[Any]:
    """Return a context with `ray`, connected: to the cluster that this program has joined already, to the one at
    `address`, or to a new one of `cpus` and `gpus` on this machine.

    What was not started here is left running.
    Raises: ConfigError: if ray is not installed, there is no such cluster, or none can be started.
    """
    ray = sys.modules.get(_RAY)
    if ray is not None and ray.is_initialized():
        return nullcontext(ray)
    return local_cluster(cpus, gpus) if address is None else joined_cluster(address)


@contextmanager
def joined_cluster(address: str) -> Iterator[Any]:
    """Give `ray`, connected to a cluster that is running already.

    Raises: ConfigError: if ray is not installed, or there is no such cluster.
    """
    ray = load_ray()
    try:
        _init(ray, address=address)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ConfigError(f"there is no ray cluster to join at {address!r} ({_first_line(error)}); {_START}") from error
    try:
        yield ray
    finally:
        _shut_down(ray)


@contextmanager
def local_cluster(cpus: float, gpus: float = 0) -> Iterator[Any]:
    """Give `ray`, connected to a new cluster on this machine, which ends with the context.

    Raises: ConfigError: if ray is not installed, or the cluster cannot be started or would be open to other machines.
    """
    with ExitStack() as held:
        with _environment():
            ray = _loaded_for_loopback()
            folder = tempfile.mkdtemp(prefix="fedveil-ray-", dir=_SHORT if _SHORT.is_dir() else None)
            held.callback(shutil.rmtree, folder, ignore_errors=True)
            held.callback(_shut_down, ray)
            only_here: dict[str, Any] = {"include_dashboard": False, "_node_ip_address": _LOOPBACK}
            try:
                _init(ray, address="local", num_cpus=cpus, num_gpus=gpus, _temp_dir=folder, **only_here)
            except (ConnectionError, RuntimeError, ValueError, OSError) as error:
                raise ConfigError(f"a local ray cluster could not be started: {_first_line(error)}; {_OWN}") from error
        address = ray.util.get_node_ip_address()
        if address != _LOOPBACK:
            raise ConfigError(f"this version of ray listens at {address}, open to other machines; {_OWN}")
        yield ray


def _loaded_for_loopback() -> Any:
    if sys.modules.get(_RAY) is not None and not _loaded:
        raise ConfigError(
            f"this program imported ray before fedveil did, so a local cluster would be open to other machines; {_OWN}"
        )
    ray = load_ray()
    _loaded.add(_RAY)
    return ray


@cache
def _token() -> str:
    # Ray reads it once in a process, so a second cluster must know the same.
    return secrets.token_hex(32)


_loaded: set[str] = set()
_OWN = "call ray.init() yourself as it suits you, and the engine uses that cluster"
_START = "run `ray start --head` on one machine and this command there, or leave address out"


def _init(ray: Any, **arguments: Any) -> None:
    """Connect, and leave this program's warnings, logging and handlers of signals as they are."""
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if in_main else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ray.init(log_to_driver=False, configure_logging=False, logging_level="error", **arguments)
        finally:
            gc.collect()  # of files that Ray leaves open, while nobody remarks on them
            if before is not None:
                signal.signal(signal.SIGTERM, before)


def _shut_down(ray: Any) -> None:
    with warnings.catch_warnings():
        # Ray does not wait for each process that it has ended; Python's Popen would remark on that.
        warnings.simplefilter("ignore", ResourceWarning)
        ray.shutdown()
        gc.collect()


@contextmanager
def _environment() -> Iterator[None]:
    wanted = {**_SETTINGS, "RAY_AUTH_TOKEN": _token()}
    before = {name: os.environ.get(name) for name in (*wanted, "PYTHONBREAKPOINT")}  # the last is Ray's own doing
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
