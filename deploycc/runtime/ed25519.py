"""Verifies Ed25519 signatures (RFC 8032, section 5.1) in plain Python, so that a device can check a bundle with nothing installed.

    [S]B = R + [k]A,  k = SHA-512(R ‖ A ‖ message) mod L,  on  −x² + y² = 1 + d·x²·y²  over 2²⁵⁵ − 19

It only verifies: nothing here is secret, so that it need not run in constant time. The equation is checked without the cofactor 8, and
S ≥ L is refused, as OpenSSL does; a point must be encoded in the one canonical way. About 5 ms a signature.
"""

from __future__ import annotations

import hashlib

SIZE = 64  # bytes of a signature; a public key has half as many

P = 2**255 - 19
L = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P
ROOT_OF_MINUS_ONE = pow(2, (P - 1) // 4, P)

Point = tuple[int, int, int, int]  # extended coordinates X, Y, Z, T: x = X/Z, y = Y/Z, x·y = T/Z
ZERO: Point = (0, 1, 1, 0)


def verify(public_key: bytes, message: bytes, signature: bytes) -> bool:
    """Whether `signature` (64 bytes) over `message` was made with the private half of `public_key` (32 bytes)."""
    if len(public_key) != SIZE // 2 or len(signature) != SIZE:
        return False
    key, commitment = _decode(public_key), _decode(signature[:32])
    s = int.from_bytes(signature[32:], "little")
    if key is None or commitment is None or s >= L:
        return False
    k = int.from_bytes(hashlib.sha512(signature[:32] + public_key + message).digest(), "little") % L
    return _equal(_times(s, BASE), _add(commitment, _times(k, key)))


def _decode(text: bytes) -> Point | None:
    """A point from y and the lowest bit of x (section 5.1.3); None when it is not on the curve or not canonical."""
    number = int.from_bytes(text, "little")
    y, odd = number & ((1 << 255) - 1), number >> 255
    if y >= P:
        return None
    x = _root((y * y - 1) * pow(D * y * y + 1, -1, P) % P)
    if x is None or (x == 0 and odd):
        return None
    if x & 1 != odd:
        x = P - x
    return x, y, 1, x * y % P


def _root(square: int) -> int | None:
    """A square root modulo P, which is 5 modulo 8; None when there is none."""
    for root in (candidate := pow(square, (P + 3) // 8, P), candidate * ROOT_OF_MINUS_ONE % P):
        if root * root % P == square:
            return root
    return None


def _add(a: Point, b: Point) -> Point:
    """The sum of two points, equal or not (Hisil et al. 2008, unified addition for a = −1)."""
    low, high = (a[1] - a[0]) * (b[1] - b[0]) % P, (a[1] + a[0]) * (b[1] + b[0]) % P
    t, z = 2 * D * a[3] * b[3] % P, 2 * a[2] * b[2] % P
    e, f, g, h = high - low, z - t, z + t, high + low
    return e * f % P, g * h % P, f * g % P, e * h % P


def _times(factor: int, point: Point) -> Point:
    """Double and add."""
    total = ZERO
    while factor:
        if factor & 1:
            total = _add(total, point)
        point = _add(point, point)
        factor >>= 1
    return total


def _equal(a: Point, b: Point) -> bool:
    return (a[0] * b[2] - b[0] * a[2]) % P == 0 and (a[1] * b[2] - b[1] * a[2]) % P == 0


def _base() -> Point:
    """The point with y = 4/5 and even x."""
    point = _decode((4 * pow(5, -1, P) % P).to_bytes(32, "little"))
    return ZERO if point is None else point


BASE = _base()
