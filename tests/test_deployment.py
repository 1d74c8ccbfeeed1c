"""The folder that ``feddistill deploy init`` writes: who can read what, and whom its certificates name."""

import ipaddress
import ssl
import stat
import subprocess

import pytest
import yaml

pytest.importorskip("cryptography", reason="pip install 'feddistill[flower]'")

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from feddistill.engines.flower import deployment
from feddistill.errors import ConfigError

HOSTS = {
    "link.example.org": False,
    "10.1.2.3": False,
    "2001:db8::7": False,
    "127.0.0.1": True,
    "localhost": True,
}


@pytest.fixture(params=HOSTS)
def written(request, tmp_path):
    deployment.write(tmp_path / "federation", ("north", "south"), request.param)
    return tmp_path / "federation", request.param


def test_certificates_name_the_host_and_are_signed_by_the_authority(written):
    folder, host = written
    ca = x509.load_pem_x509_certificate((folder / "server/certificates/ca.crt").read_bytes())
    own = x509.load_pem_x509_certificate((folder / "server/certificates/server.crt").read_bytes())
    own.verify_directly_issued_by(ca)
    names = own.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    dns, addresses = (names.get_values_for_type(kind) for kind in (x509.DNSName, x509.IPAddress))
    assert host in dns or ipaddress.ip_address(host) in addresses
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(
        folder / "server/certificates/server.crt", folder / "server/certificates/server.key"
    )
    for client in ("north", "south"):
        assert (folder / "clients" / client / "ca.crt").read_bytes() == ca.public_bytes(Encoding.PEM)


def test_secrets_are_their_owners_alone_and_no_client_has_the_servers(written):
    folder, _ = written
    secrets = [folder / "server/certificates/server.key", folder / "server/superexec.secret"]
    for path in secrets:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    names = {path.name for path in (folder / "clients").rglob("*")}
    assert names.isdisjoint({"server.key", "superexec.secret", "node.key"})
    text = "".join(path.read_text() for path in (folder / "clients").rglob("*") if path.is_file())
    assert "PRIVATE KEY" not in text


def test_every_script_is_a_shell_script_and_every_yaml_is_yaml(written):
    folder, _ = written
    scripts = sorted(folder.rglob("*.sh"))
    assert len(scripts) == 4 + 2 * 2
    for path in scripts:
        assert path.stat().st_mode & stat.S_IXUSR
        subprocess.run(["sh", "-n", path], check=True)
    for path in folder.rglob("*.yaml"):
        assert yaml.safe_load(path.read_text())


def test_only_the_fleet_is_open_to_the_network(written):
    folder, host = written
    assert "--host 127.0.0.1" in (folder / "server/superlink.sh").read_text()
    proxy = folder / "server/nginx.conf"
    assert proxy.exists() is not HOSTS[host]
    if proxy.exists():
        assert proxy.read_text().count("proxy_pass") == 1
        assert "location /v1/fleet/ {" in proxy.read_text()
        reached = f"[{host}]" if ":" in host else host
        assert f"--superlink {reached}:9092 " in (folder / "clients/north/supernode.sh").read_text()
    else:
        assert f"--superlink {host}:8000" in (folder / "clients/north/supernode.sh").read_text()


def test_a_clients_container_reaches_the_server_alone(written):
    folder, host = written
    own = folder / "clients/north"
    made = yaml.safe_load((own / "compose.yaml").read_text())
    supernode = made["services"]["supernode"]
    if HOSTS[host]:
        assert supernode["network_mode"] == "host"
    elif host == "link.example.org":
        assert supernode["networks"] == ["inside"]
        assert made["networks"]["inside"]["internal"] is True
        address = made["services"]["way"]["networks"]["inside"]["ipv4_address"]
        assert supernode["extra_hosts"] == [f"{host}:{address}"]
        assert (own / "way.conf").read_text().count("proxy_pass") == 1
        assert f"proxy_pass {host}:9092;" in (own / "way.conf").read_text()
    else:  # an address cannot be given another one
        assert list(made["services"]) == ["supernode"]
        assert not (own / "way.conf").exists()
        assert "firewall" in (own / "compose.yaml").read_text()


@pytest.mark.parametrize(
    ("clients", "host", "message"),
    [
        (("a b",), "link.example.org", "client 'a b': a name is"),
        (("north", "north"), "link.example.org", "each once"),
        ((), "link.example.org", "must be named"),
        (("north",), "https://x", "host 'https://x' is neither"),
        (("north",), "::1", "listens at 127.0.0.1: name that"),
        (("north",), "x; rm -rf /", "is neither a domain name nor an address"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(clients, host, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        deployment.write(tmp_path / "federation", clients, host)
    assert not (tmp_path / "federation").exists()


def test_a_folder_in_the_way_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="already exists"):
        deployment.write(tmp_path, ("north",), "127.0.0.1")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
