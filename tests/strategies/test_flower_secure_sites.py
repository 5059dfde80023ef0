"""Secure sums inside a Flower app whose nodes have identities, or a keeper for their sessions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clients.replay import REPLAY_FILE
from clients.secure_keeper import keeping
from clients.secure_sessions import SecureSessions
from fedml_core.errors import RunError
from fedml_core.identity import PinnedRoster, enrol, new_operator_key, new_site_keys, read_operator_key
from fedml_core.pinned_roster import pin_roster
from server.flower import SecureFlowerStrategy
from simulations.flower_grid import Fault, LocalGrid
from tests.strategies.flower_cases import (
    BUT_THE_LAST,
    CLIENTS,
    EVERYBODY,
    START,
    honest,
    record_of,
    vector_of,
)
from tests.strategies.flower_secure_cases import (
    LAST,
    app_of,
    assert_moved,
    excluded,
    run,
    secure,
    stage_of,
    strategy_of,
)

# isort: split
from flwr.app import Context, Message


def test_a_keeper_holds_the_sessions_of_processes_that_live_for_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    strategy = strategy_of(metrics=("accuracy",))
    nodes = [{"partition-id": place, "fedveil-keeper": "k.sock"} for place in range(CLIENTS)]
    sessions = SecureSessions()
    with keeping(Path("k.sock"), sessions):
        moved, result = run(strategy, lambda message, context: app_of()(message, context), 2, clients=nodes, threads=3)
        assert len(sessions) == 0
    assert_moved(moved, 2 * EVERYBODY)
    assert result.train_metrics_clientapp[2]["accuracy"] == pytest.approx(0.2, abs=1e-4)
    assert not Path("k.sock").exists()


def test_an_app_that_fails_behind_a_keeper_is_told_apart_from_a_lost_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def train(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == CLIENTS - 1:
            raise ValueError("patient 4711 has no label")
        return honest(message, context)

    strategy = strategy_of()
    nodes = [{"partition-id": place, "fedveil-keeper": "k.sock"} for place in range(CLIENTS)]
    with keeping(Path("k.sock"), SecureSessions()):
        moved, _ = run(strategy, app_of(train), clients=nodes)
    assert_moved(moved, BUT_THE_LAST)
    assert excluded(strategy) == {CLIENTS - 1: ("client-app", "its train function raised ValueError")}


def test_a_node_whose_keeper_is_not_there_says_so_without_naming_its_files() -> None:
    nodes = [{"partition-id": place, "fedveil-keeper": "/nowhere/k.sock"} for place in range(CLIENTS)]
    with pytest.raises(RunError, match="could not take part") as caught:
        run(strategy_of(), app_of(), clients=nodes)
    assert "nowhere" not in str(caught.value)


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with four sites, whose numbers are not their places, and the operator's roster."""
    folder = tmp_path_factory.mktemp("sites")
    operator = new_operator_key(folder / "operator").hex()
    key = read_operator_key(folder / "operator")
    for place in range(CLIENTS):
        new_site_keys(folder / f"site{place}" / "keys")
        public = folder / f"site{place}" / "keys" / "site-public.json"
        enrol(folder / "roster.json", public, name=f"site{place}", client_id=_number(place), operator=key)
        (folder / f"site{place}" / "site.toml").write_text(
            f'id = {_number(place)}\ntask = "flower"\n[keys]\nsite = "keys"\n'
            f'[secure_aggregation]\nroster = "../roster.json"\noperator = "{operator}"\n'
        )
    (folder / "operator.txt").write_text(operator)
    return folder


def _number(place: int) -> int:
    return 70 - place


def _nodes(sites: Path, count: int = CLIENTS) -> Sequence[dict[str, Any]]:
    named = {place: {"fedveil-site": str(sites / f"site{place}" / "site.toml")} for place in range(count)}
    return [{"partition-id": place, **named.get(place, {})} for place in range(CLIENTS)]


def _roster(sites: Path) -> PinnedRoster:
    return pin_roster(sites / "roster.json", (sites / "operator.txt").read_text())


