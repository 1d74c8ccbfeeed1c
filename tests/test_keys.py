"""Keys: made once, for their owner alone, and understood by others."""

import os
import subprocess
import sys
from shutil import which

import pytest
from click.testing import CliRunner

from feddistill.cli.keys import keys as command
from feddistill.errors import ConfigError, DataError
from feddistill.payload import keys

# RFC 8032, section 7.1, test 1
SEED = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
PUBLIC = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
SIGNATURE = (
    "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
    "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
)


def run(*arguments):
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def test_signatures_are_those_of_the_standard():
    key = keys.PrivateKey(SEED)
    assert key.public == PUBLIC
    assert key.sign(b"") == SIGNATURE
    assert keys.verify(PUBLIC, SIGNATURE, b"")


@pytest.mark.parametrize(
    ("public", "signature", "message"),
    [
        (PUBLIC, SIGNATURE, b"x"),
        (PUBLIC, SIGNATURE[:-1] + "0", b""),
        (PUBLIC, SIGNATURE.upper(), b""),
        (PUBLIC, "", b""),
        ("00" * 32, SIGNATURE, b""),
        ("ff" * 32, SIGNATURE, b""),
        ("", SIGNATURE, b""),
    ],
)
def test_anything_else_is_no_signature(public, signature, message):
    assert not keys.verify(public, signature, message)


def test_a_key_is_made_shown_and_never_overwritten(tmp_path):
    file = tmp_path / "north.pem"
    made, shown = run("make", file), run("show", file)
    assert made.exit_code == shown.exit_code == 0, made.exception
    assert made.output == shown.output == keys.load(file).public + "\n"
    assert file.stat().st_mode & 0o777 == 0o600
    before = file.read_bytes()
    assert isinstance(run("make", file).exception, DataError)
    assert file.read_bytes() == before
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="already exists"):
        keys.make(tmp_path / "link")


@pytest.mark.skipif(which("openssl") is None, reason="needs openssl")
def test_the_file_is_what_openssl_makes_and_reads(tmp_path):
    ours, theirs = tmp_path / "ours.pem", tmp_path / "theirs.pem"
    keys.make(ours)
    asked = ["openssl", "pkey", "-in", ours, "-pubout", "-outform", "DER"]
    found = subprocess.run(asked, capture_output=True, check=True).stdout
    assert found[-32:].hex() == keys.load(ours).public
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", theirs], check=True)
    theirs.chmod(0o600)
    assert len(keys.load(theirs).public) == 64


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [
        (None, 0o600, "cannot read"),
        (b"", 0o600, "must be an unencrypted private key in PEM"),
        (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", 0o600, "must be an unencrypted"),
        (keys.PrivateKey(SEED).to_pem(), 0o644, "may be read by others .mode 644.; run chmod 600"),
    ],
)
def test_a_file_that_is_no_key_is_refused(content, mode, message, tmp_path):
    file = tmp_path / "key.pem"
    if content is not None:
        file.write_bytes(content)
        os.chmod(file, mode)
    with pytest.raises(DataError, match=message):
        keys.load(file)


def test_other_kinds_of_keys_are_refused(tmp_path):
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    pem = X25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file = tmp_path / "key.pem"
    file.write_bytes(pem)
    file.chmod(0o600)
    with pytest.raises(DataError, match="must hold an Ed25519 key"):
        keys.load(file)


def test_nowhere_to_write_is_said(tmp_path):
    with pytest.raises(DataError, match="cannot write"):
        keys.make(tmp_path / "absent" / "key.pem")


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(keys, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'feddistill\[protocol\]'"):
        keys.PrivateKey(SEED)


def test_importing_keys_needs_no_library():
    script = (
        "import feddistill.payload, sys; print({'cryptography', 'zstandard', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
