"""The operator's key, and the roster that it signs: altered, older, foreign and unsigned ones are not believed."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedml_core.errors import ConfigError
from fedml_core.identity import (
    PinnedRoster,
    PublicKeys,
    Roster,
    Site,
    enrol,
    new_operator_key,
    new_site_keys,
    pin_roster,
    public_half,
    read_operator_key,
    read_roster,
    read_site_keys,
    revoke,
    sign_roster,
)

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    for name in ("north", "south"):
        new_site_keys(folder / name)
    for name in ("operator", "stranger"):
        new_operator_key(folder / name)
    return folder


@pytest.fixture
def operator(keys: Path) -> Ed25519PrivateKey:
    return read_operator_key(keys / "operator")


@pytest.fixture
def stranger(keys: Path) -> Ed25519PrivateKey:
    return read_operator_key(keys / "stranger")


@pytest.fixture
def roster(tmp_path: Path, keys: Path, operator: Ed25519PrivateKey) -> Path:
    path = tmp_path / "roster.json"
    enrol(path, keys / "north" / "site-public.json", name="north", client_id=7, operator=operator)
    return path


def hex_of(key: Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes_raw().hex()


def identity_of(keys: Path, name: str) -> bytes:
    return public_half(read_site_keys(keys / name)).identity


def altered(path: Path, change: Change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_an_operators_key_is_made_once_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    public = new_operator_key(tmp_path / "deep" / "op")
    found = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "deep" / "op").iterdir()}
    assert found == {"operator-key.json": 0o600, "operator-public.txt": 0o644}
    assert (tmp_path / "deep" / "op" / "operator-public.txt").read_text() == f"{public.hex()}\n"
    assert hex_of(read_operator_key(tmp_path / "deep" / "op" / "operator-key.json")) == public.hex()
    for existing in found:
        folder = tmp_path / existing
        folder.mkdir()
        (folder / existing).write_text("precious")
        with pytest.raises(ConfigError, match=f"{existing} exists already and is not overwritten; move it away first"):
            new_operator_key(folder)
        assert [path.read_text() for path in folder.iterdir()] == ["precious"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=[1]), "must be a 'fedveil-operator-key' file of version 1, got .* version \\[1\\]"),
        (lambda c: c.update(version=True), "must be a 'fedveil-operator-key' file of version 1"),
        (lambda c: c.update(more=1), "must have exactly the entries format, version, operator"),
        (lambda c: c.update(operator=3), "does not hold a readable key"),
        (lambda c: c.update(operator="x"), "does not hold a readable key"),
    ],
)
def test_a_damaged_operators_key_is_refused_by_name(tmp_path: Path, change: Change, message: str) -> None:
    new_operator_key(tmp_path)
    altered(tmp_path / "operator-key.json", change)
    with pytest.raises(ConfigError, match=f"operator-key.json {message}"):
        read_operator_key(tmp_path)


def test_an_operators_key_of_another_kind_or_open_to_others_is_refused(tmp_path: Path, keys: Path) -> None:
    new_operator_key(tmp_path)
    node = json.loads((keys / "north" / "site-keys.json").read_text())["node"]
    altered(tmp_path / "operator-key.json", lambda content: content.update(operator=node))
    with pytest.raises(ConfigError, match="must hold an Ed25519 key; restore it from a copy"):
        read_operator_key(tmp_path)
    (tmp_path / "operator-key.json").chmod(0o604)
    with pytest.raises(ConfigError, match=r"can be read by others \(mode 0604\); run chmod 600 on it"):
        read_operator_key(tmp_path)


def test_every_change_raises_the_serial_and_makes_another_digest(
    roster: Path, keys: Path, operator: Ed25519PrivateKey
) -> None:
    digests = [PinnedRoster.of(read_roster(roster)).digest]
    enrol(roster, keys / "south" / "site-public.json", name="south", client_id=3, operator=operator)
    digests.append(PinnedRoster.of(read_roster(roster)).digest)
    revoke(roster, "south", operator=operator)
    after = PinnedRoster.of(read_roster(roster))
    digests.append(after.digest)
    assert (after.serial, after.operator) == (3, hex_of(operator))
    assert (dict(after.keys), after.revoked) == ({7: identity_of(keys, "north")}, frozenset({3}))
    assert len(set(digests)) == 3
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)


def test_the_same_file_gives_server_and_site_the_same_digest_however_it_is_laid_out(
    roster: Path, keys: Path, operator: Ed25519PrivateKey
) -> None:
    enrol(roster, keys / "south" / "site-public.json", name="south", client_id=3, operator=operator)
    server = PinnedRoster.of(read_roster(roster))
    roster.write_text(json.dumps(json.loads(roster.read_text()), sort_keys=True, indent=7))
    site = pin_roster(roster, hex_of(operator))
    assert site == server
    assert list(site.keys) == [3, 7]


def test_the_digest_depends_on_operator_serial_members_and_keys_alone() -> None:
    site = Site(1, "a", PublicKeys(b"i" * 32, b"n"))
    plain = Roster((site,), 4, "ab" * 32)
    digest = PinnedRoster.of(plain).digest
    others = (
        dataclasses.replace(plain, serial=5),
        dataclasses.replace(plain, operator="cd" * 32),
        dataclasses.replace(plain, sites=(dataclasses.replace(site, client_id=2),)),
        dataclasses.replace(plain, sites=(dataclasses.replace(site, keys=PublicKeys(b"j" * 32, b"n")),)),
        dataclasses.replace(plain, sites=(dataclasses.replace(site, revoked=True),)),
    )
    assert digest not in {PinnedRoster.of(other).digest for other in others}
    renamed = dataclasses.replace(plain, sites=(dataclasses.replace(site, name="b"),))
    assert PinnedRoster.of(renamed).digest == digest


def test_pinned_keys_cannot_be_changed(roster: Path, operator: Ed25519PrivateKey) -> None:
    pinned = pin_roster(roster, hex_of(operator))
    with pytest.raises(TypeError):
        pinned.keys[7] = b"x" * 32  # type: ignore[index]  # that it is read-only is the claim


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(serial=2), "is not signed by the operator that it names; ask for it again"),
        (lambda c: c["sites"][0].update(client_id=8), "is not signed by the operator that it names"),
        (lambda c: c["sites"][0].update(name="nord"), "is not signed by the operator that it names"),
        (lambda c: c["sites"][0].update(revoked=True), "is not signed by the operator that it names"),
        (lambda c: c["sites"][0].update(identity="ab" * 32), "is not signed by the operator that it names"),
        (lambda c: c["sites"].clear(), "is not signed by the operator that it names"),
        (lambda c: c.update(operator="ab" * 32), "is not signed by the operator that it names"),
        (lambda c: c.update(signature="00" * 64), "is not signed by the operator that it names"),
        (lambda c: c.update(signature=c["signature"].upper()), "is not signed by the operator that it names"),
        (lambda c: c.update(signature=5), "is not signed by the operator that it names"),
        (lambda c: c.update(operator=5), "must name its operator by 64 hex digits, got '5'"),
        (lambda c: c.update(operator="AB" * 32), "must name its operator by 64 hex digits"),
        (lambda c: c.update(serial=0), "must have a serial from 1, got 0"),
        (lambda c: c.update(serial=True), "must have a serial from 1, got True"),
        (lambda c: c.update(serial=[]), r"must have a serial from 1, got \[\]"),
        (lambda c: c.pop("signature"), "must have exactly the entries format, version, serial, operator, sites, sig"),
        (lambda c: c.update(version=1), "must have exactly the entries format, version, sites"),
        (lambda c: c.update(version=3), "must be a 'fedveil-roster' file of version 1 or 2, got .* version 3"),
    ],
)
def test_a_signed_roster_that_was_altered_is_not_read(roster: Path, change: Change, message: str) -> None:
    altered(roster, change)
    with pytest.raises(ConfigError, match=f"the roster .*roster.json {message}"):
        read_roster(roster)


def test_a_signed_roster_changes_only_with_its_operators_key(
    roster: Path, keys: Path, stranger: Ed25519PrivateKey
) -> None:
    before, public = roster.read_bytes(), keys / "south" / "site-public.json"
    with pytest.raises(ConfigError, match="is signed; give the operator's key with --operator"):
        enrol(roster, public, name="south", client_id=3)
    with pytest.raises(ConfigError, match="is signed; give the operator's key with --operator"):
        revoke(roster, "north")
    with pytest.raises(ConfigError, match="is signed by the operator .*, not by .*; give its own operator's key"):
        enrol(roster, public, name="south", client_id=3, operator=stranger)
    with pytest.raises(ConfigError, match="is signed by the operator .*, not by .*; give its own operator's key"):
        revoke(roster, "north", operator=stranger)
    assert roster.read_bytes() == before


def test_an_unsigned_roster_still_says_whom_to_admit_and_is_not_enough_for_secure_aggregation(
    tmp_path: Path, keys: Path, operator: Ed25519PrivateKey
) -> None:
    path = tmp_path / "roster.json"
    enrol(path, keys / "north" / "site-public.json", name="north", client_id=7)
    assert json.loads(path.read_text())["version"] == 1
    assert [site.client_id for site in read_roster(path).admitted] == [7]
    with pytest.raises(ConfigError, match="the roster is not signed, .*; the operator runs fedveil keys operator once"):
        pin_roster(path, hex_of(operator))
    assert sign_roster(path, operator) == read_roster(path)
    assert (pin_roster(path, hex_of(operator)).serial, list(pin_roster(path, hex_of(operator)).keys)) == (1, [7])


def test_signing_again_changes_nothing_and_another_operator_takes_over_with_a_higher_serial(
    roster: Path, operator: Ed25519PrivateKey, stranger: Ed25519PrivateKey
) -> None:
    before = roster.read_bytes()
    assert sign_roster(roster, operator).serial == 1
    assert roster.read_bytes() == before
    assert sign_roster(roster, stranger).serial == 2
    with pytest.raises(
        ConfigError, match="is signed by .*, the pinned operator is .*; ask your operator, over another"
    ):
        pin_roster(roster, hex_of(operator))
    assert pin_roster(roster, hex_of(stranger)).operator == hex_of(stranger)


def test_a_member_is_admitted_under_its_own_key_only(roster: Path, keys: Path, operator: Ed25519PrivateKey) -> None:
    enrol(roster, keys / "south" / "site-public.json", name="south", client_id=3, operator=operator)
    revoke(roster, "south", operator=operator)
    pinned = pin_roster(roster, hex_of(operator))
    north, south = identity_of(keys, "north"), identity_of(keys, "south")
    pinned.require_member(7, north)
    with pytest.raises(ConfigError, match="client 3 is revoked on the roster of serial 3; ask the operator why"):
        pinned.require_member(3, south)
    with pytest.raises(ConfigError, match="client 5 is not on the roster of serial 3; ask the operator to enrol it"):
        pinned.require_member(5, north)
    with pytest.raises(ConfigError, match="has another identity key for client 7 than this site's"):
        pinned.require_member(7, south)