def _active(sites: Path) -> SecureFlowerStrategy:
    return strategy_of(secure(active=True), roster=_roster(sites))


def test_in_active_mode_sites_go_by_their_own_numbers_keys_and_counters(sites: Path) -> None:
    strategy = _active(sites)
    moved, _ = run(strategy, app_of(), 2, clients=_nodes(sites))
    assert_moved(moved, 2 * EVERYBODY)
    assert strategy.gathered is not None
    assert list(strategy.gathered.accepted) == sorted(_number(place) for place in range(CLIENTS))
    assert strategy.gathered.facts["active"] is True
    assert all((sites / f"site{place}" / "memory" / REPLAY_FILE).is_file() for place in range(CLIENTS))


def test_in_active_mode_a_node_lost_while_survivors_are_confirmed_stays_in_the_sum(sites: Path) -> None:
    def faults(node: int, message: Message) -> Fault | None:
        return Fault.DROP if node == LAST and stage_of(message) == "confirm" else None

    moved, _ = run(_active(sites), app_of(), clients=_nodes(sites), faults=faults)
    assert_moved(moved, EVERYBODY)


def test_in_active_mode_a_node_without_an_identity_takes_no_part(sites: Path, caplog: pytest.LogCaptureFixture) -> None:
    moved, _ = run(_active(sites), app_of(), clients=_nodes(sites, CLIENTS - 1))
    assert_moved(moved, BUT_THE_LAST)
    assert "name its site.toml as fedveil-site in the node config" in caplog.text


def test_a_site_does_not_believe_a_semi_honest_server_unless_it_says_so(
    sites: Path, caplog: pytest.LogCaptureFixture
) -> None:
    moved, _ = run(strategy_of(), app_of(), clients=_nodes(sites))
    np.testing.assert_array_equal(moved, 0)
    assert "allow_semi_honest is false" in caplog.text


def test_a_keeper_may_hold_a_site_in_active_mode(sites: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(sites)
    nodes = [dict(node) for node in _nodes(sites)]
    nodes[LAST - 1000] = {"partition-id": CLIENTS - 1, "fedveil-keeper": "k.sock"}
    with keeping(Path("k.sock"), SecureSessions(Path(f"site{CLIENTS - 1}/site.toml"))):
        moved, _ = run(_active(sites), app_of(), clients=nodes)
    assert_moved(moved, EVERYBODY)


def test_a_site_that_was_started_again_comes_back_as_another_node(sites: Path) -> None:
    class Restarted(LocalGrid):
        """The last node is gone from the second round on, and its site is there as another."""

        def get_node_ids(self) -> list[int]:
            *stayed, before, after = super().get_node_ids()
            return [*stayed, before] if len(starts) < CLIENTS else [*stayed, after]

    starts: list[int] = []

    def train(message: Message, context: Context) -> Message:
        starts.append(context.node_id)
        return honest(message, context)

    strategy, nodes = _active(sites), _nodes(sites)
    with Restarted(app_of(train), clients=[*nodes, nodes[-1]]) as grid:
        result = strategy.start(grid, record_of(START), num_rounds=3)
    assert starts[CLIENTS:].count(LAST) == 0
    assert starts[-CLIENTS:].count(LAST + 1) == 1
    assert strategy.gathered is not None
    assert len(strategy.gathered.accepted) == CLIENTS
    # In the second round it still lacked the session that its predecessor had prepared.
    assert_moved(vector_of(result.arrays) - START, EVERYBODY + BUT_THE_LAST + EVERYBODY)


def test_two_nodes_of_one_site_are_not_both_in_a_sum(sites: Path, caplog: pytest.LogCaptureFixture) -> None:
    nodes = _nodes(sites)
    strategy = _active(sites)
    run(strategy, app_of(), clients=[*nodes[:-1], nodes[0]])
    assert strategy.gathered is not None
    assert sorted(strategy.gathered.accepted) == sorted(_number(place) for place in range(CLIENTS - 1))
    assert f"it says that it is member {_number(0)}, as node 1000 does" in caplog.text
