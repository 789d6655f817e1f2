"""Who made a bundle: an Ed25519 signature over manifest.json, which holds the SHA-256 of every other file.

`manifest.sig` holds the 64 bytes of RFC 8032; OpenSSL checks them too:
`openssl pkeyutl -verify -pubin -inkey PUB.pem -rawin -in manifest.json -sigfile manifest.sig`. Standard library only.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from pathlib import Path

from deploycc.errors import BundleError, UsageError
from deploycc.runtime import ed25519

SIGNATURE = "manifest.sig"
MANIFEST = "manifest.json"
# SubjectPublicKeyInfo of an Ed25519 key (RFC 8410): a fixed beginning, then the key itself.
PUBLIC_PREFIX = bytes.fromhex("302a300506032b6570032100")
PEM = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----\s+(.*?)-----END \1-----", re.DOTALL)


def check_signature(folder: Path, key: Path) -> str:
    """Refuse a bundle that the owner of the public key in `key` (PEM) did not sign; returns the key's fingerprint.

    Raises:
        UsageError: `key` holds no Ed25519 public key.
        BundleError: there is no signature, or it was made with another key or over another manifest.
    """
    public = read_public_key(key)
    try:
        signed = (folder / MANIFEST).read_bytes()
        signature = (folder / SIGNATURE).read_bytes()
    except FileNotFoundError as error:
        missing = Path(str(error.filename)).name
        if missing == MANIFEST:
            raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}", fix="give what `deploycc package` wrote") from None
        raise BundleError(
            f"{folder} is not signed: it has no {SIGNATURE}",
            fix="get it signed: deploycc package BUNDLE --sign KEY.pem; or leave --key out",
        ) from None
    except OSError as error:
        raise BundleError(f"cannot read {error.filename}: {error.strerror}", fix="check the permissions of the file") from error
    if not ed25519.verify(public, signed, signature):
        raise BundleError(
            f"the signature of {folder / MANIFEST} is wrong: the owner of {key} ({fingerprint(public)}) did not sign this manifest",
            fix="do not use this bundle: it was changed, or signed by someone else; ask its maker for it, or for the right key",
        )
    return fingerprint(public)


def read_public_key(path: Path) -> bytes:
    """The 32 bytes of an Ed25519 public key in PEM. Raises UsageError."""
    fix = "give the public key that `deploycc keygen` wrote (NAME.pub.pem)"
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read the key {path}: {error.strerror}", fix=fix) from error
    found = PEM.search(text)
    if found is None:
        raise UsageError(f"{path} holds no key in PEM", fix=fix)
    if found[1] != b"PUBLIC KEY":
        raise UsageError(f"{path} holds a {found[1].decode().lower()}, not a public key", fix=fix)
    try:
        der = base64.b64decode(b"".join(found[2].split()), validate=True)
    except binascii.Error:
        der = b""
    if not der.startswith(PUBLIC_PREFIX) or len(der) != len(PUBLIC_PREFIX) + ed25519.SIZE // 2:
        raise UsageError(f"the public key in {path} is not an Ed25519 key", fix=fix)
    return der[len(PUBLIC_PREFIX) :]


def fingerprint(public: bytes) -> str:
    """A short name of a public key: SHA-256 of its DER form, as OpenSSH writes fingerprints."""
    digest = hashlib.sha256(PUBLIC_PREFIX + public).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")
