"""What the bytes beside the masked vector say about it, and where randomness comes from."""

from __future__ import annotations

import ast
import hashlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedml_core.secagg import client, masks
from fedml_core.secagg.secrets import Secret
from tests.adversary.players import BINDING, World
from tests.sources import our_files


def drawn_from(seed: bytes) -> Callable[[int], bytes]:
    """Return what gives the same bytes as the operating system's generator, each time the tests run."""
    drawn = 0

    def urandom(size: int) -> bytes:
        nonlocal drawn
        drawn += 1
        return hashlib.shake_256(seed + drawn.to_bytes(8, "big")).digest(size)

    return urandom


def transcript(monkeypatch: pytest.MonkeyPatch, fill: int) -> tuple[list[bytes], list[bytes]]:
    """Return every message of a sum in which one is lost, and every masked vector."""
    monkeypatch.setattr(os, "urandom", drawn_from(b"the same in both runs"))
    world = World(6, corrupt_share=0.2, length=500)
    for vector in world.vectors.values():
        vector[:] = fill
    messages, vectors = [], []
    for member in world.members:
        messages.append(world.clients[member].advertise())
        world.server.receive_advert(member, messages[-1])
    messages.append(world.server.close_adverts().to_bytes)
    for member in world.members:
        messages.append(world.share_of(member))
        world.server.receive_shares(member, messages[-1])
    world.server.close_shares(BINDING)
    for member in range(5):
        messages.append(world.server.delivery(member))
        message, vector = world.masked(member)
        world.server.receive_masked(member, message, vector)
        messages.append(message)
        vectors.append(vector.tobytes())
    survivors = world.server.close_masked()
    for member in range(5):
        messages.append(world.clients[member].confirm(survivors))
        world.server.receive_confirmation(member, messages[-1])
    quorum = world.server.quorum()
    return [*messages, survivors, quorum, *(world.clients[member].unmask(quorum) for member in range(5))], vectors


def test_all_bytes_but_the_masked_vectors_are_the_same_whatever_was_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    # "A3 wire leakage: train with x=0 vs x=secret: all non-masked bytes identical up to fresh randomness; message
    # length constant."
    nothing, masked_nothing = transcript(monkeypatch, 0)
    something, masked_something = transcript(monkeypatch, 123_456_789)
    assert nothing == something
    assert all(one != other for one, other in zip(masked_nothing, masked_something, strict=True))


def test_lengths_are_the_same_in_every_run() -> None:
    def lengths(seed: int) -> list[int]:
        world = World(5, seed=seed)
        data = world.advertise().to_bytes
        return [len(data), *(len(world.share_of(member)) for member in world.members)]

    assert lengths(1) == lengths(2)


def test_what_a_member_sends_is_little_more_than_its_vector() -> None:
    # "A3: payload <= d*m/8 + 200*k + 4096 bytes"
    size, count = 1000, 20
    world = World(count, corrupt_share=0.1, length=size)
    advert = world.clients[0].advertise()
    world.clients[0] = world.client(0)
    world.advertise()
    sent = [len(advert), len(shares := world.share_of(0))]
    world.server.receive_shares(0, shares)
    for member in range(1, count):
        world.server.receive_shares(member, world.share_of(member))
    world.server.close_shares(BINDING)
    message, vector = world.masked(0)
    sent += [len(message), vector.nbytes]
    world.server.receive_masked(0, message, vector)
    for member in range(1, count):
        world.server.receive_masked(member, *world.masked(member))
    survivors = world.server.close_masked()
    quorum = world.confirm(survivors)
    sent += [6 + 64, len(world.clients[0].unmask(quorum))]
    assert sum(sent) <= 4 * size + 200 * (count - 1) + 4096


def test_every_bit_of_a_key_between_members_is_as_often_one_as_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    # "A6 key entropy: every one of 256 bits of the generator's keys has mean .5"; the generator itself: test_masks.py.
    keys: list[bytes] = []
    real = masks.add_masks

    def noted(vector: NDArray[Any], added: list[tuple[Secret, int]], **more: int) -> None:
        keys.extend(bytes(key.view()) for key, _ in added)
        real(vector, added, **more)

    monkeypatch.setattr(client, "add_masks", noted)
    for _ in range(4):
        World(32).until_masked()
    bits = np.unpackbits(np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), 32), axis=1)
    distinct = len(set(keys))
    assert len(keys) == 4 * 32 * 32 and distinct == 4 * (32 + 32 * 31 // 2)
    # Each key between two is there twice; six standard deviations of a mean over the distinct ones, about 1e-6 in all.
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 6 * 0.5 / distinct**0.5 * 2**0.5


FORBIDDEN = ("random", "torch", "numpy.random")


def imported(text: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
        elif isinstance(node, ast.Attribute) and node.attr in ("random", "default_rng", "RandomState"):
            found.add("numpy.random")
    return found


def test_no_other_generator_than_the_operating_systems_is_near() -> None:
    # "A6: source grep finds no np.random, random or torch RNG on any crypto, noise, rounding or sampling path"
    files = {file: text for file, text in our_files().items() if file.startswith("fedml_core/secagg/")}
    assert len(files) > 15
    assert {file: bad for file, text in files.items() if (bad := imported(text).intersection(FORBIDDEN))} == {}


@pytest.mark.parametrize("text", ["import random", "from torch import rand", "import torch", "np.random.rand()"])
def test_another_generator_would_be_seen(text: str) -> None:
    assert imported(text) & {*FORBIDDEN, "torch"}
