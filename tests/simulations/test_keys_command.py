"""`fedveil keys`: a site makes keys, an operator admits and revokes it, and no secret is ever shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedml_core.identity import pin_roster, read_roster
from fedml_core.tls import ServerTls, check_server_tls
from tests.simulations.project_cases import fedveil, last_json


def enrolled(folder: Path, name: str = "ward-a", client_id: str = "3") -> Path:
    """Make a site's keys, enrol it and return the roster."""
    assert fedveil("keys", "new", folder / name).exit_code == 0
    roster = folder / "roster.json"
    public = folder / name / "site-public.json"
    made = fedveil("keys", "enrol", public, "--name", name, "--id", client_id, "--roster", roster)
    assert made.exit_code == 0, made.output
    return roster


def test_a_site_and_its_operator_read_the_same_fingerprint(tmp_path: Path) -> None:
    made = last_json(fedveil("keys", "new", tmp_path / "site", "--json"))
    assert made["keys"] == str(tmp_path / "site" / "site-keys.json")
    roster = tmp_path / "roster.json"
    options = ("--name", "ward-a", "--id", "3", "--roster", roster, "--json")
    admitted = last_json(fedveil("keys", "enrol", made["public"], *options))
    assert admitted == {
        "roster": str(roster),
        "serial": None,
        "operator": None,
        "id": 3,
        "name": "ward-a",
        "revoked": False,
        "fingerprint": made["fingerprint"],
    }
    assert [site.client_id for site in read_roster(roster).admitted] == [3]


def test_an_operator_signs_every_change_and_the_list_says_so(tmp_path: Path) -> None:
    made = last_json(fedveil("keys", "operator", tmp_path / "op", "--json"))
    assert Path(made["public"]).read_text().strip() == made["operator"]
    roster = enrolled(tmp_path)
    signer = ("--roster", roster, "--operator", tmp_path / "op")
    assert last_json(fedveil("keys", "sign", *signer, "--json")) == {
        "roster": str(roster),
        "serial": 1,
        "operator": made["operator"],
    }
    assert fedveil("keys", "new", tmp_path / "b").exit_code == 0
    added = fedveil("keys", "enrol", tmp_path / "b" / "site-public.json", "--name", "b", "--id", "4", *signer)
    assert "signed       change 2; send it to every site" in added.stdout
    removed = last_json(fedveil("keys", "revoke", "b", *signer, "--json"))
    assert (removed["serial"], removed["operator"], removed["revoked"]) == (3, made["operator"], True)
    listed = fedveil("keys", "list", "--roster", roster)
    assert listed.stdout.splitlines()[-1] == f"change 3, signed by the operator {made['operator']}"
    assert pin_roster(roster, made["operator"]).serial == 3
    unsigned = fedveil("keys", "revoke", "ward-a", "--roster", roster)
    assert unsigned.exit_code == 2
    assert "is signed; give the operator's key with --operator" in unsigned.stderr


def test_no_secret_is_shown(tmp_path: Path) -> None:
    shown = fedveil("keys", "new", tmp_path / "site").output
    shown += fedveil("keys", "server", tmp_path / "tls", "--host", "localhost").output
    secrets = json.loads((tmp_path / "site" / "site-keys.json").read_text())
    shown += fedveil("keys", "operator", tmp_path / "op").output
    operator = json.loads((tmp_path / "op" / "operator-key.json").read_text())["operator"]
    for text in (operator, secrets["identity"], secrets["node"], (tmp_path / "tls" / "server-key.pem").read_text()):
        assert not [line for line in text.splitlines() if line in shown]


def test_a_revoked_site_is_listed_but_not_admitted(tmp_path: Path) -> None:
    roster = enrolled(tmp_path)
    enrolled(tmp_path, "ward-b", "4")
    assert last_json(fedveil("keys", "revoke", "ward-a", "--roster", roster, "--json"))["revoked"] is True
    assert [site.name for site in read_roster(roster).admitted] == ["ward-b"]
    listed = fedveil("keys", "list", "--roster", roster)
    assert [line.split()[:2] for line in listed.stdout.splitlines()] == [["3", "revoked"], ["4", "admitted"]]
    sites = last_json(fedveil("keys", "list", "--roster", roster, "--json"))["sites"]
    assert [(site["name"], site["revoked"]) for site in sites] == [("ward-a", True), ("ward-b", False)]


def test_a_servers_certificate_is_made_and_renewed(tmp_path: Path) -> None:
    made = last_json(fedveil("keys", "server", tmp_path, "--host", "localhost", "--host", "127.0.0.1", "--json"))
    tls = ServerTls(Path(made["certificate"]), Path(made["key"]), Path(made["authority"]))
    check_server_tls(tls)
    old, authority = tls.certificate.read_bytes(), tls.ca.read_bytes()
    renewed = fedveil("keys", "renew", tmp_path, "--host", "localhost")
    assert renewed.exit_code == 0, renewed.output
    check_server_tls(tls)
    assert tls.certificate.read_bytes() != old
    assert tls.ca.read_bytes() == authority


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["new", "SITE"], "exists already and is not overwritten"),
        (["enrol", "SITE/site-public.json", "--name", "b", "--id", "4", "--roster", "ROSTER"], "twice"),
        (["enrol", "nix.json", "--name", "b", "--id", "4", "--roster", "ROSTER"], "nix.json cannot be read"),
        (["revoke", "nobody", "--roster", "ROSTER"], "admits no site 'nobody'; admitted are: ward-a"),
        (["list", "--roster", "nix.json"], "nix.json cannot be read"),
        (["operator", "OP"], "exists already and is not overwritten"),
        (["sign", "--roster", "ROSTER", "--operator", "SITE"], "cannot be read"),
        (["sign", "--roster", "nix.json", "--operator", "OP"], "nix.json cannot be read"),
        (["server", "TLS", "--host", "https://a"], "a host must be a name or an IP address"),
        (["renew", "SITE", "--host", "localhost"], "cannot be read"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, arguments: list[str], said: str) -> None:
    roster = enrolled(tmp_path)
    assert fedveil("keys", "operator", tmp_path / "op").exit_code == 0
    places = {
        "OP": str(tmp_path / "op"),
        "SITE": str(tmp_path / "ward-a"),
        "ROSTER": str(roster),
        "TLS": str(tmp_path / "tls"),
    }
    for word, place in places.items():
        arguments = [argument.replace(word, place) for argument in arguments]
    result = fedveil("keys", *arguments)
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1
    assert said in result.stderr
