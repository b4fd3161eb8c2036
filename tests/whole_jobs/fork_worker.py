"""What a raylet of the tests starts for a worker: it asks the nursery for one, and lives as long as that does.

A script of the standard library alone, in the place of Ray's `setup_worker.py`.
"""

import argparse
import json
import os
import socket

NURSERY = "RAYDETECT_TESTS_NURSERY"


def main() -> None:
    """Hands over the worker's command line, environment, folder and files."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--serialized-runtime-env-context", default="{}")
    parser.add_argument("--language")
    known, words = parser.parse_known_args()
    context = json.loads(known.serialized_runtime_env_context)
    if context.get("command_prefix") or context.get("override_worker_entrypoint") or known.language != "PYTHON":
        raise SystemExit(f"no worker of the nursery: {context}, {known.language}")
    for name, value in (context.get("env_vars") or {}).items():
        os.environ[name] = os.path.expandvars(value)
    asked = json.dumps({"words": words, "environment": dict(os.environ), "folder": os.getcwd()}).encode()
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(os.environ[NURSERY])
        socket.send_fds(line, [len(asked).to_bytes(4, "big")], [0, 1, 2])
        line.sendall(asked)
        line.recv(1)  # nothing comes: the worker holds the other end until it is gone


if __name__ == "__main__":
    main()
