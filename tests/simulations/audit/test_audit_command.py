"""`fedveil audit`: verdict, exit code, files; errors in one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.simulations.project_cases import RUN, fedveil, last_json, nothing_stays, project

FAIL = """
from dataclasses import dataclass, replace
from fedml_core.privacy.gaussian import ServerGaussian
from fedml_core.transform import Chain
from strategies import CentralDP


@dataclass(frozen=True)
class _Nothing(ServerGaussian):
    def decode(self, total, state, draws):
        return self.released(total, total.values), state


@dataclass(frozen=True)
class Forgetful(CentralDP):
    def pipeline(self):
        parts = super().pipeline().parts
        last = parts[-1]
        return Chain((*parts[:-1], _Nothing(last.noise_multiplier, last.expected_cohort, bound=last.bound)))

"""

PRIVATE = """
[strategy]
name = "{name}"
strategy = {{ name = "FedAvg", weighting = "Uniform" }}
clip_norm = 0.1
noise_multiplier = 20.0
expected_cohort = 4
delta = 1e-3
"""


@pytest.fixture(autouse=True)
def nothing_of_the_task_stays() -> Iterator[None]:
    with nothing_stays():
        yield


def arguments(run: Path, out: Path) -> list[str | Path]:
    return ["audit", run, "--out", out, "--canaries", "16", "--shadow-models", "2", "--json", "--quiet"]


def test_a_run_is_audited_into_two_files(tmp_path: Path) -> None:
    run = project(tmp_path / "project")
    result = fedveil(*arguments(run, tmp_path / "out"))
    assert result.exit_code == 0, result.output
    found = last_json(result)
    assert found["verdict"] in ("PASS", "WARN")
    assert found["protection"] == "none"
    assert json.loads((tmp_path / "out" / "audit.json").read_text())["findings"] == found["findings"]
    page = (tmp_path / "out" / "audit.html").read_text()
    assert "data:image/png;base64," in page
    assert "gradient inversion" in page


def test_a_claim_that_does_not_hold_ends_with_1(tmp_path: Path) -> None:
    from tests.simulations.project_cases import TASK

    run = project(tmp_path / "project", RUN + PRIVATE.format(name="Forgetful"), FAIL + TASK)
    result = fedveil(*arguments(run, tmp_path / "out"), "--no-plots")
    assert result.exit_code == 1
    found = last_json(result)
    assert found["verdict"] == "FAIL"
    assert next(one for one in found["findings"] if one["what"] == "noise")["verdict"] == "FAIL"
    assert "<img" not in (tmp_path / "out" / "audit.html").read_text()


def test_the_audit_is_repeated_into_its_own_folder_and_into_no_other(tmp_path: Path) -> None:
    run, out = project(tmp_path / "project"), tmp_path / "out"
    assert fedveil(*arguments(run, out), "--no-plots").exit_code == 0
    assert fedveil(*arguments(run, out), "--no-plots").exit_code == 0
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("dear all")
    result = fedveil(*arguments(run, other))
    assert result.exit_code == 2
    assert "holds something that is no audit" in last_json(result)["error"]


def test_bad_input_is_one_line_and_2(tmp_path: Path) -> None:
    run = project(tmp_path / "project")
    result = fedveil("audit", run, "--canaries", "1", "--out", tmp_path / "out", "--json", "--quiet")
    assert result.exit_code == 2
    assert last_json(result)["error"] == "canaries must be >= 8 and <= 100000, got 1"
    for shadows, said in (("-1", "must be >= 0 and <= 256, got -1"), ("1", "must be 0 or at least 2, got 1: each")):
        result = fedveil("audit", run, "--shadow-models", shadows, "--out", tmp_path / "out", "--json", "--quiet")
        assert result.exit_code == 2
        assert last_json(result)["error"].startswith(f"--shadow-models {said}")
    assert fedveil("audit", tmp_path / "none.toml", "--json", "--quiet").exit_code == 2
