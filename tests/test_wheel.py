"""The wheel, installed away from the checkout, is enough: also beside a user's files with our packages' names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.sources import PACKAGES, ROOT

pytestmark = pytest.mark.timeout(600)
COPIED = ("pyproject.toml", "README.md", "LICENSE", *PACKAGES)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy, so that nothing is written to the checkout."""
    folder = tmp_path_factory.mktemp("build")
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *COPIED],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    for name in files:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(folder / "dist"),
        str(folder),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (built,) = (folder / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of an environment that holds the wheel, and sees this one's other packages."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python), "install", "-q"]
    subprocess.run([*command, "--no-deps", "--no-index", str(wheel)], check=True, capture_output=True, timeout=300)
    # Only what we depend on: an editable install of the checkout itself is found through files that are not followed.
    (site / "others.pth").write_text(f"import sys; sys.path.append({sysconfig.get_path('purelib')!r})\n")
    return python


def run(python: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [str(python.parent / "fedveil"), *words],
        cwd=folder, env=kept, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_the_wheel_holds_the_five_packages_and_what_they_need(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == set(PACKAGES)
    for package in PACKAGES:
        assert {f"{package}/__init__.py", f"{package}/__init__.pyi", f"{package}/py.typed"} <= set(names)
    assert any(name.startswith("simulations/templates/") for name in names)
    assert any(name.endswith("/LICENSE") for name in names)
    assert not [name for name in names if "test" in name.lower() or name.endswith((".pyc", ".fedveil"))]


def test_it_is_the_wheel_that_runs_and_not_the_checkout(installed: Path, tmp_path: Path) -> None:
    where = "import fedml_core, simulations; print(fedml_core.__file__, simulations.__file__)"
    found = subprocess.run(
        [str(installed), "-I", "-c", where], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert str(ROOT) not in found.stdout and found.stdout.count(str(installed.parent.parent)) == 2


def test_it_simulates_in_a_folder_with_a_users_own_files_of_our_names(installed: Path, tmp_path: Path) -> None:
    made = run(installed, tmp_path, "init", "project")
    assert made.returncode == 0, made.stderr
    project = tmp_path / "project"
    for name in ("server", "clients", "strategies"):
        (project / f"{name}.py").write_text(f"raise SystemExit('the user\\'s {name}.py was imported')\n")
    result = run(installed, project, "simulate", "run.toml", "--rounds", "2", "--json")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout.splitlines()[-1])
    expected = {
        "rounds", "clients", "metrics", "protection", "epsilon", "seconds", "bytes_up", "bytes_down", "engine", "out",
    }  # fmt: skip
    assert expected <= set(summary) and summary["rounds"] == 2 and summary["epsilon"] is None
    assert (project / summary["out"] / "history.jsonl").read_text().count("\n") == 2
    assert list((project / summary["out"] / "plots").glob("*.png"))
