"""Memories that spill: what is kept, what a checkpoint refers to, and what a kill at any moment leaves."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from clients.memory import STORE_NAME, InProcessMemory, Remembered
from clients.spilling_memory import SpillingMemory
from fedml_core.errors import CheckpointError, ConfigError
from fedml_core.storage import load_tree
from tests.sources import ROOT

SIZE = 32
ONE = 2 * 4 * SIZE  # bytes of the arrays of one memory


def memory_of(client: int, round_number: int) -> Remembered:
    """Return what `client` keeps after a round: before it, the round before's, after it, its number."""
    before, after = (torch.full((SIZE,), float(1000 * client + number)) for number in (round_number - 1, round_number))
    return Remembered(round_number, {"0": {"variate": before}}, {"0": {"variate": after}, "steps": round_number})


def same(one: Remembered | None, other: Remembered | None) -> bool:
    if one is None or other is None:
        return one is other
    states = ((one.before, other.before), (one.after, other.after))
    equal = all(torch.equal(a["0"]["variate"], b["0"]["variate"]) for a, b in states)
    return equal and one.round == other.round and one.after.get("steps") == other.after.get("steps")


def entered(store: SpillingMemory, client: int, round_number: int) -> float:
    kept = store.get(client)
    assert kept is not None
    return float(kept.entering(round_number)["0"]["variate"][0])


@pytest.mark.parametrize("room", [0, 3 * ONE, 1 << 30])
def test_what_was_put_last_is_what_is_got_whatever_has_been_spilled(tmp_path: Path, room: int) -> None:
    with SpillingMemory(tmp_path, room) as store:
        for round_number in (1, 2):
            for client in range(10):
                store.put(client, memory_of(client, round_number))
        assert all(same(store.get(client), memory_of(client, 2)) for client in (*range(10), 0, 9))
        assert store.get(10) is None


def test_only_so_much_is_kept_at_hand(tmp_path: Path) -> None:
    with SpillingMemory(tmp_path, 3 * ONE) as store:
        for client in range(100):
            store.put(client, memory_of(client, 1))
            assert len(store._held) <= 3 and store._held_bytes == len(store._held) * ONE
        for client in range(100):
            store.get(client)
            assert len(store._held) <= 3


@pytest.mark.parametrize("room", [0, 3 * ONE, 1 << 30])
def test_a_resumed_store_is_the_one_of_the_checkpoint(tmp_path: Path, room: int) -> None:
    with SpillingMemory(tmp_path, room) as store:
        for client in range(6):
            store.put(client, memory_of(client, 1))
        tree = store.to_tree()
        for client in range(3, 9):  # of a round that no checkpoint has seen
            store.put(client, memory_of(client, 2))
    with SpillingMemory(tmp_path, room) as store:
        store.restore(tree)
        assert all(same(store.get(client), memory_of(client, 1)) for client in range(6))
        assert all(store.get(client) is None for client in range(6, 9))


def test_a_store_one_round_ahead_of_its_checkpoint_is_taken_back(tmp_path: Path) -> None:
    # A kill between the store's commit and the checkpoint's rename leaves the older checkpoint.
    with SpillingMemory(tmp_path, 2 * ONE) as store:
        for client in range(4):
            store.put(client, memory_of(client, 1))
        older = store.to_tree()
        for client in range(2, 8):
            store.put(client, memory_of(client, 2))
        store.to_tree()
    with SpillingMemory(tmp_path, 2 * ONE) as store:
        store.restore(older)
        # Whoever took part in round 2 enters it, and any later round, as round 1 left it.
        for client in range(4):
            assert entered(store, client, 2) == entered(store, client, 3) == 1000 * client + 1
        for client in range(4, 8):
            assert entered(store, client, 2) == entered(store, client, 9) == 1000 * client + 1
        again = store.to_tree()
    with SpillingMemory(tmp_path, 2 * ONE) as store:
        store.restore(again)
        assert entered(store, 7, 9) == 7001


def test_a_round_is_written_and_not_the_population(tmp_path: Path) -> None:
    with SpillingMemory(tmp_path, 1 << 30) as store:
        for client in range(200):
            store.put(client, memory_of(client, 1))
        store.to_tree()
        written: list[str] = []
        assert store._table is not None
        store._table._connection.set_trace_callback(written.append)
        for client in (5, 7):
            store.put(client, memory_of(client, 2))
        tree = store.to_tree()
        store._table._connection.set_trace_callback(None)
        assert sum(line.startswith("INSERT") for line in written) == 2
        assert len(str(tree)) < 200  # what the checkpoint holds does not grow with the clients either


def test_a_run_whose_clients_remember_nothing_leaves_no_store(tmp_path: Path) -> None:
    with SpillingMemory(tmp_path) as store:
        assert store.get(0) is None
        assert store.to_tree() == {}
        store.restore({})
    assert list(tmp_path.iterdir()) == []


def test_a_new_run_in_the_folder_begins_without_the_old_ones_memories(tmp_path: Path) -> None:
    with SpillingMemory(tmp_path, 0) as store:
        store.put(1, memory_of(1, 1))
        store.to_tree()
    with SpillingMemory(tmp_path, 0) as store:
        store.restore({})
        assert store.get(1) is None
        assert list(tmp_path.iterdir()) == []


