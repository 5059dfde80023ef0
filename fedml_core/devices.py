"""Where a trainer computes, at which precision, and what it leaves untouched of torch's global random state."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from fedml_core.errors import ConfigError
from fedml_core.training import Precision

__all__ = [
    "choose_device",
    "deterministic_torch",
    "fitting_threads",
    "gradient_scaler",
    "precision_context",
    "seeded_torch",
    "without_autocast",
]

_turns = itertools.count()
_SMALL = 1_000_000
_LARGE_STEPS = (nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention)
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_LOW = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str = "auto") -> torch.device:
    """Return the device called `name`: "auto", "cpu", "cuda", "cuda:1" or "mps".

    "cuda" is the next visible GPU in turn, so that the trainers of one process spread over all of them; "auto" is the
    same where there is a GPU, otherwise Apple's, otherwise the CPU.

    Raises: ConfigError: if this machine has no such device.
    """
    known = _available()
    gpus = [device for device in known if device.startswith("cuda")]
    if name in ("auto", "cuda") and gpus:
        return torch.device(gpus[next(_turns) % len(gpus)])
    if name == "auto":
        return torch.device("mps" if "mps" in known else "cpu")
    if name not in known:
        raise ConfigError(f"device {name!r} is not available; this machine has {', '.join(known)}, or say auto")
    return torch.device(name)


def precision_context(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return a context, to be entered as often as needed, in which torch computes at `precision`.

    Raises: ConfigError: if torch cannot do that on `device`.
    """
    if precision == "float32":
        # Whoever calls may be under an autocast of their own, whose copies of weights outlive a step.
        return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()
    try:
        with warnings.catch_warnings():
            # Where a dtype is not supported, torch only warns and goes on at full precision.
            warnings.simplefilter("error")
            return torch.autocast(device.type, dtype=_LOW[precision])
    except (RuntimeError, UserWarning) as error:
        raise ConfigError(f"precision {precision} is not available on {device}; use float32") from error


@contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """Let torch compute as it is told to inside, whatever autocast the caller is under, on the CPU and on `device`."""
    with torch.autocast("cpu", enabled=False), torch.autocast(device.type, enabled=False):
        yield


def gradient_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler | None:
    """Return a fresh scaler that keeps float16 gradients from vanishing, or None where none is needed."""
    return torch.amp.GradScaler(device.type) if precision == "float16" else None


def fitting_threads(module: nn.Module) -> int | None:
    """Return how many of the CPU's threads a step of `module` can use: 1 for small dense models, None for all.

    A small model's step is over before a second thread has begun; where several processes share the processors, as
    sites of a trial fleet do, threads that wait for each other cost many times the work itself.
    """
    if any(isinstance(part, _LARGE_STEPS) for part in module.modules()):
        return None
    return 1 if sum(parameter.numel() for parameter in module.parameters()) < _SMALL else None


@contextmanager
def deterministic_torch(wanted: bool = True) -> Iterator[None]:
    """Let torch choose only algorithms that give the same bits each time; one that it lacks is an error, naming it.

    A CPU gives the same bits anyway, as long as its number of threads is the same. What this costs on a GPU depends on
    the model. On leaving, also by an exception, everything is as it was. cuBLAS reads its variable once, so the first
    use of a GPU in the process should be inside. Nothing happens unless `wanted`.
    """
    if not wanted:
        yield
        return
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, workspace = torch.backends.cudnn.benchmark, os.environ.get(_WORKSPACE)
    os.environ.setdefault(_WORKSPACE, ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        torch.backends.cudnn.benchmark = benchmark
        if workspace is None:
            del os.environ[_WORKSPACE]


@contextmanager
def seeded_torch(seed: int, device: torch.device, threads: int | None = None) -> Iterator[None]:
    """Let torch draw from `seed` inside, on the CPU and on `device`, which is the current one for user code.

    Guarantees: on leaving, also by an exception, torch's random states and number of threads are what they were.
    Args: threads: how many of the CPU's threads torch uses inside, at most; None leaves it as it is.
    """
    before = torch.get_num_threads()
    if threads is not None and threads < before:
        torch.set_num_threads(threads)
        try:
            with seeded_torch(seed, device):
                yield
        finally:
            torch.set_num_threads(before)
        return
    apple = device.type == "mps"
    current: AbstractContextManager[object] = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with current:
        generators = [torch.default_generator]
        if device.type == "cuda":
            torch.cuda.init()
            generators.append(torch.cuda.default_generators[device.index])
        states = [generator.get_state() for generator in generators]
        apple_state = torch.mps.get_rng_state() if apple else None
        try:
            for generator in generators:
                generator.manual_seed(seed)
            if apple:
                torch.mps.manual_seed(seed)
            yield
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
            if apple_state is not None:
                torch.mps.set_rng_state(apple_state)


def _available() -> list[str]:
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return ["cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]
