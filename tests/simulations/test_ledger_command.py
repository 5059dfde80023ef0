"""`fedveil ledger` and `fedveil dry-run`: what was spent, whether it can be believed, and what would be answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from clients.policy import Policy
from fedml_core.errors import PrivacyError, RefusalError, RunError
from fedml_core.privacy.accounting import epsilon_of
from fedml_core.privacy.ledger import Account, Ledger, Purpose
from simulations.app import app
from tests.sources import ROOT

NOISE = {"name": "gaussian", "noise_multiplier": 3.0}
WARD = Account("ward", "client", "add-or-remove-one")
PRIVATE = """
[strategy]
name = "CentralDP"
clip_norm = 1.0
noise_multiplier = 3.0
expected_cohort = 5.0
delta = 1e-5
strategy = {name = "FedAvg", weighting = "Uniform"}
"""


def run(*words: str, code: int = 0) -> dict[str, Any]:
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == code, done.output
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "task.py").write_text((ROOT / "examples" / "iris" / "task.py").read_text())
    (tmp_path / "iris.libsvm").write_text((ROOT / "examples" / "iris" / "iris.libsvm").read_text())
    (tmp_path / "site.toml").write_text(
        'id = 0\ntask = "task.py"\n[ledger]\ndataset = "ward"\n[budget]\nunit = "client"\nepsilon = 8.0\n'
        '[policy]\naccept = ["central"]\nmaximum_epochs = 5\n'
    )
    ledger = Ledger(tmp_path / "memory" / "ledger.sqlite")
    for name in ("aaaa", "bbbb"):
        for number in range(3):
            ledger.reserve(NOISE, WARD, Purpose(name, "fl.example.org:8443", number + 1))
    return tmp_path


def test_show_says_what_every_run_spent_and_all_of_them(site: Path) -> None:
    found = run("ledger", "show", str(site))
    (account,) = found["accounts"]
    assert (account["dataset"], account["unit"], account["adjacency"], account["delta"]) == (
        "ward",
        "client",
        "add-or-remove-one",
        1e-5,
    )
    # Six releases with a multiplier of 3 are one with 3 / sqrt(6): 3.4668 by Balle and Wang.
    assert account["epsilon"] == pytest.approx(3.46682, abs=1e-4)
    assert [(row["run"], row["releases"], row["servers"]) for row in account["runs"]] == [
        ("aaaa", 3, ["fl.example.org:8443"]),
        ("bbbb", 3, ["fl.example.org:8443"]),
    ]
    assert account["budget"] == {"epsilon": 8.0}
    smaller = run("ledger", "show", str(site), "--delta", "1e-9")
    assert smaller["accounts"][0]["epsilon"] > account["epsilon"]


def test_show_says_that_a_release_without_noise_is_unbounded(site: Path) -> None:
    Ledger(site / "memory" / "ledger.sqlite").reserve(None, WARD, Purpose("cccc", "s", 1))
    (account,) = run("ledger", "show", str(site))["accounts"]
    assert account["epsilon"] is None
    assert account["claim"] == "unbounded: 1 of 7 releases carried no noise."
    assert account["runs"][0]["epsilon"] == pytest.approx(2.3415, abs=1e-3)


def test_verify_names_the_first_entry_that_was_taken_out(site: Path) -> None:
    found = run("ledger", "verify", str(site))
    assert (found["entries"], found["intact"]) == (6, True)
    assert run("ledger", "verify", str(site / "memory"), "--noted", found["hash"])["intact"]
    assert "must be 64 hex digits" in run("ledger", "verify", str(site), "--noted", "abc", code=2)["error"]
    gone = run("ledger", "verify", str(site), "--noted", "ab" * 32, code=2)["error"]
    assert "the hash abababababababab that was noted is in none of its 6 entries" in gone
    shorter = Ledger(site / "memory" / "shorter.sqlite")
    shorter.reserve(NOISE, WARD, Purpose("aaaa", "s", 1))
    shorter.path.replace(site / "memory" / "ledger.sqlite")
    assert "is the head of another ledger" in run("ledger", "verify", str(site), code=2)["error"]


def test_export_writes_one_line_an_entry_and_overwrites_nothing(site: Path) -> None:
    out = site / "export.jsonl"
    assert run("ledger", "export", str(site), "--out", str(out))["entries"] == 6
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line.get("event") for line in lines] == [None, *[NOISE] * 6]
    assert "is not overwritten" in run("ledger", "export", str(site), "--out", str(out), code=2)["error"]
    shown = CliRunner().invoke(app, ["ledger", "export", str(site / "memory" / "ledger.sqlite")])
    assert shown.stdout == out.read_text()


def test_a_ledger_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    for word in ("show", "verify", "export"):
        assert "does not exist" in run("ledger", word, str(tmp_path / "none.sqlite"), code=2)["error"]


@pytest.mark.parametrize("word", ["show", "verify", "export"])
def test_a_ledger_without_entries_is_none_where_its_head_is_not_and_reading_leaves_no_file(
    tmp_path: Path, word: str
) -> None:
    begun = Ledger(tmp_path / "ledger.sqlite")
    begun.digest([b"data"])  # which makes the ledger and its head, and no entry
    words, other = ("ledger", word, str(begun.path)), tmp_path / "other" / "ledger.head"
    assert CliRunner().invoke(app, words).exit_code == 0
    error = run(*words, "--head", str(other), code=2)["error"]
    assert error.startswith(f"{begun.path} has no entry, and its head {other} does not exist; name the head")
    assert "does not exist" in run("ledger", word, str(tmp_path / "none"), "--head", str(other), code=2)["error"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ledger.sqlite", "ledger.sqlite.head"]


def test_a_dry_run_tells_which_round_the_budget_would_refuse_and_writes_nothing(site: Path) -> None:
    (site / "run.toml").write_text(f'task = "task.py"\nrounds = 40\n{PRIVATE}')
    before = Ledger(site / "memory" / "ledger.sqlite").verify()
    found = run("dry-run", str(site), str(site), code=1)
    first, last = found["rounds"]
    assert (found["answer"], found["protection"]) == ("refused", "central")
    assert first == {"round": 1, "rule": None, "reason": None}
    # Of sqrt(n) / 3: epsilon 8 holds 24 releases, and 6 are spent.
    assert (last["round"], last["rule"]) == (19, "epsilon")
    (site / "run.toml").write_text(f'task = "task.py"\nrounds = 18\n{PRIVATE}')
    assert run("dry-run", str(site), str(site))["answer"] == "answered"
    assert Ledger(site / "memory" / "ledger.sqlite").verify() == before


@pytest.mark.parametrize(
    ("text", "rule", "reason"),
    [
        ("", "accept", "the server's work is protected by nothing that this site can see, it accepts central"),
        (
            f"{PRIVATE}[training]\nepochs = 6\n",
            "maximum_epochs",
            "the server asks for 6 epochs in a round, this site's maximum_epochs is 5",
        ),
        (
            '[strategy]\nname = "SecureAggregation"\nmax_weight = 100.0\nstrategy = "FedAvg"\n',
            "secure-aggregation",
            "this site has no pinned roster, so it takes part in no secure sum; name one in its site.toml",
        ),
    ],
)
def test_a_dry_run_says_the_refusal_that_the_site_would_say(site: Path, text: str, rule: str, reason: str) -> None:
    (site / "run.toml").write_text(f'task = "task.py"\n{text}')
    found = run("dry-run", str(site), str(site), code=1)
    assert found["answer"] == "refused"
    assert found["rounds"] == [{"round": 1, "rule": rule, "reason": reason}]


def test_a_dry_run_ends_as_a_refused_run_does_and_says_so(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (site / "run.toml").write_text(f'task = "task.py"\nrounds = 40\n{PRIVATE}')
    done = CliRunner().invoke(app, ["dry-run", str(site), str(site)])
    assert done.exit_code == RefusalError("epsilon", "no").exit_code == RunError("void").exit_code == 1
    assert done.stderr == "error: round 19 would be refused, so this ends with 1, as a refused run does\n"
    assert run("dry-run", str(site), str(site), code=1)["exit_code"] == 1

    def unaccountable(*_: object) -> None:
        raise PrivacyError("nothing accounts for this noise")

    monkeypatch.setattr(Policy, "check", unaccountable)
    found = run("dry-run", str(site), str(site), code=2)
    assert found["rounds"] == [{"round": 1, "rule": "privacy", "reason": "nothing accounts for this noise"}]
    monkeypatch.undo()
    (site / "run.toml").write_text(f'task = "task.py"\nrounds = 2\n{PRIVATE}')
    done = CliRunner().invoke(app, ["dry-run", str(site), str(site)])
    assert (done.exit_code, done.stderr) == (0, "")


def test_a_dry_run_holds_a_secure_sum_against_the_sites_own_floor(site: Path) -> None:
    (site / "run.toml").write_text(
        'task = "task.py"\n[strategy]\nname = "SecureAggregation"\nmax_weight = 100.0\nstrategy = "FedAvg"\n'
    )
    (site / "site.toml").write_text(
        'id = 0\ntask = "task.py"\n[secure_aggregation]\nallow_semi_honest = true\nminimum_cohort = 30\n'
    )
    (row,) = run("dry-run", str(site), str(site), code=1)["rounds"]
    assert row["rule"] == "minimum_cohort"
    (site / "site.toml").write_text('id = 0\ntask = "task.py"\n[secure_aggregation]\nallow_semi_honest = true\n')
    assert run("dry-run", str(site), str(site))["protection"] == "secure-aggregation"


def test_a_dry_run_holds_the_assistants_against_those_whom_the_site_trusts(site: Path) -> None:
    protocol = 'protocol = { name = "AssistedOneShot", assistants = [0, 1, 2] }'
    named = 'name = "SecureAggregation"\nmax_weight = 100.0\nstrategy = "FedAvg"'
    (site / "run.toml").write_text(f'task = "task.py"\n[strategy]\n{named}\n{protocol}\n')
    text = 'id = 0\ntask = "task.py"\n[secure_aggregation]\nallow_semi_honest = true\nassistants = '
    (site / "site.toml").write_text(f"{text}[0, 1]\n")
    (row,) = run("dry-run", str(site), str(site), code=1)["rounds"]
    assert (row["rule"], row["reason"]) == (
        "assistants",
        "the server names the assistants 0, 1, 2, this site's assistants are 0, 1; it must do without 2",
    )
    (site / "site.toml").write_text(f"{text}[0, 1, 2]\n")
    assert run("dry-run", str(site), str(site))["protection"] == "secure-aggregation"


def test_a_dry_run_tells_what_a_limit_for_each_round_would_say(site: Path) -> None:
    (site / "run.toml").write_text(f'task = "task.py"\nrounds = 5\n{PRIVATE}')
    text = (site / "site.toml").read_text()
    (site / "site.toml").write_text(text.replace("epsilon = 8.0", "epsilon_per_round = 1.0"))
    assert run("dry-run", str(site), str(site), code=1)["rounds"][0]["rule"] == "epsilon_per_round"
    (site / "site.toml").write_text(text.replace("epsilon = 8.0", "epsilon_per_round = 2.0"))
    assert run("dry-run", str(site), str(site))["answer"] == "answered"


def test_a_dry_run_tells_what_a_sites_own_protection_of_examples_would_cost_and_refuse(site: Path) -> None:
    protecting = (
        'id = 0\ntask = "task.py"\n[policy]\naccept = ["example"]\n[budget]\nepsilon = 8.0\ndelta = 1e-6\n'
        "[examples]\nnoise_multiplier = 1.0\nclip_norm = 1.0\nsampling_rate = 0.2\n"
    )
    (site / "site.toml").write_text(protecting)
    (site / "run.toml").write_text('task = "task.py"\nrounds = 40\n')
    found = run("dry-run", str(site), str(site), code=1)
    assert (found["answer"], found["protection"]) == ("refused", "example")
    assert (found["rounds"][-1]["rule"], found["rounds"][0]["rule"]) == ("epsilon", None)
    first, last = found["example_privacy"]
    assert (first["round"], last["round"]) == (1, found["rounds"][-1]["round"] - 1)
    event = {"name": "poisson", "sampling_probability": 0.2, "event": {"name": "gaussian", "noise_multiplier": 1.0}}
    for cost in (first, last):
        spent = [{"name": "repeated", "count": 5 * cost["round"], "event": event}]
        exact = epsilon_of(spent, delta=1e-6, unit="example", adjacency="add-or-remove-one")
        assert cost == {"round": cost["round"], **exact.to_json()}
    assert first["epsilon"] < last["epsilon"] <= 8.0
    (site / "site.toml").write_text(f"{protecting}[policy.example]\nminimum_noise_multiplier = 2.0\n")
    refused = run("dry-run", str(site), str(site), code=1)
    assert refused["rounds"][0]["rule"] == "example.minimum_noise_multiplier" and refused["example_privacy"] == []


def test_a_dry_run_says_that_a_run_protects_the_examples_of_simulated_clients_only(site: Path) -> None:
    examples = "[clients.examples]\nnoise_multiplier = 1.0\nclip_norm = 1.0\nsampling_rate = 0.2\n"
    (site / "run.toml").write_text(f'task = "task.py"\n{PRIVATE}{examples}')
    done = CliRunner().invoke(app, ["dry-run", str(site), str(site)])
    assert "the run's [clients.examples] is for simulated clients" in done.output
    assert run("dry-run", str(site), str(site))["example_privacy"] is None
