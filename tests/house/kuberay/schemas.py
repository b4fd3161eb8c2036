"""Writes the schemas of KubeRay's resources as compact JSON, from a clone of https://github.com/ray-project/kuberay.

    python -m tests.house.kuberay.schemas CLONE v1.6.0 v1.7.0

KubeRay is licensed under the Apache License 2.0; each file states its tag. Equal parts of a schema, such as the pod
templates of head and workers, are stored once. Objects with known fields forbid others, as the API server does for
`kubectl apply` (`--validate=strict`, the default).
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

SOURCE = "https://github.com/ray-project/kuberay"
KINDS = ("rayclusters", "rayjobs", "rayservices")
SHARED_CHARACTERS = 120  # shorter parts are repeated
KEPT = ("properties", "items", "required", "enum", "type", "minimum", "maximum", "minItems", "maxItems", "minLength",
        "maxLength", "pattern", "anyOf", "additionalProperties", "nullable")  # fmt: skip


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A part of a CRD's schema as JSON Schema, without Kubernetes' annotations and with unknown fields forbidden."""
    found = {key: schema[key] for key in KEPT if key in schema}
    if schema.get("x-kubernetes-int-or-string"):
        return {**{key: found[key] for key in found if key == "pattern"}, "type": ["integer", "string"]}
    if found.pop("nullable", False):
        found["type"] = [found["type"], "null"]
    for key in ("items", "additionalProperties"):
        if isinstance(found.get(key), dict):
            found[key] = strict(found[key])
    if "properties" in found:
        found["properties"] = {name: strict(part) for name, part in found["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            found["additionalProperties"] = False
    return found


def shared(schema: Any, definitions: dict[str, Any]) -> Any:
    """A schema whose long parts are references into `definitions`."""
    if isinstance(schema, list):
        return [shared(part, definitions) for part in schema]
    if not isinstance(schema, dict):
        return schema
    small = {key: shared(part, definitions) for key, part in schema.items()}
    text = json.dumps(small, sort_keys=True)
    if "type" not in small or isinstance(small["type"], dict) or len(text) < SHARED_CHARACTERS:
        return small
    name = hashlib.sha256(text.encode()).hexdigest()[:10]
    definitions[name] = small
    return {"$ref": f"#/$defs/{name}"}


def of_tag(clone: Path, tag: str) -> dict[str, Any]:
    """The schemas of the kinds at a tag, by kind."""
    definitions: dict[str, Any] = {}
    kinds = {}
    for name in KINDS:
        path = f"{tag}:helm-chart/kuberay-operator/crds/ray.io_{name}.yaml"
        text = subprocess.run(["git", "-C", str(clone), "show", path], check=True, capture_output=True).stdout
        crd = yaml.load(text, yaml.CSafeLoader)
        (version,) = (one for one in crd["spec"]["versions"] if one["name"] == "v1")
        schema = strict(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}
        kinds[crd["spec"]["names"]["kind"]] = shared(schema, definitions)
    return {"source": SOURCE, "tag": tag, "licence": "Apache-2.0", "kinds": kinds, "$defs": definitions}


def stored() -> dict[str, Any]:
    """The schemas beside this module, by tag, oldest first."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(Path(__file__).parent.glob("v*.json"))}


def problems(body: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    """What the API server has against a resource, with the schemas of a version of the operator."""
    of_kind = {**schema["kinds"][body["kind"]], "$defs": schema["$defs"]}
    found = Draft202012Validator(of_kind).iter_errors(body)
    return [f"{error.json_path}: {error.message[:200]}" for error in found]


def main(clone: str, *tags: str) -> None:
    """Writes one file for each tag beside this module."""
    for tag in tags:
        text = json.dumps(of_tag(Path(clone), tag), sort_keys=True, separators=(",", ":"))
        (Path(__file__).parent / f"{tag}.json").write_text(text + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
