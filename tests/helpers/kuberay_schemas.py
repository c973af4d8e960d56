"""The schemas of KubeRay's kinds, which forbid unknown fields here; they are stored beside this file.

They are `v1` of ray-operator/config/crd/bases in KubeRay 1.7.0 (Apache-2.0, The KubeRay Authors), without descriptions.
To renew them:

    python tests/helpers/kuberay_schemas.py FOLDER_OF_CRDS
"""

from __future__ import annotations

import json
import lzma
import sys
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft7Validator

PACKED = Path(__file__).with_suffix(".json.xz")
KINDS = ("RayCluster", "RayCronJob", "RayJob")


def schema_errors(manifest: dict[str, Any]) -> list[str]:
    """List the errors of a manifest: KubeRay's API would refuse it, or silently drop unknown fields."""
    found = validator_of(manifest["kind"]).iter_errors(manifest)
    return [f"{'.'.join(map(str, error.path))}: {error.message}" for error in found]


@cache
def validator_of(kind: str) -> Draft7Validator:
    """Return the validator of manifests of a kind."""
    schema = closed(json.loads(lzma.decompress(PACKED.read_bytes()))[kind])
    schema["properties"]["metadata"] = {"type": "object"}
    return Draft7Validator(schema)


def closed(schema: Any) -> Any:
    """Return a schema that forbids unknown fields."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    tree = {key: closed(value) for key, value in schema.items()}
    if isinstance(tree.get("properties"), dict) and not tree.get("x-kubernetes-preserve-unknown-fields"):
        tree.setdefault("additionalProperties", False)
    return tree


def pack(folder: Path) -> None:
    """Store the schemas of the definitions in a folder."""
    found = {}
    for path in folder.glob("*.yaml"):
        definition = yaml.safe_load(path.read_text())
        (version,) = (one for one in definition["spec"]["versions"] if one["name"] == "v1")
        found[definition["spec"]["names"]["kind"]] = without_descriptions(version["schema"]["openAPIV3Schema"])
    text = json.dumps({kind: found[kind] for kind in KINDS}, sort_keys=True, separators=(",", ":"))
    PACKED.write_bytes(lzma.compress(text.encode(), preset=9))


def without_descriptions(schema: Any, *, is_names: bool = False) -> Any:
    """Return a schema without descriptions.

    With `is_names` the keys are names of fields, and one may be `description`.
    """
    if isinstance(schema, list):
        return [without_descriptions(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: without_descriptions(value, is_names=key == "properties" and not is_names)
        for key, value in schema.items()
        if is_names or key != "description"
    }


if __name__ == "__main__":
    pack(Path(sys.argv[1]))
