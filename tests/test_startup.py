"""What a command imports before it does anything: modules are counted, since seconds differ from machine to machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.simulations.project_cases import project
from tests.sources import ROOT

RUN = """
import json, sys
sys.argv = ["fedveil", *json.loads(sys.argv[1])]
from simulations.app import main
try:
    main()
except SystemExit:
    pass
finally:
    print(json.dumps(sorted(sys.modules)))
"""


def modules(*arguments: str) -> list[str]:
    """Return the modules that a command leaves imported."""
    command = [sys.executable, "-c", RUN, json.dumps(arguments)]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    found: list[str] = json.loads(outcome.stdout.splitlines()[-1])
    return found


def packages(names: list[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def test_help_imports_nothing_that_computes() -> None:
    found = modules("--help")
    heavy = {"torch", "numpy", "pydantic", "flwr", "sklearn", "matplotlib", "opacus", "cryptography", "grpc", "asyncio"}
    assert not packages(found) & heavy
    assert "typer" in packages(found)
    # About 370 on Python 3.11, most of which draw the help: a package more would be felt by whoever types it.
    assert len(found) < 450


def test_help_of_simulate_imports_nothing_that_computes() -> None:
    assert not packages(modules("simulate", "--help")) & {"torch", "numpy", "pydantic", "flwr", "matplotlib"}


def test_a_simulation_imports_nothing_that_it_does_not_use(tmp_path: Path) -> None:
    run = project(tmp_path)
    found = modules("simulate", str(run), "--out", str(tmp_path / "out"), "--no-plots", "--quiet", "--rounds", "1")
    assert {"torch", "pydantic", "simulations"} <= packages(found)
    unused = {"flwr", "matplotlib", "opacus", "dp_accounting", "sklearn", "scipy", "pandas", "cryptography", "grpc"}
    assert not packages(found) & unused
    assert "simulations.flower_grid" not in found
    # A second and a half of torch's compiler and its algebra, which no step of plain SGD needs.
    assert not {"torch._dynamo", "torch.fx.experimental.symbolic_shapes", "sympy"} & set(found)


def test_reading_a_run_file_does_not_wake_torchs_compiler(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from fedml_core.config import load_run; "
        "from fedml_core.loading import load_task; from simulations.configure import simulation_from; "
        f"config = load_run(Path({str(project(tmp_path))!r})); "
        "simulation_from(config, load_task(config.task, config.folder)); "
        "print('torch._dynamo' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert outcome.stdout == "False\n"
