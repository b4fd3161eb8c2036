"""A small Kubernetes API on localhost: RayJobs checked against KubeRay's schema, ConfigMaps, pods and their logs.

There is no operator: a test says by `steps` what each look at a RayJob's status finds, with the pods of that time.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.house.kuberay.schemas import problems, stored

TOKEN = "token-of-the-api-0123456789abcdef"
NAMESPACE = "vision"


@dataclass
class Step:
    """What one look at the status finds, and the pods from then on: their phases by name."""

    status: dict[str, Any]
    pods: dict[str, str] = field(default_factory=dict)


@dataclass
class Cluster:
    """What the API knows, and how it is to behave."""

    steps: list[Step] = field(default_factory=list)
    logs: dict[str, list[str]] = field(default_factory=dict)
    breaks: int = 0  # connections for logs that are cut in the middle of a line, two lines further each time
    outages: int = 0  # looks at the status that are answered with 503
    refused: dict[str, int] = field(default_factory=dict)  # status codes by the last part of the path
    schema: str = "v1.6.0"
    rayjobs: dict[str, Any] = field(default_factory=dict)
    configs: dict[str, Any] = field(default_factory=dict)
    looks: int = 0
    requests: list[str] = field(default_factory=list)

    @property
    def step(self) -> Step:
        return self.steps[min(max(self.looks, 1), len(self.steps)) - 1]


class Answer(Exception):
    """Ends a request with an error."""


class Handler(BaseHTTPRequestHandler):
    cluster: Cluster

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def do_DELETE(self) -> None:
        self._answer(self._delete)

    def _answer(self, of: Any) -> None:
        url = urlsplit(self.path)
        parts, query = url.path.strip("/").split("/"), parse_qs(url.query)
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        self.cluster.requests.append(f"{self.command} {self.path}")
        try:
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                raise Answer(401, "Unauthorized")
            code = self.cluster.refused.get(f"{self.command} {parts[-1]}")
            if code:
                raise Answer(code, f"{parts[-1]} is forbidden: User cannot do it")
            assert parts[parts.index("namespaces") + 1] == NAMESPACE, self.path
            found = of(parts, query, body)
        except Answer as error:
            code, message = error.args
            self._send(code, {"kind": "Status", "status": "Failure", "message": message, "code": code})
        else:
            if found is not None:
                self._send(201 if self.command == "POST" else 200, found)

    def _send(self, code: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _post(self, parts: list[str], query: dict[str, list[str]], body: dict[str, Any]) -> dict[str, Any]:
        name = body["metadata"]["name"]
        if parts[-1] == "configmaps":
            self.cluster.configs[name] = body
            return body
        assert parts[:3] == ["apis", "ray.io", "v1"] and parts[-1] == "rayjobs"
        if name in self.cluster.rayjobs:
            raise Answer(409, f'rayjobs.ray.io "{name}" already exists')
        assert query["fieldValidation"] == ["Strict"]
        schema = stored().get(self.cluster.schema) or _before_secrets()
        wrong = problems(body, schema)
        if wrong:
            raise Answer(400, f"strict decoding error: {wrong[0]}")
        body["metadata"]["uid"] = f"uid-{name}"
        self.cluster.rayjobs[name] = body
        return body

    def _delete(self, parts: list[str], query: dict[str, list[str]], body: object) -> dict[str, Any]:
        del self.cluster.rayjobs[parts[-1]]
        return {"kind": "Status", "status": "Success"}

    def _get(self, parts: list[str], query: dict[str, list[str]], body: object) -> dict[str, Any] | None:
        if parts[-2] == "rayjobs":
            return self._status(parts[-1])
        if parts[-1] == "pods":
            (selector,) = query["labelSelector"]
            assert selector.removeprefix("job-name=") in self.cluster.rayjobs
            items = []
            for place, (name, phase) in enumerate(self.cluster.step.pods.items()):
                made = f"2026-11-22T02:00:{place:02d}Z"
                items.append({"metadata": {"name": name, "creationTimestamp": made}, "status": {"phase": phase}})
            return {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": list(reversed(items))}
        assert parts[-1] == "log" and query["timestamps"] == ["true"]
        self._log(self.cluster.logs[parts[-2]], follows=query.get("follow") == ["true"])
        return None

    def _status(self, name: str) -> dict[str, Any]:
        if self.cluster.outages:
            self.cluster.outages -= 1
            raise Answer(503, "the server is currently unable to handle the request")
        if name not in self.cluster.rayjobs:
            raise Answer(404, f'rayjobs.ray.io "{name}" not found')
        self.cluster.looks += 1
        return {**self.cluster.rayjobs[name], "status": self.cluster.step.status}

    def _log(self, lines: list[str], follows: bool) -> None:
        """Sends a log in pieces that end anywhere; again from its start at each request, as `sinceSeconds` may do."""
        stamps = [f"2026-11-22T02:00:00.{place * 5:03d}".rstrip("0").rstrip(".") + "Z" for place in range(len(lines))]
        stamps[:1] = ["2026-11-22T02:00:00Z"]
        data = "".join(f"{stamp} {line}\n" for stamp, line in zip(stamps, lines, strict=True)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        if self.cluster.breaks:
            self.cluster.breaks -= 1
            self.send_header("Content-Length", str(len(data)))  # of which the second half never comes
            data = data[: len(data) // 2]
        self.end_headers()
        for start in range(0, len(data), 37):
            self.wfile.write(data[start : start + 37])
            self.wfile.flush()
        self.close_connection = True


def _before_secrets() -> dict[str, Any]:
    """The schema of an operator whose `authOptions` has no `secretName`, as in KubeRay 1.5.1."""
    schema: dict[str, Any] = stored()["v1.6.0"]
    parts = [part for part in schema["$defs"].values() if "enableK8sTokenAuth" in part.get("properties", {})]
    for part in parts:
        del part["properties"]["secretName"]
    assert parts
    return schema


@contextmanager
def serving(cluster: Cluster, folder: Path, token: str = TOKEN) -> Iterator[Path]:
    """Serves the API while the block runs; yields a kubeconfig."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"cluster": cluster}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    kubeconfig = folder / "kubeconfig"
    context = {"cluster": "line", "user": "me", "namespace": NAMESPACE}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "line",
        "clusters": [{"name": "line", "cluster": {"server": f"http://127.0.0.1:{server.server_address[1]}"}}],
        "users": [{"name": "me", "user": {"token": token}}],
        "contexts": [{"name": "line", "context": context}],
    }
    kubeconfig.write_text(yaml.safe_dump(config))
    try:
        yield kubeconfig
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
