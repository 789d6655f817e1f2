"""What the device will run, as CycloneDX 1.6 JSON: the model, the runner, and the packages that the runner needs.

The serial number is made of the content, and the date is the compile's, so that the same package has the same SBOM.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from deploycc import __version__
from deploycc.package.distributions import spdx
from deploycc.package.runner import Component, RunnerParts
from deploycc.runtime.bundle import canonical, listed

SBOM = "sbom.cdx.json"
SCHEMA = "http://cyclonedx.org/schema/bom-1.6.schema.json"
KINDS = {"model": "machine-learning-model", "model-data": "data", "runner": "application"}  # role → CycloneDX's type
BUNDLE = "bundle"


def text(manifest: Mapping[str, Any], added: Sequence[RunnerParts]) -> str:
    """The SBOM of a bundle with these runners; `manifest` lists their files."""
    return json.dumps(document(manifest, added), indent=1, ensure_ascii=False) + "\n"


def document(manifest: Mapping[str, Any], added: Sequence[RunnerParts]) -> dict[str, Any]:
    """The same as plain values."""
    entries = [entry for entry in listed(manifest) if entry["role"] in KINDS]
    needs = {item.name: item for parts in added for item in (*parts.needs, *parts.carries)}
    bundle: dict[str, Any] = {
        "type": "application",
        "bom-ref": BUNDLE,
        "name": PurePath(manifest["source"]).name or BUNDLE,
        "version": str(manifest.get("digest", ""))[:12],
        "properties": _properties({"target": manifest["target"]["name"], "arch": manifest["target"]["arch"]}),
    }
    found: dict[str, Any] = {
        "$schema": SCHEMA,
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "timestamp": manifest["measured"]["created"],
            "tools": {"components": [{"type": "application", "name": "deploycc", "version": __version__}]},
            "component": bundle,
        },
        "components": [*map(_file, entries), *map(_component, needs.values())],
        "dependencies": _dependencies(entries, added, needs),
    }
    return {**found, "serialNumber": uuid.uuid5(uuid.NAMESPACE_URL, canonical(found).decode()).urn}


def _file(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": KINDS[entry["role"]],
        "bom-ref": _file_ref(entry["path"]),
        "name": entry["path"],
        "hashes": [{"alg": "SHA-256", "content": entry["sha256"]}],
        "properties": _properties({"bytes": str(entry["bytes"])}),
    }


def _component(item: Component) -> dict[str, Any]:
    facts = {**dict(item.facts), **({} if item.bytes is None else {"installed bytes": str(item.bytes)})}
    given = {
        "version": item.version,
        "purl": item.purl,
        "hashes": [{"alg": "SHA-256", "content": item.sha256}] if item.sha256 else [],
        "licenses": _licences(item.licences),
        "properties": _properties(facts),
    }
    return {"type": item.kind, "bom-ref": _ref(item), "name": item.name, **{key: value for key, value in given.items() if value}}


def _licences(found: Sequence[str]) -> list[dict[str, Any]]:
    if len(found) == 1 and (expression := spdx(found[0])):
        return [{"expression": expression}]
    return [{"license": {"name": name}} for name in found]


def _dependencies(
    entries: Sequence[Mapping[str, Any]], added: Sequence[RunnerParts], needs: Mapping[str, Component]
) -> list[dict[str, Any]]:
    edges = {BUNDLE: [_file_ref(entry["path"]) for entry in entries]}
    for parts in added:
        uses = [_ref(needs[name]) for name in parts.uses or needs]
        edges |= {_file_ref(name): uses for name in parts.files}
    edges |= {_ref(item): [_ref(needs[name]) for name in item.needs if name in needs] for item in needs.values()}
    return [{"ref": ref, "dependsOn": sorted(set(used))} for ref, used in edges.items()]


def _properties(values: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"name": f"deploycc:{name}", "value": value} for name, value in values.items()]


def _file_ref(path: str) -> str:
    return f"file:{path}"


def _ref(item: Component) -> str:
    return item.purl or f"{item.kind}:{item.name}"
