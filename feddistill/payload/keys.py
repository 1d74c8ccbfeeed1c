"""Ed25519 keys: who signs an envelope, and how a server knows.

A private key is a file: PEM, PKCS #8, not encrypted, readable by its owner alone (``openssl pkey -in FILE
-text`` reads it). A public key is 32 bytes, written as 64 hexadecimal digits, as in a round's request.
"""

import os
import re
import stat
from importlib.util import find_spec
from pathlib import Path

from feddistill.errors import ConfigError, DataError

PUBLIC_KEY = re.compile(r"[0-9a-f]{64}")
SIGNATURE = re.compile(r"[0-9a-f]{128}")


class PrivateKey:
    """A private key in memory; it has no representation that shows it."""

    def __init__(self, seed: bytes):
        """``seed``: the 32 bytes of RFC 8032."""
        _need()
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        self._key = Ed25519PrivateKey.from_private_bytes(seed)

    @property
    def public(self) -> str:
        """The public key in hexadecimal."""
        return self._key.public_key().public_bytes_raw().hex()

    def sign(self, message: bytes) -> str:
        """The signature in hexadecimal; deterministic."""
        return self._key.sign(message).hex()

    def to_pem(self) -> bytes:
        """The content of the key file."""
        from cryptography.hazmat.primitives import serialization

        return self._key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )


def make(path: Path) -> PrivateKey:
    """Create a key and write it to a new file.

    Raises:
        DataError: The file exists or cannot be written.
    """
    key = PrivateKey(os.urandom(32))
    write_secret(path, key.to_pem())
    return key


def write_secret(path: Path, content: bytes) -> None:
    """Write a new file that only its owner can read.

    Raises:
        DataError: The file exists or cannot be written.
    """
    try:
        # O_EXCL refuses existing files and links; the mode applies from the first byte on.
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise DataError(f"{path} already exists; a key is never overwritten") from None
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from None
    with os.fdopen(handle, "wb") as file:
        file.write(content)


def load(path: Path) -> PrivateKey:
    """Read a key that ``make`` wrote.

    Raises:
        DataError: The file cannot be read, can be read by others, or holds no such key.
    """
    _need()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = file.read(4096)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if mode & 0o077:
        raise DataError(f"{path} may be read by others (mode {mode:03o}); run chmod 600 {path}")
    try:
        key = load_pem_private_key(content, password=None)
    except (ValueError, TypeError):  # TypeError: it is encrypted
        raise DataError(f"{path} must be an unencrypted private key in PEM") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise DataError(f"{path} must hold an Ed25519 key")
    return PrivateKey(key.private_bytes_raw())


def verify(public: str, signature: str, message: bytes) -> bool:
    """True if ``signature`` is that of exactly this message by ``public``; both in hexadecimal."""
    _need()
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if not PUBLIC_KEY.fullmatch(public) or not SIGNATURE.fullmatch(signature):
        return False
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(bytes.fromhex(signature), message)
    except InvalidSignature:
        return False
    return True


def _need() -> None:
    if find_spec("cryptography") is None:
        raise ConfigError("signatures need the package cryptography: pip install 'feddistill[protocol]'")