def test_a_closed_store_leaves_one_file(tmp_path: Path) -> None:
    with SpillingMemory(tmp_path, 0) as store:
        store.put(1, memory_of(1, 1))
        store.to_tree()
        store.put(1, memory_of(1, 2))
    assert [path.name for path in tmp_path.iterdir() if path.stat().st_size] == [STORE_NAME]
    store.close()


def test_a_run_can_go_on_with_a_store_that_was_begun_without_one(tmp_path: Path) -> None:
    plain = InProcessMemory()
    plain.put(3, memory_of(3, 1))
    with SpillingMemory(tmp_path, 0) as store:
        store.restore(plain.to_tree())
        assert same(store.get(3), memory_of(3, 1))
        tree = store.to_tree()
    with pytest.raises(CheckpointError, match="memories are in its memories.sqlite.*resume it with a SpillingMemory"):
        plain.restore(tree)


KILLED = """
import os, signal, sys
from pathlib import Path
from clients.spilling_memory import SpillingMemory
from fedml_core.storage import save_tree
from tests.clients.test_memory import memory_of

folder, when = Path(sys.argv[1]), int(sys.argv[2])
done = 0

def step():
    global done
    done += 1
    if done == when:
        os.kill(os.getpid(), signal.SIGKILL)

store = SpillingMemory(folder, 5 * 256)
for number in range(1, 4):
    for client in range(number, number + 12):
        store.put(client, memory_of(client, number))
        step()
    tree = store.to_tree()
    step()
    save_tree(folder / "checkpoint", "test", {"round": number, "extra": tree})
    step()
"""


@pytest.mark.parametrize("when", [1, 11, 13, 14, 20, 27, 28, 40, 41])
def test_a_kill_at_any_moment_leaves_what_the_checkpoint_refers_to(tmp_path: Path, when: int) -> None:
    outcome = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(when)], cwd=ROOT, timeout=120)
    assert outcome.returncode == -signal.SIGKILL
    last, tree = 0, {}
    if (tmp_path / "checkpoint").exists():
        saved: dict[str, Any] = load_tree(tmp_path / "checkpoint", "test")
        last, tree = saved["round"], saved["extra"]
    assert last == (when - 1) // 14 + (when % 14 == 0) * 1
    with SpillingMemory(tmp_path, 5 * ONE) as store:
        store.restore(tree)
        for client in range(20):
            rounds = [number for number in range(1, last + 1) if number <= client < number + 12]
            late = last + 1 <= client < last + 13
            if rounds:
                # Of round 3 the client keeps what round 3 made of it, also if round 4 had begun.
                assert entered(store, client, last + 1) == 1000 * client + (last if late else rounds[-1])
            elif store.get(client) is not None:
                assert late and entered(store, client, last + 1) == 1000 * client + last


def test_a_store_of_another_run_or_of_another_time_is_refused(tmp_path: Path) -> None:
    trees = []
    for name in ("a", "b"):
        with SpillingMemory(tmp_path / name, 0) as store:
            for number in (1, 2, 3):
                store.put(number, memory_of(number, number))
                trees.append(store.to_tree())
    with SpillingMemory(tmp_path / "a") as store:
        with pytest.raises(CheckpointError, match="belongs to another run than the checkpoint"):
            store.restore(trees[3])
        with pytest.raises(CheckpointError, match="is 2 rounds ahead of the checkpoint's round 1"):
            store.restore(trees[0])
        store.restore(trees[1])
    (tmp_path / "a" / STORE_NAME).unlink()
    with SpillingMemory(tmp_path / "a") as store, pytest.raises(CheckpointError, match="does not exist"):
        store.restore(trees[2])


def test_damage_is_one_clear_error(tmp_path: Path) -> None:
    with SpillingMemory(tmp_path, 0) as store:
        store.put(4, memory_of(4, 1))
        tree = store.to_tree()
    raw = sqlite3.connect(tmp_path / STORE_NAME)
    raw.execute("UPDATE memory SET header = replace(header, '1', '2')")
    raw.commit()
    raw.close()
    with SpillingMemory(tmp_path, 0) as store:
        store.restore(tree)
        with pytest.raises(CheckpointError, match="is damaged: client 4: its checksum is wrong; restore it"):
            store.get(4)
    (tmp_path / STORE_NAME).write_bytes(b"no data base" * 100)
    with SpillingMemory(tmp_path, 0) as store, pytest.raises(CheckpointError, match="cannot be used: file is not a"):
        store.restore(tree)


def test_a_disk_that_refuses_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with SpillingMemory(tmp_path / "file", 0) as store, pytest.raises(CheckpointError, match="cannot be used"):
        store.put(4, memory_of(4, 1))
    with pytest.raises(ConfigError, match="memory_bytes must be >= 0, got -1"):
        SpillingMemory(tmp_path, -1)


def test_two_runs_cannot_write_one_store(tmp_path: Path) -> None:
    child = (
        "import sys\nfrom pathlib import Path\nfrom clients.spilling_memory import SpillingMemory\n"
        "from tests.clients.test_memory import memory_of\n"
        "store = SpillingMemory(Path(sys.argv[1]), 0)\nstore.put(1, memory_of(1, 1))\nprint('open', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", child, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"open\n"
        with SpillingMemory(tmp_path, 0) as store, pytest.raises(CheckpointError, match="database is locked"):
            store.put(2, memory_of(2, 1))
        other.kill()


def test_a_closed_memory_in_this_process_is_empty() -> None:
    plain = InProcessMemory()
    plain.put(3, memory_of(3, 1))
    plain.close()
    plain.close()
    assert plain.get(3) is None
