"""The audit bites (A10): an honest run passes, and each sabotage of it fails, with 400 canaries."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedml_core.errors import ConfigError
from server.sampling import PoissonSampling
from simulations.audit.audit import Audit, Audited
from simulations.audit.findings import Finding, Verdict
from tests.simulations.audit.audit_cases import EPSILON, SABOTAGE, audit, federation, plain, private, same_noise

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
