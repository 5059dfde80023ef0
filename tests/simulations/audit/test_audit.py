"""The audit bites (A10): an honest run passes, and each sabotage of it fails, with 400 canaries."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fedml_core.errors import ConfigError
from server.sampling import PoissonSampling
from simulations.audit.audit import Audit, Audited
from simulations.audit.findings import Finding, Verdict
from simulations.audit.page import rows_of, write_audit
from simulations.audit.staging import shortened
from strategies import DistributedDP
from strategies.secure import SecAggPlus, SecureAggregation
from tests.simulations.audit.audit_cases import EPSILON, SABOTAGE, audit, federation, plain, private, same_noise
from tests.simulations.audit.example_cases import private_of

__all__ = ["same_noise"]


def finding(audited: Audited, what: str) -> Finding:
    return next(one for one in audited.findings if one.what == what)


@pytest.mark.usefixtures("same_noise")
def test_an_honest_gaussian_run_passes_and_its_epsilon_is_estimated(tmp_path: Path) -> None:
    audited = audit(private()).run(tmp_path)
    assert audited.verdict is Verdict.PASS, [str(one.said) for one in audited.findings]
    assert audited.claim is not None
    assert audited.claim["epsilon"] == pytest.approx(EPSILON, abs=0.01)
    canaries = finding(audited, "canaries").numbers
    # Half of 400 canaries leave a standard deviation of 0.3; their own directions hide a few per cent.
    assert canaries["estimate"] == pytest.approx(EPSILON, abs=0.7)
    assert canaries["one_run_bound_95"] <= EPSILON
    assert canaries["lost_replies"] == 0
    assert finding(audited, "noise").numbers["ratio"] == pytest.approx(1.0, abs=0.02)
    assert finding(audited, "clipping").numbers["longest"] <= 0.5


@pytest.mark.parametrize("name", SABOTAGE)
def test_each_sabotage_of_a_run_fails(name: str, tmp_path: Path) -> None:
    audited = audit(private(SABOTAGE[name])).run(tmp_path)
    assert audited.verdict is Verdict.FAIL
    assert audited.claim is not None
    assert audited.claim["epsilon"] == pytest.approx(EPSILON, abs=0.01)  # its accountant believes in it
    failed = {one.what for one in audited.findings if one.verdict is Verdict.FAIL}
    expected = {
        "half the noise": {"canaries", "noise"},
        "no clipping": {"canaries", "clipping"},
        "noise not refreshed": {"noise"},
        "same seed per layer": {"noise"},
        "noise after release": {"canaries", "noise"},
    }
    assert expected[name] <= failed


def test_a_run_that_claims_nothing_is_told_what_it_gives_away(tmp_path: Path) -> None:
    audited = audit(plain(), canaries=64).run(tmp_path)
    assert audited.verdict is Verdict.PASS
    assert audited.claim is None
    assert finding(audited, "canaries").verdict is Verdict.INFO
    assert finding(audited, "canaries").numbers["estimate"] > 10
    assert finding(audited, "noise").said == "no noise is claimed"


def test_canaries_are_sampled_as_clients_are(tmp_path: Path) -> None:
    audited = audit(private(), canaries=100, rounds=12, sampling=PoissonSampling(0.3)).run(tmp_path)
    assert audited.claim is not None
    assert audited.claim["sampling"] == "poisson"
    assert finding(audited, "sampling").verdict is Verdict.PASS
    assert 2 < sum(audited.facts["cohort_sizes"]) / 12 < 40
    assert audited.facts["most_participations"] < 12


def test_clients_that_protect_their_examples_are_audited_by_example(tmp_path: Path) -> None:
    simulation = dataclasses.replace(federation(plain()), private=private_of())
    said: list[str] = []
    audited = Audit(simulation=simulation, canaries=200, shadows=2, search_steps=5, seed=11).run(
        tmp_path, tell=said.append
    )
    assert audited.verdict is Verdict.PASS, [one.said for one in audited.findings]
    assert audited.claim is None
    assert audited.example_claim is not None
    assert audited.example_claim["unit"] == "example"
    assert finding(audited, "example books").numbers["rounds"] == 2
    assert finding(audited, "example books").numbers["printed"] == pytest.approx(audited.example_claim["epsilon"])
    assert finding(audited, "example canaries").verdict is Verdict.PASS
    assert finding(audited, "canaries").verdict is Verdict.INFO
    inverted = finding(audited, "gradient inversion")
    assert {case["hidden"] for case in inverted.numbers["cases"]} == {"yes"}
    assert any("gradient canaries" in text for text in said)
    assert audited.examples is not None
    page = write_audit(audited, tmp_path).read_text()
    assert "Claim on examples: epsilon" in page
    assert "data:image/png;base64," in page


def test_many_members_draw_their_masks_in_one_sum_of_the_fewest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    protocol = SecAggPlus(minimum=3, corrupt_share=0.0, dropout_share=0.0)
    simulation = federation(SecureAggregation(plain(), protocol=protocol))
    every = Audit(simulation=simulation, canaries=8, shadows=0, search_steps=1, seed=2)
    own = finding(every.run(tmp_path / "every"), "secure sums")
    assert (own.verdict, own.numbers["attempts"]) == (Verdict.PASS, 2)
    assert "one sum" not in own.said
    monkeypatch.setattr("simulations.audit.staging._MOST_MASKED", 10)
    audited = every.run(tmp_path / "one")
    alone = finding(audited, "secure sums")
    assert (alone.verdict, alone.numbers["attempts"]) == (Verdict.PASS, 1)
    assert "one sum of 3 members" in alone.said
    assert audited.facts["rounds"] == 2
    assert "active server" in audited.protection


def test_only_the_first_rounds_of_a_long_run_of_secure_sums_are_attacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simulations.audit.staging._MOST_SUMMED", 12)
    protocol = SecAggPlus(minimum=3, corrupt_share=0.0, dropout_share=0.0)
    size = federation(plain()).trainer.spec.size
    distributed = DistributedDP(
        plain(), clip_norm=0.5, noise_multiplier=4.0, delta=1e-5, size=size, cohort_size=12, honest=3, bits=20
    )
    simulation = federation(SecureAggregation(distributed, protocol=protocol), rounds=9)
    audited = Audit(simulation=simulation, canaries=8, shadows=0, search_steps=1, seed=2).run(tmp_path)
    assert (audited.facts["rounds"], audited.facts["rounds_of_the_run"]) == (2, 9)
    assert finding(audited, "canaries").said.startswith("in the first 2 of 9 rounds: ")
    assert finding(audited, "books").numbers["rounds"] == 2
    assert "after the 2 of 9 rounds that were attacked" in dict(rows_of(audited))["claim"]
    assert shortened(federation(plain(), rounds=9)).rounds == 9


def test_membership_is_inferred_against_the_run_without_canaries(tmp_path: Path) -> None:
    found = Audit(simulation=federation(plain()), canaries=16, shadows=4, search_steps=1, seed=5).run(tmp_path)
    membership = finding(found, "membership")
    assert membership.verdict is Verdict.INFO
    assert membership.numbers["shadow_models"] == 4
    assert set(membership.numbers["tpr_at_fpr"]) == {"0.001", "0.01", "0.1"}
    assert 0.2 < membership.numbers["area"] < 0.9


def test_an_audit_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="canaries must be >= 8"):
        Audit(simulation=federation(plain()), canaries=2)
    with pytest.raises(ConfigError, match="shadows must be 0 or at least 2"):
        Audit(simulation=federation(plain()), shadows=1)
