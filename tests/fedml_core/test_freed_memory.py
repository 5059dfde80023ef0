"""Memory that is freed is kept where that was asked for, for as long as it was asked for, and nowhere else."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from fedml_core import freed_memory
from fedml_core.freed_memory import freed_memory_kept, keep_freed_memory, why_not_kept

GLIBC = platform.libc_ver()[0] == "glibc"
needs_glibc = pytest.mark.skipif(not GLIBC, reason="only glibc can keep freed memory")
KEEP, RESTORED = freed_memory._KEEP, freed_memory._RESTORED


@pytest.fixture(autouse=True)
def no_settings_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*freed_memory._OF_THE_USER, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Return what the process was set to, which then nothing really is."""
    seen: list[object] = []

    def set_to(settings: object) -> bool:
        seen.append(settings)
        return True

    monkeypatch.setattr(freed_memory, "_set", set_to)
    monkeypatch.setattr(freed_memory, "_keepers", 0)
    return seen


def printed(code: str) -> list[int]:
    """Return the numbers that `code` prints in a process of its own."""
    before = (
        "import ctypes, resource, torch\n"
        "from fedml_core.freed_memory import *\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(5): torch.zeros(10 << 20)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "def resident(): return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize() >> 20\n"
        "def given_back(size):\n"  # glibc marks blocks that go back to the system as soon as they are freed
        "    block = libc.malloc(ctypes.c_size_t(size << 20))\n"
        "    mark = ctypes.c_size_t.from_address(block - ctypes.sizeof(ctypes.c_size_t)).value & 2\n"
        "    libc.free(block)\n"
        "    return mark\n"
    )
    command = [sys.executable, "-c", before + code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return [int(number) for number in done.stdout.split()]


@needs_glibc
def test_keeping_freed_memory_spares_the_system_from_handing_it_out_again() -> None:
    # 5 times 40 MiB are 51,200 pages of 4 KiB, and 100 where the system hands out 2 MiB at a time. The heap grows by a
    # few blocks before all of them find room in it.
    last = "[faults() for _ in range(12)][-1]"
    assert printed(f"print({last})")[0] >= 100
    assert printed(f"assert keep_freed_memory(); print({last})")[0] < 20


@needs_glibc
def test_after_keeping_it_for_a_while_the_process_gives_memory_back_again() -> None:
    before, kept, after, released = printed(
        "print(given_back(400))\n"
        "with freed_memory_kept():\n"
        "    print(given_back(500)); faults(); large = resident()\n"
        "print(given_back(700), large - resident())"
    )
    assert (before, kept, after) == (2, 0, 2)
    assert released >= 30  # MiB; at least one tensor of 40 was kept


@needs_glibc
def test_what_leaves_by_an_exception_leaves_the_process_as_it_was(settings: list[object]) -> None:
    with pytest.raises(KeyError), freed_memory_kept():
        assert settings == [KEEP]
        raise KeyError
    assert settings == [KEEP, RESTORED]


@needs_glibc
def test_it_is_kept_until_the_last_one_leaves(settings: list[object]) -> None:
    with freed_memory_kept():
        with freed_memory_kept():
            pass
        assert settings == [KEEP]
    with freed_memory_kept():
        assert settings == [KEEP, RESTORED, KEEP]
    assert settings == [KEEP, RESTORED, KEEP, RESTORED]


@needs_glibc
def test_a_worker_that_keeps_it_for_good_is_not_ended_by_who_keeps_it_for_a_while(settings: list[object]) -> None:
    assert keep_freed_memory()
    with freed_memory_kept():
        pass
    assert settings == [KEEP]


@needs_glibc
@pytest.mark.parametrize(
    ("name", "value", "counts"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "100000", True),
        ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=1000000", True),
        ("GLIBC_TUNABLES", "glibc.pthread.rseq=0", False),
        ("MALLOC_ARENA_MAX", "2", False),
    ],
)
def test_settings_that_the_user_made_could_not_be_restored_and_stay(
    name: str, value: str, counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert why_not_kept() is None
    monkeypatch.setenv(name, value)
    assert why_not_kept() == (f"{name} has settings of its own for this process" if counts else None)


def test_other_systems_are_left_alone(settings: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freed_memory, "_has_glibc", lambda: False)
    assert why_not_kept() == "only Linux with glibc can be told to"
    assert not keep_freed_memory()
    assert settings == []
