"""`package`, `keygen` and `verify --key` as a user meets them."""

import json
import zipfile

import pytest

from deploycc.package.bundle import write


@pytest.fixture
def bundle(tmp_path, make_contents):
    return write(tmp_path / "lite", make_contents()).folder


def test_a_signed_package_of_a_bundle(deploycc, bundle, tmp_path):
    made = deploycc("keygen", tmp_path / "maker")
    assert made.status == 0, made.err
    assert "fingerprint: SHA256:" in made.out
    packed = deploycc("package", bundle, "--sign", tmp_path / "maker.pem", "--max-size", "1MB", "--no-report")
    assert packed.status == 0, packed.err
    for said in ("part", "compressed", "model", "golden", "runner", "sbom", "signature", "on the device besides", "onnxruntime", "met"):
        assert said in packed.out
    assert "report.html" not in " ".join(zipfile.ZipFile(tmp_path / "lite.zip").namelist())
    found = deploycc("verify", tmp_path / "lite.zip", "--key", tmp_path / "maker.pub.pem")
    assert found.status == 0, found.err
    assert "ok  signed by the owner of" in found.out
    assert "golden outputs" in found.out
    assert deploycc("verify", bundle, "--key", tmp_path / "maker.pub.pem").status == 1
    other = deploycc("keygen", tmp_path / "other", "--json").json
    refused = deploycc("verify", tmp_path / "lite.zip", "--key", other["public"])
    assert refused.status == 1
    assert "did not sign this manifest" in refused.err
    assert deploycc("keygen", tmp_path / "other").status == 1


def test_a_package_over_its_limit_is_written_and_exits_3(deploycc, bundle, tmp_path):
    found = deploycc("package", bundle, "-o", tmp_path / "x.tar.gz", "--max-size", "1kB", "--json")
    assert found.status == 3
    document = found.json
    assert document["met"] is False
    assert document["format"] == "tar.gz"
    assert document["bytes"] == (tmp_path / "x.tar.gz").stat().st_size
    assert document["limit"] == 1000
    assert {"name", "files", "bytes", "compressed"} == set(document["parts"][0])
    missed = deploycc("package", bundle, "--max-size", "1kB")
    assert missed.status == 3
    assert "NOT MET: the largest part is" in missed.out


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("--format", "rar"), 2, "there is no format 'rar'"),
        (("--runner", "pyhton"), 2, "did you mean 'python'"),
        (("--sign", "none.pem"), 2, "cannot read the key none.pem"),
        (("--max-size", "12"), 2, "--max-size"),
        (("-o", "/proc/x.zip"), 1, "cannot write /proc/x.zip"),
    ],
)
def test_what_cannot_be_honoured_says_so(deploycc, bundle, words, status, said):
    found = deploycc("package", bundle, *words)
    assert found.status == status
    assert said in found.err
    assert not bundle.with_name("lite.zip").exists()


def test_a_package_runs_and_becomes_another(deploycc, bundle, tmp_path):
    import numpy as np

    assert deploycc("package", bundle).status == 0
    np.savez(tmp_path / "x.npz", image=np.ones((3, 8, 8), np.float32))
    found = deploycc("run", tmp_path / "lite.zip", tmp_path / "x.npz", "--json")
    assert found.status == 0, found.err
    assert len(json.loads(found.out)["predictions"]) == 5
    assert deploycc("package", tmp_path / "lite.zip", "--format", "tar.gz").status == 0
    assert deploycc("verify", tmp_path / "lite.tar.gz").status == 0
    same = deploycc("package", tmp_path / "lite.zip", "-o", tmp_path / "lite.zip")
    assert same.status == 2
    assert "is the package that is read" in same.err
