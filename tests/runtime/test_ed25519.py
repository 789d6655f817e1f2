from __future__ import annotations

import numpy as np
import pytest

from deploycc.runtime.ed25519 import BASE, L, P, _decode, _equal, _times, verify

# RFC 8032, section 7.1: public key, message, signature
VECTORS = [
    (
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
    ),
]


@pytest.mark.parametrize(("key", "message", "signature"), VECTORS)
def test_the_vectors_of_the_rfc_verify(key: str, message: str, signature: str):
    assert verify(bytes.fromhex(key), bytes.fromhex(message), bytes.fromhex(signature))


@pytest.mark.parametrize(("key", "message", "signature"), VECTORS[1:])
def test_any_changed_bit_is_refused(key: str, message: str, signature: str):
    texts = [bytes.fromhex(text) for text in (key, message, signature)]
    rng = np.random.default_rng(0)
    for place, text in enumerate(texts):
        for bit in rng.choice(8 * len(text), size=min(24, 8 * len(text)), replace=False):
            changed = bytearray(text)
            changed[bit // 8] ^= 1 << (bit % 8)
            assert not verify(*(bytes(changed) if place == index else other for index, other in enumerate(texts)))


def test_signatures_of_cryptography_verify():
    ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
    rng = np.random.default_rng(1)
    for size in (0, 1, 63, 64, 1000):
        private = ed25519.Ed25519PrivateKey.from_private_bytes(rng.bytes(32))
        other = ed25519.Ed25519PrivateKey.from_private_bytes(rng.bytes(32)).public_key().public_bytes_raw()
        message = rng.bytes(size)
        signature = private.sign(message)
        assert verify(private.public_key().public_bytes_raw(), message, signature)
        assert not verify(other, message, signature)
        assert not verify(private.public_key().public_bytes_raw(), message + b"x", signature)


def test_a_signature_with_l_added_is_refused():
    """S + L satisfies the equation too; taking it would give every signature a twin (RFC 8032, section 5.1.7)."""
    key, message, signature = (bytes.fromhex(text) for text in VECTORS[1])
    twin = int.from_bytes(signature[32:], "little") + L
    assert not verify(key, message, signature[:32] + twin.to_bytes(32, "little"))


def test_points_that_are_none_are_refused():
    assert _decode((2).to_bytes(32, "little")) is None  # no x for y = 2
    assert _decode((P + 1).to_bytes(32, "little")) is None  # y = 1, not canonical
    assert _decode((1 | 1 << 255).to_bytes(32, "little")) is None  # x = 0 is even
    assert not verify((2).to_bytes(32, "little"), b"", bytes(64))
    assert not verify(bytes(31), b"", bytes(64))
    assert not verify(bytes(32), b"", bytes(63))


def test_the_base_point_has_order_l():
    assert _equal(_times(L, BASE), (0, 1, 1, 0))
    assert not _equal(_times(L - 1, BASE), (0, 1, 1, 0))
