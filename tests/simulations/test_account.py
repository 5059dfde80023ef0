from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.simulations.project_cases import fedveil

DELTA = ("--delta", "1e-5")


def asked(*words: str) -> dict[str, Any]:
    result = fedveil("account", *words, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_an_answer_says_all_that_it_is_about() -> None:
    found = asked("--noise-multiplier", "1", *DELTA)
    assert found.pop("epsilon") == pytest.approx(4.377178, abs=1e-5)
    assert found == {
        "noise_multiplier": 1.0,
        "delta": 1e-5,
        "unit": "example",
        "adjacency": "add-or-remove-one",
        "sampling": "none",
        "accountant": "analytic-gaussian",
        "notes": [],
    }


@pytest.mark.parametrize(
    ("words", "epsilon", "adjacency"),
    [
        ("--noise-multiplier 1 --sampling-rate 0.1 --steps 100 --delta 1e-5", 7.0466, "add-or-remove-one"),
        ("--noise-multiplier 1 --delta 1e-5 --adjacency replace-one", 9.9973, "replace-one"),
        ("--noise-multiplier 1 --delta 1e-5 --mechanism local", 9.9973, "replace-one"),
        ("--noise-multiplier 10 --steps 10 --delta 1e-5 --mechanism laplace", 0.98996, "add-or-remove-one"),
        ("--noise-multiplier 7 --steps 1600 --delta 1e-6 --mechanism tree", 2.2811, "replace-special"),
        ("--noise-multiplier 2 --delta 1e-5 --mechanism matrix --sensitivity 2", 4.3772, "replace-special"),
        ("--noise-multiplier 1 --population 1000 --sample-size 100 --steps 100 --delta 1e-5", 83.937, "replace-one"),
    ],
)
def test_reference_values_are_answered_without_a_run(words: str, epsilon: float, adjacency: str) -> None:
    found = asked(*words.split(), "--unit", "client")
    assert found["epsilon"] == pytest.approx(epsilon, rel=1e-3)
    assert (found["adjacency"], found["unit"]) == (adjacency, "client")


def test_noise_is_found_for_a_target() -> None:
    found = asked("--target-epsilon", "4.377178", "--steps", "100", *DELTA)
    assert found["noise_multiplier"] == pytest.approx(10.0, rel=2e-4)
    assert found["epsilon"] <= 4.377178


def test_events_of_a_file_are_accounted_for(tmp_path: Path) -> None:
    path = tmp_path / "spent.json"
    once = {"name": "gaussian", "noise_multiplier": 10.0}
    path.write_text(json.dumps([{"name": "repeated", "count": 99, "event": once}, once]))
    found = asked("--events", str(path), *DELTA)
    assert found["epsilon"] == pytest.approx(4.377178, abs=1e-5)
    assert "noise_multiplier" not in found


def test_people_read_one_line_and_notes() -> None:
    result = fedveil("account", "--noise-multiplier", "1", "--delta", "1e-2", "--population", "100")
    assert result.exit_code == 0
    assert result.stdout.startswith("epsilon 2.3178 at delta 0.01 (unit example, add-or-remove-one, sampling none, ")
    assert "note: delta 0.01 is not below 1/100" in result.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--delta 1e-5", "exactly one of --noise-multiplier, --target-epsilon and --events; 0 of them"),
        ("--delta 1e-5 --noise-multiplier 1 --target-epsilon 1", "2 of them were given"),
        ("--delta 2 --noise-multiplier 1", "delta must be > 0 and < 1, got 2.0"),
        ("--delta 1e-5 --noise-multiplier -1", "noise_multiplier must be"),
        ("--delta 1e-5 --noise-multiplier 1 --steps 0", "--steps must be >= 1, got 0"),
        ("--delta 1e-5 --noise-multiplier 1 --mechanism magic", "--mechanism must be one of gaussian, laplace"),
        ("--delta 1e-5 --noise-multiplier 1 --sampling-rate 2", "sampling_probability must be > 0 and <= 1"),
        ("--delta 1e-5 --noise-multiplier 1 --sample-size 5", "--sample-size needs --population"),
        ("--delta 1e-5 --noise-multiplier 1 --mechanism matrix", "--mechanism matrix needs --sensitivity"),
        ("--delta 1e-5 --noise-multiplier 1 --restarts 1", "--restarts belongs to --mechanism tree"),
        ("--delta 1e-5 --noise-multiplier 1 --unit user", "unit must be one of client, example"),
        ("--delta 1e-5 --noise-multiplier 1 --adjacency bounded", "adjacency must be one of"),
        ("--delta 1e-5 --noise-multiplier 1 --mechanism tree --sampling-rate 0.1", "no theorem says what poisson"),
        ("--delta 1e-5 --events missing.json", "missing.json cannot be read"),
    ],
)
def test_a_bad_question_is_one_line_and_exit_code_2(words: str, said: str) -> None:
    result = fedveil("account", *words.split())
    assert result.exit_code == 2
    assert said in result.stderr and "Traceback" not in result.output


@pytest.mark.parametrize(("text", "said"), [("{", "is not JSON"), ("{}", "must hold a list of events, got a dict")])
def test_a_file_that_holds_no_events_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "spent.json"
    path.write_text(text)
    result = fedveil("account", "--events", str(path), *DELTA)
    assert result.exit_code == 2 and said in result.stderr
