from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from bundle_tools import rewrite

from deploycc import tools
from deploycc.errors import BundleError, MissingDependency, StoreError, UsageError
from deploycc.package.bundle import write
from deploycc.package.manifest import Contents
from deploycc.package.pack import pack
from deploycc.package.signing import make_keys, read_private_key
from deploycc.runtime.__main__ import main
from deploycc.runtime.bundle import load
from deploycc.runtime.seal import check_signature, fingerprint, read_public_key

pytest.importorskip("cryptography", reason="the extra 'sign' is not installed")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    private, public, _ = make_keys(tmp_path_factory.mktemp("keys") / "maker")
    return private, public


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory, make_contents: Callable[..., Contents], keys: tuple[Path, Path]) -> Path:
    return pack(write(tmp_path_factory.mktemp("signed") / "lite", make_contents()).folder, key=keys[0]).path


@pytest.fixture
def folder(package: Path, tmp_path: Path) -> Path:
    shutil.unpack_archive(package, tmp_path)
    return tmp_path / "lite"


def test_a_pair_of_keys_is_for_its_owner_and_is_never_overwritten(tmp_path: Path):
    private, public, mark = make_keys(tmp_path / "me")
    assert (private.name, public.name) == ("me.pem", "me.pub.pem")
    assert private.stat().st_mode & 0o777 == 0o600
    assert mark == fingerprint(read_public_key(public))
    before = private.read_bytes()
    with pytest.raises(StoreError, match=r"me\.pem exists, and a key is never overwritten"):
        make_keys(tmp_path / "me")
    private.unlink()
    with pytest.raises(StoreError, match=r"me\.pub\.pem exists"):
        make_keys(tmp_path / "me")
    public.unlink()
    assert make_keys(tmp_path / "me")[0].read_bytes() != before
    with pytest.raises(StoreError, match="cannot write"):
        make_keys(tmp_path / "no" / "me")


def test_the_makers_key_verifies_a_package_and_its_folder(package: Path, folder: Path, keys: tuple[Path, Path]):
    mark = fingerprint(read_public_key(keys[1]))
    for bundle in (package, folder):
        assert tools.verify(bundle, keys[1])["checks"][0] == f"signed by the owner of {keys[1]} ({mark})"
    assert tools.verify(package)["checks"][0] == "signed, but by whom was not checked: give --key PUB.pem"
    assert load(folder).unlisted == ()


def test_the_same_key_and_bundle_give_the_same_bytes(folder: Path, keys: tuple[Path, Path], package: Path):
    again = pack(folder, folder.parent / "again.zip", key=keys[0])
    assert again.path.read_bytes() == package.read_bytes()
    assert again.signed == fingerprint(read_public_key(keys[1]))
    assert [part.files for part in again.parts if part.name == "signature"] == [1]


