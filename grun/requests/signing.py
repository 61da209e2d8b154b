"""Signatures of a store's head: ed25519, by the package `cryptography`."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grun.errors import ConfigError
from grun.method.stack.manifest import Signature

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


def read_key(path: str | Path) -> Ed25519PrivateKey:
    """Private key of a PEM file that none but its owner may read; ConfigError says what is wrong with it."""
    key: Ed25519PrivateKey = _read("key", Path(path).expanduser(), "private", password=None)
    return key


def public_key_of(path: str | Path) -> str:
    """Public key of a PEM file, hex; ConfigError says what is wrong with it."""
    return str(_read("public_key", Path(path).expanduser(), "public").public_bytes_raw().hex())


def sign(head: str | None, key: Ed25519PrivateKey) -> Signature:
    """Signature of a head."""
    return Signature(key.public_key().public_bytes_raw().hex(), key.sign(_message(head)).hex())


def signature_problem(signature: Signature | None, head: str | None, public_key: str) -> str | None:
    """What is wrong with a signature; None: whoever has the key that belongs to `public_key` signed this head."""
    (kind,) = _cryptography("Ed25519PublicKey")
    if signature is None:
        return "the head is not signed"
    if signature.public_key != public_key:
        return f"the head is signed with another key ({signature.public_key[:16]}..., not {public_key[:16]}...)"
    try:
        kind.from_public_bytes(bytes.fromhex(public_key)).verify(bytes.fromhex(signature.signature), _message(head))
    except Exception:  # InvalidSignature, and ValueError of what is no hex
        return "the signature is not one of this head"
    return None


MAKING = (
    "make one: openssl genpkey -algorithm ed25519 -out key.pem; chmod 600 key.pem; "
    "openssl pkey -in key.pem -pubout -out public.pem"
)


def _message(head: str | None) -> bytes:
    return f"grun requests {head}".encode()


def _read(option: str, path: Path, kind: str, **password: None) -> Any:
    """The private or public key that an option names."""
    from_pem, of_kind = _cryptography(f"load_pem_{kind}_key", f"Ed25519{kind.capitalize()}Key")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{option}={path} cannot be read ({error.strerror}); {MAKING}") from error
    if kind == "private" and os.name == "posix" and stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise ConfigError(f"key={path}: others may read it; `chmod 600 {path}`, and make a new one if they have")
    try:
        key = from_pem(data, **password)
    except (ValueError, TypeError) as error:  # TypeError: it asks for a password
        without = " without a password" if kind == "private" else ""
        raise ConfigError(f"{option}={path} is no {kind} key in PEM{without}; {MAKING}") from error
    if not isinstance(key, of_kind):
        raise ConfigError(f"{option}={path} is no ed25519 key; {MAKING}")
    return key


def _cryptography(*names: str) -> list[Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise ConfigError(
            "signing needs the package cryptography, which is not installed: pip install 'grun-unlearning[signing]'"
        ) from error
    return [getattr(ed25519, name, None) or getattr(serialization, name) for name in names]
