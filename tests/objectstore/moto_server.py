"""moto's S3 server on loopback, in a process of its own: the fallback where Swift is not installed."""

import http.client
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.objectstore import ObjectStore, free_port

START_SECONDS = 30


@contextmanager
def running_moto() -> Iterator[ObjectStore]:
    """Starts the server and ends it by its process id."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait(port)
        yield ObjectStore("moto", f"http://127.0.0.1:{port}", "key-of-tests", "secret-of-tests")
    finally:
        process.terminate()
        process.wait(timeout=20)


def _wait(port: int) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
            connection.request("GET", "/moto-api/data.json")
            connection.getresponse()
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError("moto's server did not start")
