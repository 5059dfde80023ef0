"""A site whose site.toml protects every example trains by DP-SGD, writes it down first, and says nothing exact."""

from __future__ import annotations

from pathlib import Path

import pytest

from clients.per_example import AdaptiveClipping, FlatClipping, PerLayerClipping
from clients.private_training import PrivateTraining
from fedml_core.errors import ConfigError
from fedml_core.messages import Refusal
from fedml_core.policy_tables import ExampleTable
from fedml_core.privacy.ledger import Account, Ledger
from fedml_core.update import Update
from fedml_core.weighting import Uniform, Weigh
from tests.clients.test_service import Site, train

NOTHING = "protected by {}; no differential privacy that can be counted: epsilon has no bound"
EXAMPLES = {"noise_multiplier": 1.0, "clip_norm": 1.0, "sampling_rate": 0.5}


def test_a_round_is_in_the_ledger_with_its_event_and_the_update_holds_no_exact_sum(tmp_path: Path) -> None:
    site = Site(tmp_path, examples=EXAMPLES)
    site.greet()
    update = site.work(train(Weigh(Uniform())))
    assert isinstance(update, Update) and bool(update.values.any())
    assert set(update.sums) <= {"examples"}
    entries = list(Ledger(tmp_path / "memory" / "ledger.sqlite").entries())
    assert len(entries) == 1
    assert entries[0].event == {
        "name": "repeated",
        "count": 2,
        "event": {
            "name": "poisson",
            "sampling_probability": 0.5,
            "event": {"name": "gaussian", "noise_multiplier": 1.0},
        },
    }


def test_a_budget_that_is_spent_refuses_the_next_round_before_it_trains(tmp_path: Path) -> None:
    site = Site(tmp_path, examples=EXAMPLES, budget={"epsilon": 8.0, "delta": 1e-5})
    site.greet()
    bodies = [site.work(train(Weigh(Uniform())), round_number=number) for number in range(1, 9)]
    refused = [isinstance(body, Refusal) for body in bodies]
    assert not refused[0] and refused[-1] and refused == sorted(refused)


def test_a_site_says_what_protected_it_and_what_its_own_ledger_counted(tmp_path: Path) -> None:
    site = Site(tmp_path, examples=EXAMPLES)
    assert site.service.account == NOTHING.format("none")
    site.greet()
    assert (site.service.summary["protection"], site.service.summary["epsilon"]) == ("none", None)
    for number in (1, 2):
        assert isinstance(site.work(train(Weigh(Uniform())), round_number=number), Update)
    ledger = Ledger(tmp_path / "memory" / "ledger.sqlite")
    spent = ledger.spent(Account("client-3", "example", "add-or-remove-one"), 1e-5)
    summary = site.service.summary
    assert (summary["protection"], summary["epsilon"], summary["privacy"]) == (
        "example",
        spent.epsilon,
        spent.to_json(),
    )
    assert site.service.account == f"protected by example; this run has cost {spent}"
    assert "unit example, add-or-remove-one, sampling poisson" in site.service.account
    (tmp_path / "memory" / "ledger.sqlite.head").unlink()
    assert site.service.summary["epsilon"] is None and site.service.account == NOTHING.format("example")
    assert any("what was spent cannot be said: this site's privacy ledger cannot be used" in line for line in site.said)


def test_a_site_that_nothing_protects_claims_nothing(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.greet()
    assert isinstance(site.work(train(Weigh(Uniform()))), Update)
    assert (site.service.summary["protection"], site.service.summary["epsilon"]) == ("none", None)
    assert site.service.account == NOTHING.format("none")


@pytest.mark.parametrize(
    ("name", "kind"), [("flat", FlatClipping), ("per-layer", PerLayerClipping), ("adaptive", AdaptiveClipping)]
)
def test_every_clipping_can_be_named(name: str, kind: type) -> None:
    private = PrivateTraining.of(ExampleTable.model_validate({**EXAMPLES, "clipping": name}))
    assert type(private.clipping) is kind and private.clipping.clip_norm == 1.0


def test_noise_that_is_none_is_refused_where_it_is_configured(tmp_path: Path) -> None:
    with pytest.raises((ConfigError, ValueError), match="noise_multiplier"):
        Site(tmp_path, examples={**EXAMPLES, "noise_multiplier": 0.0})
