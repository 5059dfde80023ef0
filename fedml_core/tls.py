"""The server's side of TLS: a private certificate authority for one federation, and a certificate for its server.

Clients trust this authority and no other, so a certificate from a public authority cannot stand in for the server.
"""

from __future__ import annotations

import datetime
import ipaddress
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedml_core import private_files
from fedml_core.errors import ConfigError

AUTHORITY_DAYS = 3650
SERVER_DAYS = 730
_LABEL = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")


@dataclass(frozen=True)
class ServerTls:
    """The files that a server needs: its certificate, its key, and the authority that clients trust."""

    certificate: Path
    key: Path
    ca: Path


def new_authority(directory: Path, hosts: Sequence[str]) -> ServerTls:
    """Make an authority and a server certificate for `hosts` (names or IP addresses, as clients will write them).

    `ca.pem` is for every client; `ca-key.pem` signs the next certificate and is best kept off the server.
    Guarantees: keys are P-256 with mode 0600; nothing is overwritten.
    Raises: ConfigError: if a host is not a name or an address, or a file exists or cannot be written.
    """
    names = _alternative_names(hosts)
    private_files.make_folder(directory)
    tls, ca_key_path = _files(directory)
    for path in (tls.ca, ca_key_path, tls.certificate, tls.key):
        if path.exists():
            raise ConfigError(f"{path} exists already and is not overwritten; move it away first")
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca = _authority_certificate(ca_key)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _server_certificate(key, names, ca, ca_key)
    private_files.write_new(ca_key_path, _key_pem(ca_key), private_files.SECRET)
    private_files.write_new(tls.key, _key_pem(key), private_files.SECRET)
    private_files.write_new(tls.ca, _pem(ca), private_files.SHARED)
    private_files.write_new(tls.certificate, _pem(certificate), private_files.SHARED)
    return tls


def renew_certificate(directory: Path, hosts: Sequence[str]) -> ServerTls:
    """Replace the server's key and certificate by new ones of the same authority: clients need no new file.

    Raises: ConfigError: if a host is not a name or an address, or the authority in `directory` is missing or damaged.
    """
    names = _alternative_names(hosts)
    tls, ca_key_path = _files(directory)
    ca, ca_key = _read_certificate(tls.ca), _read_key(ca_key_path)
    if not isinstance(ca_key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{ca_key_path} must hold an elliptic-curve key, got {type(ca_key).__name__}")
    if ca.public_key() != ca_key.public_key():
        raise ConfigError(f"{ca_key_path} is not the key of {tls.ca}; restore the two files together")
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _server_certificate(key, names, ca, ca_key)
    private_files.replace(tls.key, _key_pem(key), private_files.SECRET)
    private_files.replace(tls.certificate, _pem(certificate), private_files.SHARED)
    return tls


def check_server_tls(tls: ServerTls) -> None:
    """Check that the three files belong together and are valid today.

    The certificate's file may hold a chain, the server's own certificate first, as a company's authority gives it.
    Raises: ConfigError: naming the file that is at fault.
    """
    chain, ca = _read_certificates(tls.certificate), _read_certificate(tls.ca)
    if chain[0].public_key() != _read_key(tls.key).public_key():
        raise ConfigError(f"{tls.key} is not the key of {tls.certificate}; restore the two files together")
    try:
        for certificate, issuer in itertools.pairwise((*chain, ca)):
            certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        raise ConfigError(f"{tls.certificate} was not issued by {tls.ca}; clients would refuse it") from None
    now = datetime.datetime.now(datetime.UTC)
    for path, one in ((tls.certificate, chain[0]), (tls.ca, ca)):
        if not one.not_valid_before_utc <= now <= one.not_valid_after_utc:
            until = one.not_valid_after_utc.date().isoformat()
            raise ConfigError(f"{path} is not valid today (it ends on {until}); renew it or set the clock")


def _files(directory: Path) -> tuple[ServerTls, Path]:
    tls = ServerTls(directory / "server.pem", directory / "server-key.pem", directory / "ca.pem")
    return tls, directory / "ca-key.pem"


def _alternative_names(hosts: Sequence[str]) -> x509.SubjectAlternativeName:
    if isinstance(hosts, str) or not hosts:
        raise ConfigError(f"hosts must be a list of at least one name or address, got {hosts!r}")
    names: list[x509.GeneralName] = []
    for host in hosts:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in host.split(".")):
                raise ConfigError(
                    f"a host must be a name or an IP address without port or scheme, got {host!r}"
                ) from None
            names.append(x509.DNSName(host.lower()))
    return x509.SubjectAlternativeName(names)


def _builder(subject: str, issuer: str, days: int) -> x509.CertificateBuilder:
    start = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)  # for clients whose clock is behind
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=days))
    )


def _authority_certificate(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    public = key.public_key()
    return (
        _builder("fedveil authority", "fedveil authority", AUTHORITY_DAYS)
        .public_key(public)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .sign(key, hashes.SHA256())
    )


def _server_certificate(
    key: ec.EllipticCurvePrivateKey,
    names: x509.SubjectAlternativeName,
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
) -> x509.Certificate:
    public = key.public_key()
    return (
        _builder("fedveil server", "fedveil authority", SERVER_DAYS)
        .public_key(public)
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _read_certificate(path: Path) -> x509.Certificate:
    return _read_certificates(path)[0]


def _read_certificates(path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(private_files.read(path, "the certificate"))
    except ValueError:
        raise ConfigError(f"{path} does not hold a certificate in PEM form; is it the right file?") from None


def _read_key(path: Path) -> PrivateKeyTypes:
    try:
        return serialization.load_pem_private_key(private_files.read(path, "the key"), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigError(f"{path} does not hold an unencrypted key in PEM form; is it the right file?") from None


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
