"""Signatures of receipts and of the head of their chain: Ed25519 (RFC 8032), by the package `cryptography`.

A JSON object that can be signed has a field `signature`: {"key": FINGERPRINT, "value": HEX}, or null while it is not
signed. The signature is over the canonical JSON of all other fields. Keys are PEM files without a password.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any

from lmeraser_jax.errors import UserError
from lmeraser_jax.hashing import canonical_json
from lmeraser_jax.storage.atomic_files import sync_folder

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

PublicKeys = Mapping[str, "Ed25519PublicKey"]  # {fingerprint: key}
NO_KEYS: PublicKeys = MappingProxyType({})
LARGEST = 100_000  # bytes of a key file
OTHERS = 0o037  # permission bits that a private key may not have; a group may read it, as secrets of Kubernetes are
SHOWN = 16  # digits of a fingerprint in a message
UNSIGNED = "is not signed; the next command on its workdir with --signing_key=FILE signs it there"


def sign(values: Mapping[str, Any], key: "Ed25519PrivateKey") -> dict[str, Any]:
    """The values with the key's signature; equal values have equal signatures."""
    value = key.sign(_signed_bytes(values)).hex()
    return {**values, "signature": {"key": fingerprint(key.public_key()), "value": value}}


def problems(values: Mapping[str, Any], keys: PublicKeys) -> list[str]:
    """Why none of these keys has signed an object that fits its schema. Without keys there is nothing to check."""
    signature = values["signature"]
    if not keys:
        return []
    if signature is None:
        return [UNSIGNED]
    (_, _, exceptions), name = _cryptography(), signature["key"][:SHOWN]
    if signature["key"] not in keys:
        return [f"is signed with the key {name}, not with one of those given: {', '.join(key[:SHOWN] for key in keys)}"]
    try:
        keys[signature["key"]].verify(bytes.fromhex(signature["value"]), _signed_bytes(values))
    except exceptions.InvalidSignature:
        return [f"was edited after it was signed, or was not signed with the key {name} that it names"]
    return []


def description(values: Mapping[str, Any], keys: PublicKeys) -> str:
    """Whose signature an object has, and whether it was checked."""
    if values["signature"] is None:
        return "not signed"
    return f"signed with the key {values['signature']['key'][:SHOWN]}{'' if keys else ', which was not checked'}"


def fingerprint(key: "Ed25519PublicKey") -> str:
    """SHA-256 of a public key in DER (SubjectPublicKeyInfo), as 64 hex digits."""
    serialization, _, _ = _cryptography()
    form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(*form)).hexdigest()


def _signed_bytes(values: Mapping[str, Any]) -> bytes:
    return canonical_json({name: value for name, value in values.items() if name != "signature"}).encode()


def make_keys(path: Path) -> tuple[Path, str]:
    """Writes a new private key to a file, and its public key to FILE.pub; returns that file and the fingerprint.

    Raises `UserError` where one of the files is there, as nothing is overwritten, or cannot be written.
    """
    serialization, ed25519, _ = _cryptography()
    key, pem, public_path = ed25519.Ed25519PrivateKey.generate(), serialization.Encoding.PEM, Path(f"{path}.pub")
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    if existing := [str(file) for file in (path, public_path) if os.path.lexists(file)]:
        raise UserError(
            f"--out={path}: {' and '.join(existing)} must not exist: no key is overwritten; name a new file"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for file, content, mode in ((path, private, 0o600), (public_path, public, 0o644)):
            with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
                stream.write(content)
                os.fsync(stream.fileno())
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"--out={path} cannot be written: {error.strerror}") from error
    return public_path, fingerprint(key.public_key())


def load_signing_key(path: str | Path) -> "Ed25519PrivateKey | None":
    """Reads the private key of --signing_key; None where the path is "".

    Raises:
        UserError: no private Ed25519 key in PEM, one with a password, or a file that others may open.
    """
    return _load(f"--signing_key={path}", path, "private") if path else None


def load_public_keys(paths: Iterable[str | Path]) -> PublicKeys:
    """Reads the public keys of --public_key. Raises `UserError` for a file that is no public Ed25519 key in PEM."""
    keys = [_load(f"--public_key={path}", path, "public") for path in paths]
    return {fingerprint(key): key for key in keys}


def _load(flag: str, path: str | Path, half: str) -> Any:
    """Reads the private or the public half of a key; `flag` is for messages."""
    serialization, ed25519, exceptions = _cryptography()
    try:
        with open(path, "rb") as file:
            raw, mode = file.read(LARGEST), os.fstat(file.fileno()).st_mode & 0o777
    except OSError as error:
        raise UserError(f"{flag} cannot be read: {error.strerror}") from error
    other = "public" if half == "private" else "private"
    if f"{other} key".upper().encode() in raw:
        raise UserError(f"{flag} is a {other} key; must be the {half} one (lmeraser keys writes FILE and FILE.pub)")
    if half == "private" and mode & OTHERS:
        raise UserError(f"{flag} may be opened by other users (mode {mode:04o}); close it with chmod 600")
    load = serialization.load_pem_private_key if half == "private" else serialization.load_pem_public_key
    try:
        key = load(raw, None)
    except (ValueError, TypeError, exceptions.UnsupportedAlgorithm) as error:  # TypeError: it has a password
        raise UserError(f"{flag} is no {half} key in PEM without a password; lmeraser keys makes one") from error
    if not isinstance(key, ed25519.Ed25519PrivateKey | ed25519.Ed25519PublicKey):
        raise UserError(f"{flag} is a key of another kind; must be Ed25519 (lmeraser keys makes one)")
    return key


def _cryptography() -> tuple[ModuleType, ModuleType, ModuleType]:
    """Its modules serialization, ed25519 and exceptions. Raises `UserError` where the package is not installed."""
    try:
        from cryptography import exceptions
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ModuleNotFoundError as error:
        remedy = "python -m pip install 'lmeraser_jax[serve]'"
        raise UserError(f"signatures need the package cryptography: {remedy}") from error
    return serialization, ed25519, exceptions