def test_another_key_is_refused(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    other = make_keys(tmp_path / "other")[1]
    with pytest.raises(
        BundleError, match=r"signature of .*manifest\.json is wrong: the owner of .*other\.pub\.pem \(SHA256:.*\) did not sign"
    ):
        tools.verify(package, other)
    assert main(["selftest", "--bundle", str(package), "--key", str(other)]) == 1
    assert "did not sign this manifest" in capsys.readouterr().err


def test_a_missing_signature_is_refused(folder: Path, keys: tuple[Path, Path], capsys: pytest.CaptureFixture[str]):
    (folder / "manifest.sig").unlink()
    with pytest.raises(BundleError, match=r"lite is not signed: it has no manifest\.sig"):
        tools.verify(folder, keys[1])
    assert main(["selftest", "--bundle", str(folder), "--key", str(keys[1])]) == 1
    assert "is not signed" in capsys.readouterr().err
    assert main(["selftest", "--bundle", str(folder)]) == 0


def test_a_changed_byte_is_refused_wherever_it_is(folder: Path, keys: tuple[Path, Path]):
    """One in the manifest breaks the signature; one in another file breaks the hash that the manifest holds."""
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        path.write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
        reason = "signature of" if path.name.startswith("manifest") else f"{path.name} was changed"
        with pytest.raises(BundleError, match=reason):
            tools.verify(folder, keys[1])
        path.write_bytes(whole)
    tools.verify(folder, keys[1])


def test_a_manifest_that_was_sealed_anew_is_refused_with_the_key_only(folder: Path, keys: tuple[Path, Path]):
    """Whoever changes a file can mend the hashes, but not the signature."""
    rewrite(folder, lambda document: document.update(seed=99))
    load(folder)
    with pytest.raises(BundleError, match="did not sign this manifest"):
        tools.verify(folder, keys[1])


def test_a_signature_does_not_travel_into_another_package(package: Path, tmp_path: Path):
    packed = pack(package, tmp_path / "second.zip", without=("report",))
    assert packed.signed is None
    assert packed.notes == ("the bundle's signature does not travel: sign this package with --sign KEY.pem",)


def test_openssl_verifies_the_same_signature(folder: Path, keys: tuple[Path, Path]):
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    command = [
        openssl,
        "pkeyutl",
        "-verify",
        "-pubin",
        "-inkey",
        str(keys[1]),
        "-rawin",
        "-in",
        "manifest.json",
        "-sigfile",
        "manifest.sig",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if "-rawin" in done.stderr:
        pytest.skip("this openssl is older than 3.0")
    assert done.returncode == 0, done.stderr
    assert "Verified Successfully" in done.stdout


def test_keys_that_are_none_are_named(tmp_path: Path, keys: tuple[Path, Path], folder: Path):
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    with pytest.raises(UsageError, match="cannot read the key"):
        read_public_key(tmp_path / "none.pem")
    with pytest.raises(UsageError, match="cannot read the key"):
        read_private_key(tmp_path / "none.pem")
    (tmp_path / "text.pem").write_text("hello")
    with pytest.raises(UsageError, match="holds no key in PEM"):
        read_public_key(tmp_path / "text.pem")
    with pytest.raises(UsageError, match="holds no private key in PEM"):
        read_private_key(tmp_path / "text.pem")
    with pytest.raises(UsageError, match="holds a private key, not a public key"):
        check_signature(folder, keys[0])
    with pytest.raises(UsageError, match="holds no private key"):
        pack(folder, folder.parent / "x.zip", key=keys[1])
    curve = ec.generate_private_key(ec.SECP256R1())
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (tmp_path / "ec.pem").write_bytes(curve.private_bytes(pem, pkcs8, serialization.NoEncryption()))
    (tmp_path / "ec.pub.pem").write_bytes(curve.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(UsageError, match="is not an Ed25519 key: ECPrivateKey"):
        read_private_key(tmp_path / "ec.pem")
    with pytest.raises(UsageError, match="is not an Ed25519 key"):
        read_public_key(tmp_path / "ec.pub.pem")
    (tmp_path / "odd.pem").write_text("-----BEGIN PUBLIC KEY-----\n!!!\n-----END PUBLIC KEY-----\n")
    with pytest.raises(UsageError, match="is not an Ed25519 key"):
        read_public_key(tmp_path / "odd.pem")
    locked = read_private_key(keys[0]).private_bytes(pem, pkcs8, serialization.BestAvailableEncryption(b"secret"))
    (tmp_path / "locked.pem").write_bytes(locked)
    with pytest.raises(UsageError, match="a pass phrase protects"):
        read_private_key(tmp_path / "locked.pem")


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path, keys: tuple[Path, Path]):
    with pytest.raises(BundleError, match="is not a bundle"):
        check_signature(tmp_path, keys[1])
    (tmp_path / "manifest.sig").write_bytes(bytes(64))
    with pytest.raises(BundleError, match="is not a bundle"):
        check_signature(tmp_path, keys[1])
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(BundleError, match="cannot read"):
        check_signature(tmp_path, keys[1])


def test_a_key_that_others_can_read_is_told(tmp_path: Path, folder: Path):
    private = make_keys(tmp_path / "loose")[0]
    private.chmod(0o644)
    assert any("others can read the private key" in note for note in pack(folder, tmp_path / "x.zip", key=private).notes)


def test_without_cryptography_signing_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: tuple[Path, Path], package: Path
):
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric", None)
    with pytest.raises(MissingDependency, match="signing needs `cryptography`"):
        make_keys(tmp_path / "me")
    tools.verify(package, keys[1])  # checking needs nothing
