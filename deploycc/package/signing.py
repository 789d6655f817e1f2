"""Ed25519 keys and signatures (RFC 8032), made with `cryptography`; `runtime/seal.py` verifies them without it.

A private key is PKCS#8 PEM in a file that only its owner can read, and is never overwritten; the same key and manifest give the same
signature.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from deploycc.errors import MissingDependency, StoreError, UsageError
from deploycc.runtime.seal import MANIFEST, SIGNATURE, fingerprint

OTHERS = 0o077  # what group and others may do
KEYGEN = "deploycc keygen NAME makes a pair of keys"


def make_keys(name: Path) -> tuple[Path, Path, str]:
    """Write NAME.pem (private, mode 600) and NAME.pub.pem; returns both and the fingerprint.

    Raises:
        MissingDependency: `cryptography` is not installed.
        StoreError: one of the files exists, or they cannot be written.
    """
    ed25519, serialization = _cryptography()
    private, public = name.with_name(f"{name.name}.pem"), name.with_name(f"{name.name}.pub.pem")
    if there := [path for path in (private, public) if path.exists() or path.is_symlink()]:
        raise StoreError(f"{there[0]} exists, and a key is never overwritten", fix="give another NAME, or move the old key away")
    key = ed25519.Ed25519PrivateKey.generate()
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    try:
        _write_new(private, secret, 0o600)
        _write_new(public, key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo), 0o644)
    except OSError as error:
        raise StoreError(f"cannot write {error.filename}: {error.strerror}", fix="give a NAME in a folder that you may write to") from error
    return private, public, fingerprint(_raw(key, serialization))


def sign(folder: Path, key: Path) -> tuple[str, tuple[str, ...]]:
    """Write manifest.sig beside the manifest in `folder`; returns the key's fingerprint, and what the user should know.

    Raises:
        MissingDependency: `cryptography` is not installed.
        UsageError: `key` holds no Ed25519 private key, or a pass phrase protects it.
    """
    _, serialization = _cryptography()
    private = read_private_key(key)
    (folder / SIGNATURE).write_bytes(private.sign((folder / MANIFEST).read_bytes()))
    mode = key.stat().st_mode
    notes = (f"others can read the private key {key}: chmod 600 {key}",) if mode & OTHERS else ()
    return fingerprint(_raw(private, serialization)), notes


def read_private_key(path: Path) -> Any:
    """An Ed25519PrivateKey of a PEM file. Raises UsageError and MissingDependency."""
    ed25519, serialization = _cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise UsageError(f"cannot read the key {path}: {error.strerror}", fix=KEYGEN) from error
    except TypeError as error:
        raise UsageError(f"a pass phrase protects {path}", fix=f"openssl pkey -in {path} -out PLAIN.pem takes it off") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UsageError(f"{path} holds no private key in PEM", fix=KEYGEN) from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise UsageError(f"the private key in {path} is not an Ed25519 key: {type(key).__name__.strip('_')}", fix=KEYGEN)
    return key


def _raw(key: Any, serialization: Any) -> bytes:
    raw = serialization.Encoding.Raw, serialization.PublicFormat.Raw
    return key.public_key().public_bytes(*raw)


def _write_new(path: Path, content: bytes, mode: int) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)


def _cryptography() -> tuple[Any, Any]:
    """(its module of Ed25519 keys, its module that writes and reads them)."""
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise MissingDependency("signing needs `cryptography`, which is not installed", fix="pip install 'deploycc[sign]'") from error
    return ed25519, serialization
