"""The rules of the house that the source can show: who imports whom, and what may appear only where it is expected.

Each rule is a function from the files (text by path) to one sentence per place that breaks it, naming file, line and
the way out. An exception is a row here with its reason; `test_architecture` holds the rules and tests them.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from functools import cache
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

from tests.sources import PACKAGES, Use, calls_of, uses_of

MAY_IMPORT: Mapping[str, frozenset[str]] = {
    "fedml_core": frozenset(),
    "strategies": frozenset({"fedml_core"}),
    "clients": frozenset({"fedml_core"}),
    "server": frozenset({"strategies", "fedml_core"}),
    "simulations": frozenset({"server", "clients", "strategies", "fedml_core"}),
}
OUTSIDE = ("tests", "examples", "benchmarks", "docs")
COMMANDS = ("server.app", "clients.app", "simulations.app", "simulations.app_privacy")
ROOT_COMMAND = "simulations/app.py"
RANDOMNESS = "fedml_core/randomness.py"
GUARD = "fedml_core/engine_guard.py"
LOCAL_TORCH = "fedml_core/devices.py"

FLOWER_PUBLIC = ("flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy")
ANY_NAME = "flwr"
FLOWER_FILES: Mapping[str, tuple[str, ...]] = {
    # File: the names below Flower's public ones that it may import.
    "server/fleet.py": (ANY_NAME,),
    "server/fleet_superlink.py": (ANY_NAME,),
    "clients/fleet.py": (ANY_NAME,),
    "simulations/flower_apps.py": ("flwr.common.constant.SUPERLINK_NODE_ID",),
    "simulations/flower_grid.py": ("flwr.common.constant.ErrorCode", "flwr.supercore.run.Run"),
    "simulations/flower_mail.py": (),
    "simulations/flower_messages.py": (
        "flwr.app.message.make_message",
        "flwr.common.constant.ErrorCode",
        "flwr.common.constant.SUPERLINK_NODE_ID",
        "flwr.supercore.task_identity.TaskIdentity",
    ),
    "simulations/flower_nodes.py": (),
    "strategies/flower.py": (),
    "clients/flower.py": (),
    "server/flower.py": (),
    "server/flower_channel.py": (),
    "server/flower_private.py": (),
    "server/flower_runs.py": (),
    "fedml_core/flower_records.py": (),
    "fedml_core/flower_secure.py": (),
    GUARD: (),
}

RUNS_WHAT_IT_READS = "reading it can run code; use fedml_core.wire, safetensors or JSON"
NOT_KEYED = "draws must be keyed by purpose and place; use fedml_core.randomness"
FORBIDDEN: Mapping[str, str] = {
    **dict.fromkeys(("pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"), RUNS_WHAT_IT_READS),
    **dict.fromkeys(("torch.load", "torch.save", "torch.jit.load", "torch.package"), RUNS_WHAT_IT_READS),
    **dict.fromkeys(("builtins.eval", "builtins.exec"), "text must not become code; parse it"),
    **dict.fromkeys(("random", "numpy.random"), NOT_KEYED),
    **dict.fromkeys(("torch.manual_seed", "torch.seed", "torch.set_rng_state", "torch.random"), NOT_KEYED),
    **dict.fromkeys(("torch.cuda.manual_seed", "torch.cuda.manual_seed_all", "torch.cuda.set_rng_state"), NOT_KEYED),
    **dict.fromkeys(("torch.default_generator", "torch.cuda.default_generators"), NOT_KEYED),
    **dict.fromkeys(("torch.mps.manual_seed", "torch.mps.set_rng_state"), NOT_KEYED),
}
HARMLESS = ("numpy.random.Generator", "numpy.random.BitGenerator")
"""Types that annotations name; neither draws anything until somebody seeds it."""

ALLOWED: Mapping[tuple[str, str], str] = {
    (RANDOMNESS, "numpy.random"): "the one place where keys become streams",
    ("fedml_core/task.py", "torch.random.fork_rng"): "layers draw their initial weights from the global generator",
    ("fedml_core/task.py", "torch.default_generator"): "inside that fork, from a key",
    ("fedml_core/task.py", "torch.cuda.manual_seed_all"): "the same, for models that are built on a GPU",
    (
        "clients/fleet_trouble.py",
        "random.Random",
    ): "waits before a retry; clients must differ, and no result depends on it",
    (LOCAL_TORCH, "torch.default_generator"): "dropout draws from it; lent to one seed, then put back",
    (LOCAL_TORCH, "torch.cuda.default_generators"): "the same, on a GPU",
    (LOCAL_TORCH, "torch.mps.manual_seed"): "the same, on Apple's",
    (LOCAL_TORCH, "torch.mps.set_rng_state"): "the same, on Apple's",
}

DRAWS = frozenset(f"torch.{name}" for name in ("bernoulli", "multinomial", "normal", "poisson", "rand", "randint"))
DRAWS |= frozenset({"torch.randn", "torch.randperm"})
DRAWS |= frozenset(f".{name}_" for name in ("bernoulli", "cauchy", "exponential", "geometric", "log_normal", "normal"))
DRAWS |= frozenset({".random_", ".uniform_"})

Files = Mapping[str, str]
Rule = Callable[[Files], list[str]]


def arrows(files: Files) -> list[str]:
    """A package imports itself and what MAY_IMPORT names; nothing outside the wheel."""
    broken = []
    for use in uses_of(files):
        ours, theirs = use.file.split("/")[0], use.target.split(".")[0]
        known = use.is_import and theirs in (*PACKAGES, *OUTSIDE)
        if known and theirs not in (ours, *MAY_IMPORT[ours]):
            allowed = ", ".join(sorted(MAY_IMPORT[ours])) or "nothing of ours"
            broken.append(f"{use}; {ours} may import {allowed}")
    return broken


def commands_are_leaves(files: Files) -> list[str]:
    """Only the root command imports the commands, so that a library import never builds a command line."""
    return [
        f"{use}; only {ROOT_COMMAND} may import a command"
        for use in uses_of(files)
        if use.is_import and use.file != ROOT_COMMAND and any(use.within(command) for command in COMMANDS)
    ]


def flower_stays_in_its_files(files: Files) -> list[str]:
    """`flwr` is imported by its adapters alone, and its private names by the rows that name them."""
    broken = []
    for use in uses_of(files):
        if not use.is_import or not use.within("flwr"):
            continue
        private = FLOWER_FILES.get(use.file)
        if private is None:
            broken.append(f"{use}; only {', '.join(FLOWER_FILES)} adapt Flower")
        elif use.target not in flower_public() and not any(use.within(name) for name in private):
            broken.append(f"{use}, which is private to Flower; use flwr.app, flwr.clientapp or flwr.serverapp")
    return broken


def the_guard_comes_before_flower(files: Files) -> list[str]:
    """Flower reads its switches (telemetry is on by default) when it is imported, so the guard must be first."""
    broken = []
    for file, text in files.items():
        if file == GUARD:  # it loads Flower itself, once the switches are set
            continue
        imports = [use for use in uses_of({file: text}) if use.is_import and not use.typing_only]
        guards = [use.line for use in imports if use.within("fedml_core.engine_guard")]
        flower = [use for use in imports if use.within("flwr")]
        broken += [
            f"{use} before fedml_core.engine_guard; Flower would call home"
            for use in flower
            if not guards or use.line < min(guards)
        ]
    return broken


def forbidden_names(files: Files) -> list[str]:
    """What can run data as code, and randomness that no key reproduces, appear only where a row allows it."""
    broken = []
    for use in uses_of(files):
        reasons = [reason for name, reason in FORBIDDEN.items() if use.within(name)]
        judged_by_use = use.is_import and use.target in ("random", "numpy.random", "torch.random")
        if reasons and not judged_by_use and not is_harmless(use) and not allowances(use):
            broken.append(f"{use}; {reasons[0]}")
    return broken


def draws_name_their_generator(files: Files) -> list[str]:
    """A torch draw without `generator=` moves the global generator, and only one file makes generators."""
    broken = []
    for call in calls_of(files):
        if call.function == "torch.Generator" and call.file != RANDOMNESS:
            broken.append(f"{call}; {NOT_KEYED}")
        if call.function in DRAWS and "generator" not in call.keywords:
            broken.append(f"{call} without generator=; pass fedml_core.randomness.torch_generator(...)")
    return broken


def no_array_file_holds_objects(files: Files) -> list[str]:
    """NumPy's `allow_pickle` runs what it reads; its default is safe, so nobody passes it."""
    return [f"{call} with allow_pickle; leave it out" for call in calls_of(files) if "allow_pickle" in call.keywords]


def allowances(use: Use) -> list[tuple[str, str]]:
    return [row for row in ALLOWED if use.file == row[0] and use.within(row[1])]


def is_harmless(use: Use) -> bool:
    return any(use.within(name) for name in HARMLESS)


@cache
def flower_public() -> frozenset[str]:
    """Return Flower's documented names, read from the `__all__` of its public packages; Flower is not executed."""
    names = set(FLOWER_PUBLIC)
    for module in FLOWER_PUBLIC:
        for node in ast.parse(flower_source(module)).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                names |= {f"{module}.{name}" for name in ast.literal_eval(node.value)}
    return frozenset(names)


def flower_source(module: str) -> str:
    spec = find_spec("flwr")
    for part in module.split(".")[1:]:
        assert spec is not None
        spec = PathFinder.find_spec(part, spec.submodule_search_locations)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


RULES: tuple[Rule, ...] = (
    arrows,
    commands_are_leaves,
    flower_stays_in_its_files,
    the_guard_comes_before_flower,
    forbidden_names,
    draws_name_their_generator,
    no_array_file_holds_objects,
)
