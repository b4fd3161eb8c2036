"""Worker entry point of raylets in tests: requests a worker from the fork server and lives as long as that worker.

Replaces Ray's `setup_worker.py` and uses only the standard library.
"""

import argparse
import json
import os
import socket

FORK_SERVER = "RAYDETECT_TESTS_FORK_SERVER"


def main() -> None:
    """Passes the worker's command line, environment, working directory and file descriptors to the fork server."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--serialized-runtime-env-context", default="{}")
    parser.add_argument("--language")
    known, arguments = parser.parse_known_args()
    context = json.loads(known.serialized_runtime_env_context)
    if context.get("command_prefix") or context.get("override_worker_entrypoint") or known.language != "PYTHON":
        raise SystemExit(f"not supported by the fork server: {context}, {known.language}")
    for name, value in (context.get("env_vars") or {}).items():
        os.environ[name] = os.path.expandvars(value)
    request = json.dumps({"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[FORK_SERVER])
        socket.send_fds(connection, [len(request).to_bytes(4, "big")], [0, 1, 2])
        connection.sendall(request)
        connection.recv(1)  # blocks until the worker ends and closes its end of the socket


if __name__ == "__main__":
    main()
