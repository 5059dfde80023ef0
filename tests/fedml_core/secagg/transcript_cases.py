"""Transcripts of whole sums, for the tests that check and spoil them."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedml_core.secagg.client import ClientSession
from fedml_core.secagg.parameters import Parameters
from fedml_core.secagg.party import Party
from fedml_core.secagg.server import ServerSession
from fedml_core.secagg.transcript import record
from tests.fedml_core.secagg.assisted_cases import BINDING, Assisted

Transcript = dict[str, Any]
Path = tuple[str | int, ...]
KEYS = {member: Ed25519PrivateKey.from_private_bytes(bytes([member + 1]) * 32) for member in range(120)}
ROSTER = {member: key.public_key().public_bytes_raw() for member, key in KEYS.items()}
STAGES = ("nothing", "adverts", "bulletin", "shares", "masked", "survivors", "confirmed", "unmasked", "sum")


def secagg(
    members: int = 5,
    *,
    gone: Mapping[str, Collection[int]] | None = None,
    until: str = "sum",
    keys: Mapping[int, Ed25519PrivateKey] = KEYS,
    **changes: Any,
) -> Transcript:
    """Return what an attempt records that lost `gone` after each stage, and that ended after `until`."""
    fields = {"run": "r", "round": 1, "attempt": 7, "minimum": 2, "corrupt_share": 0.2, "dropout_share": 0.2}
    parameters = Parameters(**{"length": 8, "bits": 32, "encoding": {"clip": 1.0}, "roster": "ab", **fields, **changes})
    play = _Play(parameters, members, keys)
    for stage in STAGES[1 : STAGES.index(until) + 1]:
        for earlier in STAGES[: STAGES.index(stage)]:
            for one in (gone or {}).get(earlier, ()):
                play.clients.pop(one, None)
        getattr(play, stage)()
    made: Transcript = json.loads(json.dumps(record(play.server, play.total)))
    return made


class _Play:
    """A sum whose stages are taken one by one, by the members that are left."""

    def __init__(self, parameters: Parameters, members: int, keys: Mapping[int, Ed25519PrivateKey]) -> None:
        roster = {one: keys[one].public_key().public_bytes_raw() for one in range(members)}
        self.clients = {one: ClientSession(parameters, Party(one, roster, keys[one].sign)) for one in range(members)}
        self.server = ServerSession(parameters, range(members), roster)
        self.named = b""
        self.total: Any = None

    def adverts(self) -> None:
        for one, client in self.clients.items():
            self.server.receive_advert(one, client.advertise())

    def bulletin(self) -> None:
        self.server.close_adverts()

    def shares(self) -> None:
        message = self.server.bulletin.to_bytes
        for one, client in self.clients.items():
            self.server.receive_shares(one, client.share(client.read_bulletin(message)))

    def masked(self) -> None:
        self.server.close_shares(BINDING)
        for one, client in self.clients.items():
            client.receive(self.server.delivery(one), BINDING)
            vector = np.full(8, one, "<u4")
            self.server.receive_masked(one, client.mask(vector), vector)

    def survivors(self) -> None:
        self.named = self.server.close_masked()

    def confirmed(self) -> None:
        for one, client in self.clients.items():
            self.server.receive_confirmation(one, client.confirm(self.named))

    def unmasked(self) -> None:
        quorum = self.server.quorum()
        for one, client in self.clients.items():
            self.server.receive_unmasking(one, client.unmask(quorum))

    def sum(self) -> None:
        self.total = self.server.unmask()
        np.testing.assert_array_equal(self.total, np.full(8, sum(self.server.survivors), "<u4"))


def assisted(members: int = 4, **options: Any) -> tuple[Transcript, dict[int, bytes]]:
    """Return what an assisted sum records, and its roster."""
    case = Assisted(members, **options)
    total = case.run()
    made: Transcript = json.loads(json.dumps(record(case.server, total)))
    return made, case.roster


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield every leaf of a JSON value with its place."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from leaves(item, (*path, name))
    elif isinstance(value, list):
        for place, item in enumerate(value):
            yield from leaves(item, (*path, place))
    else:
        yield path, value


def with_leaf(transcript: Transcript, path: Path, value: Any) -> Transcript:
    """Return the transcript with another value at one place."""
    made = copy.deepcopy(transcript)
    where: Any = made
    for step in path[:-1]:
        where = where[step]
    where[path[-1]] = value
    return made


def without(transcript: Transcript, path: Path) -> Transcript:
    """Return the transcript without what is at one place."""
    made = copy.deepcopy(transcript)
    where: Any = made
    for step in path[:-1]:
        where = where[step]
    del where[path[-1]]
    return made


def others(value: Any) -> list[Any]:
    """Return other values than this leaf: near ones, and ones of another type."""
    if isinstance(value, str):
        flipped = [value[:-1] + ("0" if value[-1:] != "0" else "1")] if value else ["0"]
        return [*flipped, value + "00", value.upper() if value.upper() != value else "x", "", None, 0, [], {}]
    if isinstance(value, int):
        return [value + 1, value - 1, -1, 2**40, float(value) + 0.5, True, None, f"{value}", [value], {}]
    return [0, "0" * 64, [], {}, False]
