"""An authority and its certificates: what a strict TLS library accepts, and which files belong together."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from fedml_core import tls as tls_module
from fedml_core.errors import ConfigError
from fedml_core.tls import ServerTls, check_server_tls, new_authority, renew_certificate

HOSTS = ["fl.example.org", "127.0.0.1", "::1", "LOCALHOST"]


@pytest.fixture
def made(tmp_path: Path) -> ServerTls:
    return new_authority(tmp_path / "tls", HOSTS)


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_a_strict_verifier_accepts_the_chain_for_the_named_hosts_only(made: ServerTls) -> None:
    builder = PolicyBuilder().store(Store([certificate(made.ca)]))
    builder.build_server_verifier(x509.DNSName("fl.example.org")).verify(certificate(made.certificate), [])
    with pytest.raises(VerificationError):
        builder.build_server_verifier(x509.DNSName("other.example.org")).verify(certificate(made.certificate), [])


def test_the_certificate_names_every_host_and_serves_servers_only(made: ServerTls) -> None:
    extensions = certificate(made.certificate).extensions
    names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fl.example.org", "localhost"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "::1"]
    usage = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]
    limits = certificate(made.ca).extensions.get_extension_for_class(x509.BasicConstraints).value
    assert (limits.ca, limits.path_length) == (True, 0)


def test_keys_are_p256_and_only_the_owner_can_read_them(made: ServerTls) -> None:
    modes = {path.name: path.stat().st_mode & 0o777 for path in made.ca.parent.iterdir()}
    assert modes == {"ca.pem": 0o644, "ca-key.pem": 0o600, "server.pem": 0o644, "server-key.pem": 0o600}
    for name in ("ca-key.pem", "server-key.pem"):
        key = serialization.load_pem_private_key((made.ca.parent / name).read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        assert isinstance(key.curve, ec.SECP256R1)
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(made.certificate, made.key)


@pytest.mark.parametrize("name", ["ca.pem", "ca-key.pem", "server.pem", "server-key.pem"])
def test_nothing_is_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("precious")
    with pytest.raises(ConfigError, match=f"{name} exists already and is not overwritten"):
        new_authority(tmp_path, HOSTS)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "precious")]


@pytest.mark.parametrize(
    "host", ["", "https://x", "x:80", "*.example.org", "a b", "-x", "x.", "x" * 64, "a." * 127 + "b"]
)
def test_a_host_that_is_no_name_is_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="a host must be a name or an IP address without port or scheme, got "):
        new_authority(tmp_path / "tls", [host])
    assert list(tmp_path.iterdir()) == []


def test_at_least_one_host_is_needed(tmp_path: Path) -> None:
    choices: list[list[str] | str] = [[], "127.0.0.1"]
    for hosts in choices:
        with pytest.raises(ConfigError, match="hosts must be a list of at least one name or address"):
            new_authority(tmp_path, hosts)


def test_a_renewed_certificate_is_new_and_of_the_same_authority(made: ServerTls) -> None:
    ca, old, old_key = made.ca.read_bytes(), certificate(made.certificate), made.key.read_bytes()
    assert renew_certificate(made.ca.parent, ["new.example.org"]) == made
    new = certificate(made.certificate)
    assert made.ca.read_bytes() == ca
    assert (new.serial_number != old.serial_number, made.key.read_bytes() != old_key) == (True, True)
    assert made.key.stat().st_mode & 0o777 == 0o600
    check_server_tls(made)


def test_a_certificate_cannot_be_renewed_without_its_authority(made: ServerTls, tmp_path: Path) -> None:
    other = new_authority(tmp_path / "other", HOSTS)
    (made.ca.parent / "ca-key.pem").write_bytes((other.ca.parent / "ca-key.pem").read_bytes())
    with pytest.raises(ConfigError, match="ca-key.pem is not the key of .*ca.pem; restore the two files together"):
        renew_certificate(made.ca.parent, HOSTS)
    (made.ca.parent / "ca-key.pem").unlink()
    with pytest.raises(ConfigError, match="the key .*ca-key.pem cannot be read: No such file"):
        renew_certificate(made.ca.parent, HOSTS)


def test_files_that_do_not_belong_together_are_named(made: ServerTls, tmp_path: Path) -> None:
    other = new_authority(tmp_path / "other", HOSTS)
    check_server_tls(made)
    with pytest.raises(ConfigError, match="server-key.pem is not the key of .*server.pem"):
        check_server_tls(ServerTls(made.certificate, other.key, made.ca))
    with pytest.raises(ConfigError, match="server.pem was not issued by .*other/ca.pem; clients would refuse it"):
        check_server_tls(ServerTls(made.certificate, made.key, other.ca))
    with pytest.raises(ConfigError, match="server.pem does not hold an unencrypted key in PEM form"):
        check_server_tls(ServerTls(made.certificate, made.certificate, made.ca))
    with pytest.raises(ConfigError, match="server-key.pem does not hold a certificate in PEM form"):
        check_server_tls(ServerTls(made.key, made.key, made.ca))


def test_a_chain_is_followed_to_the_authority(made: ServerTls, tmp_path: Path) -> None:
    chain = tmp_path / "chain.pem"
    chain.write_bytes(made.certificate.read_bytes() + made.ca.read_bytes())
    check_server_tls(ServerTls(chain, made.key, made.ca))
    chain.write_bytes(made.certificate.read_bytes() + made.certificate.read_bytes())
    with pytest.raises(ConfigError, match="was not issued by"):
        check_server_tls(ServerTls(chain, made.key, made.ca))


def test_a_certificate_that_is_over_says_when_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls_module, "SERVER_DAYS", 1)  # begins yesterday, so it ends now
    made = new_authority(tmp_path / "tls", HOSTS)
    ended = certificate(made.certificate).not_valid_after_utc
    assert ended <= datetime.datetime.now(datetime.UTC)
    with pytest.raises(ConfigError, match=rf"server.pem is not valid today \(it ends on {ended.date()}\); renew it"):
        check_server_tls(made)
