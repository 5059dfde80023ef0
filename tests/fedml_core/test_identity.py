"""Keys, their public half and the roster: secrets stay secret, and nobody is enrolled twice or by a damaged file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedml_core.errors import ConfigError
from fedml_core.identity import (
    PublicKeys,
    Roster,
    enrol,
    new_site_keys,
    public_half,
    read_public_keys,
    read_roster,
    read_site_keys,
    revoke,
    write_public_keys,
)

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp(name) for name in ("north", "south")}
    for folder in made.values():
        new_site_keys(folder)
    return made


@pytest.fixture
def roster(tmp_path: Path, sites: dict[str, Path]) -> Path:
    path = tmp_path / "roster.json"
    enrol(path, sites["north"] / "site-public.json", name="north", client_id=0)
    return path


def altered(source: Path, target: Path, change: Change) -> Path:
    content = json.loads(source.read_text())
    change(content)
    target.write_text(json.dumps(content))
    target.chmod(0o600)
    return target


def pem_of(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()


def test_new_keys_are_an_ed25519_and_a_p384_key_that_only_the_owner_can_read(tmp_path: Path) -> None:
    public = new_site_keys(tmp_path / "deep" / "keys")
    keys = read_site_keys(tmp_path / "deep" / "keys")
    assert isinstance(keys.identity, Ed25519PrivateKey)
    assert isinstance(keys.node.curve, ec.SECP384R1)
    assert public_half(keys) == public == read_public_keys(tmp_path / "deep" / "keys" / "site-public.json")
    assert {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "deep" / "keys").iterdir()} == {
        "site-keys.json": 0o600,
        "site-public.json": 0o644,
    }
    assert (tmp_path / "deep" / "keys").stat().st_mode & 0o777 == 0o700


def test_keys_are_never_overwritten(tmp_path: Path, sites: dict[str, Path]) -> None:
    for existing in ("site-keys.json", "site-public.json"):
        folder = tmp_path / existing
        folder.mkdir()
        (folder / existing).write_text("precious")
        with pytest.raises(ConfigError, match=f"{existing} exists already and is not overwritten; move it away first"):
            new_site_keys(folder)
        assert [path.name for path in folder.iterdir()] == [existing]
        assert (folder / existing).read_text() == "precious"
    with pytest.raises(ConfigError, match="exists already"):
        write_public_keys(read_site_keys(sites["north"]), sites["north"] / "site-public.json")


def test_secrets_are_in_neither_the_public_file_nor_a_repr(sites: dict[str, Path]) -> None:
    keys = read_site_keys(sites["north"] / "site-keys.json")
    secret = keys.identity.private_bytes_raw().hex()
    assert secret not in repr(keys)
    public = (sites["north"] / "site-public.json").read_text()
    assert secret not in public
    assert "PRIVATE" not in public


def test_keys_that_others_can_read_are_refused(tmp_path: Path, sites: dict[str, Path]) -> None:
    copy = altered(sites["north"] / "site-keys.json", tmp_path / "keys.json", lambda content: None)
    copy.chmod(0o640)
    with pytest.raises(ConfigError, match=r"keys.json can be read by others \(mode 0640\); run chmod 600 on it"):
        read_site_keys(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=2), "must be a 'fedveil-site-keys' file of version 1, got .* version 2"),
        (lambda c: c.update(format="x"), "must be a 'fedveil-site-keys' file"),
        (lambda c: c.update(extra=1), "must have exactly the entries format, version, identity, node"),
        (lambda c: c.pop("node"), "must have exactly the entries"),
        (lambda c: c.update(node="rubbish"), "does not hold readable keys"),
        (lambda c: c.update(node=5), "does not hold readable keys"),
        (lambda c: c.update(identity=c["node"]), "must hold an Ed25519 and a P-384 key"),
        (lambda c: c.update(node=pem_of(ec.generate_private_key(ec.SECP256R1()))), "must hold an Ed25519 and a P-384"),
    ],
)
def test_damaged_keys_are_refused_by_name(tmp_path: Path, sites: dict[str, Path], change: Change, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_site_keys(altered(sites["north"] / "site-keys.json", tmp_path / "keys.json", change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(node_proof=c["identity_proof"]), "is not signed by its own keys"),
        (lambda c: c.update(identity_proof="00" * 64), "is not signed by its own keys"),
        (lambda c: c.update(identity_proof="zz"), "is not signed by its own keys"),
        (lambda c: c.update(identity_proof=None), "is not signed by its own keys"),
        (lambda c: c.update(identity="00"), "does not hold readable public keys"),
        (lambda c: c.update(identity=7), "does not hold readable public keys"),
        (lambda c: c.update(node=c["node"][:40]), "does not hold readable public keys"),
        (lambda c: c.pop("node_proof"), "must have exactly the entries"),
    ],
)
def test_a_public_file_that_was_altered_is_refused(
    tmp_path: Path, sites: dict[str, Path], change: Change, message: str
) -> None:
    changed = altered(sites["north"] / "site-public.json", tmp_path / "public.json", change)
    with pytest.raises(ConfigError, match=message):
        read_public_keys(changed)
    with pytest.raises(ConfigError, match=message):
        enrol(tmp_path / "roster.json", changed, name="north", client_id=0)
    assert not (tmp_path / "roster.json").exists()


@pytest.mark.parametrize("entry", ["identity", "node"])
def test_a_public_file_with_one_key_of_another_site_is_refused(
    tmp_path: Path, sites: dict[str, Path], entry: str
) -> None:
    other = json.loads((sites["south"] / "site-public.json").read_text())
    changed = altered(
        sites["north"] / "site-public.json",
        tmp_path / "public.json",
        lambda content: content.update({entry: other[entry], f"{entry}_proof": other[f"{entry}_proof"]}),
    )
    with pytest.raises(ConfigError, match="is not signed by its own keys; ask the site to send it again"):
        read_public_keys(changed)


def test_fingerprints_can_be_read_out_and_depend_on_both_keys() -> None:
    one = PublicKeys(b"i" * 32, b"n")
    assert one.fingerprint == PublicKeys(b"i" * 32, b"n").fingerprint
    assert one.fingerprint not in (PublicKeys(b"j" * 32, b"n").fingerprint, PublicKeys(b"i" * 32, b"m").fingerprint)
    assert [len(group) for group in one.fingerprint.split(" ")] == [4] * 8


def test_enrolled_sites_are_on_the_roster_in_order(roster: Path, sites: dict[str, Path]) -> None:
    south = enrol(roster, sites["south"] / "site-public.json", name="south-2.b_c", client_id=2**31 - 1)
    assert south.keys == public_half(read_site_keys(sites["south"]))
    assert [(site.client_id, site.name) for site in read_roster(roster).sites] == [
        (0, "north"),
        (2**31 - 1, south.name),
    ]
    assert read_roster(roster).by_node_key()[south.keys.node] == south


@pytest.mark.parametrize(
    ("name", "client_id", "site", "message"),
    [
        ("other", 0, "south", "has the client id 0 twice; 'north' holds it already"),
        ("north", 1, "south", "has the name 'north' twice; 'north' holds it already"),
        ("other", 1, "north", "has the identity key twice; 'north' holds it already"),
        ("no spaces", 1, "south", "needs a name of 1 to 64 letters, digits, '.', '_', '-', got 'no spaces'"),
        ("", 1, "south", "needs a name of 1 to 64 letters"),
        ("x" * 65, 1, "south", "needs a name of 1 to 64 letters"),
        ("other", -1, "south", "needs a client id between 0 and 2147483647, got -1"),
        ("other", True, "south", "needs a whole number as client id, got True"),
        ("other", 1.5, "south", "needs a whole number as client id, got 1.5"),
    ],
)
def test_a_site_that_cannot_be_enrolled_leaves_the_roster_as_it_was(
    roster: Path, sites: dict[str, Path], name: str, client_id: int, site: str, message: str
) -> None:
    before = roster.read_bytes()
    with pytest.raises(ConfigError, match=message):
        enrol(roster, sites[site] / "site-public.json", name=name, client_id=client_id)
    assert roster.read_bytes() == before


def test_a_revoked_site_is_not_admitted_and_its_keys_stay_taken(roster: Path, sites: dict[str, Path]) -> None:
    assert revoke(roster, "north").revoked
    after = read_roster(roster)
    assert (after.admitted, after.by_node_key(), len(after.sites)) == ((), {}, 1)
    with pytest.raises(ConfigError, match="has the identity key twice; 'north' holds it already"):
        enrol(roster, sites["north"] / "site-public.json", name="again", client_id=1)
    with pytest.raises(ConfigError, match="admits no site 'north'; admitted are: none"):
        revoke(roster, "north")


def test_revoking_an_unknown_site_names_the_known_ones(roster: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="admits no site 'nort'; admitted are: north"):
        revoke(roster, "nort")
    with pytest.raises(ConfigError, match="the roster .*none.json cannot be read: No such file"):
        revoke(tmp_path / "none.json", "north")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version="1"), "must be a 'fedveil-roster' file of version 1"),
        (lambda c: c.update(sites={}), "must hold a list of sites, got dict"),
        (lambda c: c["sites"].append(5), "site 1 of the roster .* must have exactly the entries client_id, identity"),
        (lambda c: c["sites"][0].update(x=1), "site 0 of the roster .* must have exactly the entries"),
        (lambda c: c["sites"][0].update(revoked="no"), "must say true or false for 'revoked', got 'no'"),
        (lambda c: c["sites"][0].update(name=7), "needs a name of 1 to 64 letters"),
        (lambda c: c["sites"][0].update(client_id="0"), "needs a whole number as client id, got '0'"),
        (lambda c: c["sites"][0].update(node="x"), "site 0 of the roster .* does not hold readable public keys"),
        (lambda c: c["sites"].append(c["sites"][0]), "has the client id 0 twice"),
    ],
)
def test_a_damaged_roster_is_refused_by_name(roster: Path, change: Change, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_roster(altered(roster, roster, change))


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"[" * 5000, b"not json"])
def test_a_file_that_is_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "roster.json").write_bytes(content)
    with pytest.raises(ConfigError, match="the roster .*roster.json (is not JSON|must hold a JSON object)"):
        read_roster(tmp_path / "roster.json")


def test_an_empty_roster_admits_nobody() -> None:
    assert (Roster().admitted, Roster().by_node_key()) == ((), {})
