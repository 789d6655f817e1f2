from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deploycc.package import sbom
from deploycc.package.bundle import write
from deploycc.package.distributions import closure, licences, spdx
from deploycc.package.manifest import Contents
from deploycc.package.pack import pack
from deploycc.package.runner import Component, RunnerParts
from deploycc.runtime.bundle import load


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory, make_contents: Callable[..., Contents]) -> Path:
    return pack(write(tmp_path_factory.mktemp("sbom") / "lite", make_contents()).folder).path


@pytest.fixture(scope="module")
def found(package: Path) -> dict[str, Any]:
    return json.loads(zipfile.ZipFile(package).read(f"lite/{sbom.SBOM}"))


def components(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {item["name"]: item for item in found["components"]}


def test_it_is_valid_by_the_official_schema(package: Path):
    json_schema = pytest.importorskip("cyclonedx.validation.json", reason="cyclonedx-python-lib[json-validation] is not installed")
    from cyclonedx.schema import SchemaVersion

    text = zipfile.ZipFile(package).read(f"lite/{sbom.SBOM}").decode()
    validator = json_schema.JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str(text) is None
    assert validator.validate_str(text.replace('"CycloneDX"', '"Other"')) is not None  # the check can fail


def test_it_keeps_the_rules_that_matter_without_the_schema(found: dict[str, Any]):
    assert (found["bomFormat"], found["specVersion"], found["version"]) == ("CycloneDX", "1.6", 1)
    assert re.fullmatch(r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", found["serialNumber"])
    refs = [item["bom-ref"] for item in found["components"]] + [found["metadata"]["component"]["bom-ref"]]
    assert len(set(refs)) == len(refs)
    edges = {item["ref"]: item["dependsOn"] for item in found["dependencies"]}
    assert set(edges) <= set(refs)
    assert all(set(used) <= set(refs) for used in edges.values())
    for item in found["components"]:
        assert item["type"] in ("application", "library", "platform", "machine-learning-model", "data", "file")
        for digest in item.get("hashes", ()):
            assert digest["alg"] == "SHA-256"
            assert re.fullmatch(r"[0-9a-f]{64}", digest["content"])


def test_it_holds_the_model_the_runner_and_the_runtime_with_all_it_needs(package: Path, found: dict[str, Any]):
    by_name = components(found)
    model = zipfile.ZipFile(package).read("lite/model.onnx")
    assert by_name["model.onnx"]["type"] == "machine-learning-model"
    assert by_name["model.onnx"]["hashes"] == [{"alg": "SHA-256", "content": hashlib.sha256(model).hexdigest()}]
    assert by_name["runner.pyz"]["type"] == "application"
    assert by_name["python"]["properties"] == [{"name": "deploycc:minimum", "value": "3.11"}]
    for name in ("numpy", "onnxruntime", "pillow", "protobuf", "flatbuffers"):
        assert by_name[name]["version"] == importlib.metadata.version(name)
        assert by_name[name]["purl"] == f"pkg:pypi/{name}@{importlib.metadata.version(name)}"
        assert by_name[name]["licenses"]
    assert not {"torch", "onnx", "pydantic"} & set(by_name)
    edges = {item["ref"]: item["dependsOn"] for item in found["dependencies"]}
    assert "file:model.onnx" in edges["bundle"]
    assert {"platform:python", by_name["numpy"]["purl"], by_name["onnxruntime"]["purl"]} <= set(edges["file:runner.pyz"])
    assert by_name["protobuf"]["purl"] in edges[by_name["onnxruntime"]["purl"]]


def test_it_is_listed_with_its_hash_and_the_same_each_time(package: Path, tmp_path: Path, found: dict[str, Any]):
    zipfile.ZipFile(package).extractall(tmp_path)
    bundle = load(tmp_path / "lite")
    assert bundle.file("sbom") == tmp_path / "lite" / sbom.SBOM
    again = pack(package, tmp_path / "again.zip")
    assert again.path.read_bytes() == package.read_bytes()
    other = sbom.document({**bundle.manifest, "digest": "0" * 64}, ())
    assert other["serialNumber"] != found["serialNumber"]


def test_a_package_that_is_not_here_is_told_and_keeps_its_tested_version():
    found, notes = closure({"no-such-package-anywhere": "1.2.3+cpu"}, "aarch64")
    assert found == (Component("no-such-package-anywhere", "1.2.3+cpu", purl="pkg:pypi/no-such-package-anywhere@1.2.3"),)
    assert notes == ("no-such-package-anywhere is not installed here: its licence, size and own dependencies are not known",)


def test_another_version_than_the_tested_one_is_told():
    found, notes = closure({"numpy": "1.0"}, "any")
    assert found[0].version == "1.0"
    assert notes == (
        f"numpy 1.0 was tested, and {importlib.metadata.version('numpy')} is installed here: its dependencies are read from that",
    )


def test_markers_are_read_for_the_device(monkeypatch: pytest.MonkeyPatch):
    class Fake:
        version = "1"
        files = None
        metadata = importlib.metadata.metadata("numpy")
        requires = ("only-x86; platform_machine == 'x86_64'", "only-arm; platform_machine == 'aarch64'", "always>=2", "dev; extra == 'dev'")

    real = importlib.metadata.distribution
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Fake if name == "root" else real(name))
    found, _ = closure({"Root": ""}, "aarch64")
    assert [item.name for item in found] == ["always", "only-arm", "root"]
    assert found[-1].needs == ("always", "only-arm")
    assert found[-1].bytes is None


@pytest.mark.parametrize(
    ("metadata", "wanted"),
    [
        ({"license_expression": "bsd-3-clause and mit"}, ("BSD-3-Clause AND MIT",)),
        ({"license": "MIT License", "classifier": ["License :: OSI Approved :: MIT License"]}, ("MIT License",)),
        ({"license": "Apache-2.0"}, ("Apache-2.0",)),
        ({"license": "Our own licence"}, ("Our own licence",)),
        ({"license": "Permission is hereby granted\n" * 30}, ()),
        ({"classifier": ["License :: OSI Approved", "Programming Language :: C"]}, ()),
        ({}, ()),
    ],
)
def test_licences_are_what_the_package_says(metadata: dict[str, Any], wanted: tuple[str, ...]):
    assert licences(metadata) == wanted


def test_spdx_or_nothing():
    assert spdx("") is None
    assert spdx("not a licence") is None
    assert spdx("Apache-2.0 or MIT") == "Apache-2.0 OR MIT"


def test_a_library_of_a_runner_has_its_hash_and_no_made_up_version(package: Path, tmp_path: Path):
    zipfile.ZipFile(package).extractall(tmp_path)
    library = Component("libruntime.so", sha256="a" * 64, licences=("MIT", "BSD"), facts=(("built for", "aarch64"),))
    found = sbom.document(load(tmp_path / "lite").manifest, (RunnerParts(("runner.pyz",), (library,)),))
    item = components(found)["libruntime.so"]
    assert "version" not in item
    assert item["hashes"][0]["content"] == "a" * 64
    assert item["licenses"] == [{"license": {"name": "MIT"}}, {"license": {"name": "BSD"}}]
    assert {"ref": "file:runner.pyz", "dependsOn": ["library:libruntime.so"]} in found["dependencies"]


def test_pillow_is_needed_for_pictures_only(tmp_path: Path, make_contents: Callable[..., Contents]):
    plain = make_contents(artifact=replace(make_contents().artifact, transform=None))
    packed = pack(write(tmp_path / "plain", plain).folder)
    names = [item.name for item in packed.needs]
    assert "numpy" in names
    assert "pillow" not in names
    assert next(item for item in packed.needs if item.name == "onnxruntime").bytes > 1e6
