"""A folder from which a federation is deployed over Flower: certificates, commands, a proxy's configuration.

What stands in it is what ``docs/deployment.md`` tells; the commands of the page are these files.
"""

import csv
import ipaddress
import re
import secrets
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from feddistill.config.data import DataConfig
from feddistill.errors import ConfigError, DataError
from feddistill.payload.keys import write_secret
from feddistill.store.layout import SERVER_CONFIG

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
DAYS = 825
"""Validity of certificates in days: the longest that browsers and clients accept."""
SERVER = ("environment", "superlink.sh", "superexec.sh", "enrol.sh", "train.sh", "nginx.conf", "compose.yaml")
CLIENT = ("environment", "make-key.sh", "supernode.sh", "data.yaml", "compose.yaml", "way.conf")


def write(
    folder: Path, clients: Sequence[str], host: str, *, port: int = 9092, runtime_port: int = 8000
) -> None:
    """Write the folder of a server, one for each client, and the certificates of both.

    Args:
        folder: New or empty.
        clients: Names, as payloads will carry them.
        host: Under which clients reach the server: a domain name or an address.
        port: On which they do: the reverse proxy's. On loopback there is no proxy, and it is not used.
        runtime_port: Of the SuperLink itself, on the server's loopback.

    Raises:
        ConfigError: A name or the host is none, or the folder holds something.
    """
    if not HOST.fullmatch(host) and _address(host) is None:
        raise ConfigError(f"host {host!r} is neither a domain name nor an address")
    for name in clients:
        if not NAME.fullmatch(name):
            raise ConfigError(f"client {name!r}: a name is 1 to 64 letters, digits, '_' and '-'")
    if len(set(clients)) < len(clients) or not clients:
        raise ConfigError("clients must be named, each once")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} already exists; choose another folder")
    loopback, address = _is_loopback(host), _address(host)
    if loopback and isinstance(address, ipaddress.IPv6Address):
        raise ConfigError(f"host {host!r}: on this machine the SuperLink listens at 127.0.0.1: name that")
    facts = {
        "clients": list(clients),
        "host": f"[{host}]" if isinstance(address, ipaddress.IPv6Address) else host,  # as in a URL
        "port": runtime_port if loopback else port,
        "runtime_port": runtime_port,
        "loopback": loopback,
        "named": not loopback and address is None,
    }
    authority, certificate, key = certificates(host)
    server = (folder / SERVER_CONFIG).parent
    for name in SERVER:
        if not (loopback and name == "nginx.conf"):
            _render(f"{server.name}/{name}", server / name, facts)
    (server / "certificates").mkdir()
    (server / "certificates" / "ca.crt").write_bytes(authority)
    (server / "certificates" / "server.crt").write_bytes(certificate)
    write_secret(server / "certificates" / "server.key", key)
    write_secret(server / "superexec.secret", secrets.token_hex(32).encode())
    for place, client in enumerate(clients):
        own = folder / "clients" / client
        for name in CLIENT:
            if name == "way.conf" and not facts["named"]:
                continue
            _render(f"client/{name}", own / name, facts | {"client": client, "place": place})
        (own / "ca.crt").write_bytes(authority)
    _render("README.md", folder / "README.md", facts)


def example(folder: Path, clients: Sequence[str]) -> None:
    """Give each client of ``folder`` embedded texts as its private ones, and the server a run."""
    from feddistill import config as configuration
    from feddistill import data

    facts: dict[str, object] = {"clients": list(clients)}
    _render(SERVER_CONFIG, folder / SERVER_CONFIG, facts)
    settings = configuration.load(folder / SERVER_CONFIG)
    # The server's own parts are carved first; the clients get the rest.
    whole = settings.data.model_dump(mode="json")
    whole |= {"private": {"size": 400 * len(clients)}, "exclude_clients": []}
    whole["partition"] = {"kind": "dirichlet", "clients": len(clients), "alpha": 0.5}
    splits = data.load(DataConfig.model_validate(whole), settings.seed)
    for name, texts in zip(clients, splits.private, strict=True):
        with (folder / "clients" / name / "private.csv").open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(("text", "label"))
            rows.writerows((t, splits.label_names[n]) for t, n in zip(texts.texts, texts.labels, strict=True))


def certificates(host: str) -> tuple[bytes, bytes, bytes]:
    """PEM of a new authority's certificate, and of the server's certificate and key that it has signed.

    The authority's own key is thrown away: it signs this one certificate, and nobody can sign another.
    """
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
    except ImportError:
        raise ConfigError(
            "certificates need the package cryptography: pip install 'feddistill[protocol]'"
        ) from None
    now = datetime.now(UTC) - timedelta(minutes=5)  # clocks differ

    def named(name: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])

    def begun(subject: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(named(subject))
            .issuer_name(named("feddistill federation"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now)
            .not_valid_after(now + timedelta(days=DAYS))
        )

    ca_key, key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    identifier = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
        + ("encipher_only", "decipher_only"),
        False,
    )
    authority = (
        begun("feddistill federation", ca_key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=False, key_cert_sign=True, crl_sign=True, **usage), critical=True
        )
        .add_extension(identifier, critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    hosts = dict.fromkeys((host, "localhost", "127.0.0.1", "::1"))
    names = [
        x509.DNSName(name) if (address := _address(name)) is None else x509.IPAddress(address)
        for name in hosts
    ]
    certificate = (
        begun(host, key)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=True, key_cert_sign=False, crl_sign=False, **usage), critical=True
        )
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False
        )
        .sign(ca_key, hashes.SHA384())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return authority.public_bytes(pem), certificate.public_bytes(pem), private


def _render(template: str, path: Path, facts: dict[str, object]) -> None:
    text = (
        files("feddistill.engines.flower.deployment")
        .joinpath("templates", f"{template}.j2")
        .read_text(encoding="utf-8")
    )
    made = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    made.filters["quoted"] = shlex.quote
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(made.from_string(text).render(facts), encoding="utf-8")
        if path.suffix == ".sh":
            path.chmod(0o755)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from None


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _is_loopback(host: str) -> bool:
    address = _address(host)
    return host == "localhost" or (address is not None and address.is_loopback)
