"""An S3 server on loopback, and a proxy that delays the first byte of every answer, as distant stores do."""

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3

KEY = {"key": "k", "secret": "s"}
_servers: "list[subprocess.Popen[str]]" = []


@contextmanager
def s3_server() -> Iterator[int]:
    """Runs an S3 server in a process of its own; yields its port."""
    code = (
        "from moto.server import ThreadedMotoServer as Server\n"
        "import sys\n"
        "server = Server(ip_address='127.0.0.1', port=0, verbose=False)\n"
        "server.start()\n"
        "print(server.get_host_and_port()[1], flush=True)\n"
        "sys.stdin.read()\n"
    )
    with _printing_port([sys.executable, "-c", code]) as port:
        yield port


def cpu_seconds() -> float:
    """CPU time that the servers started here have used so far."""
    ticks = 0
    for process in _servers:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # of user and system
    return ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def _printing_port(command: list[str]) -> Iterator[int]:
    """Runs a server that prints its port, and ends it afterwards."""
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    _servers.append(process)
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline())
    finally:
        _servers.remove(process)
        process.terminate()
        process.wait(10)


def client(port: int) -> "boto3.client":  # type: ignore[valid-type]
    """A client of the server."""
    return boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        aws_access_key_id=KEY["key"],
        aws_secret_access_key=KEY["secret"],
        region_name="us-east-1",
    )


@contextmanager
def proxy(port: int, delay_seconds: float) -> Iterator[int]:
    """Forwards connections to `port`; the first byte of every answer comes `delay_seconds` later. Yields its port."""
    ready: list[tuple[asyncio.AbstractEventLoop, int]] = []
    started = threading.Event()

    async def serve() -> None:
        server = await asyncio.start_server(lambda r, w: _forward(r, w, port, delay_seconds), "127.0.0.1", 0)
        ready.append((asyncio.get_running_loop(), server.sockets[0].getsockname()[1]))
        started.set()
        with contextlib.suppress(asyncio.CancelledError):
            await server.serve_forever()

    def run() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is stopped while it serves
            asyncio.run(serve())

    threading.Thread(target=run, daemon=True).start()
    started.wait()
    loop, number = ready[0]
    try:
        yield number
    finally:
        loop.call_soon_threadsafe(loop.stop)


async def _forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int, delay_seconds: float) -> None:
    upstream, to_upstream = await asyncio.open_connection("127.0.0.1", port)
    asked_at = [0.0]  # 0 = the answer to the last request has begun

    async def ask() -> None:
        while data := await reader.read(1 << 16):
            asked_at[0] = time.monotonic()
            to_upstream.write(data)
            await to_upstream.drain()
        to_upstream.close()

    async def answer() -> None:
        while data := await upstream.read(1 << 18):
            if asked_at[0]:
                await asyncio.sleep(max(0.0, asked_at[0] + delay_seconds - time.monotonic()))
                asked_at[0] = 0.0
            writer.write(data)
            await writer.drain()
        writer.close()

    with contextlib.suppress(ConnectionError):
        await asyncio.gather(ask(), answer())


def main(delay_ms: int, port: int) -> None:
    """Runs the proxy until standard input ends; prints its port."""
    with proxy(port, delay_ms / 1000) as number:
        print(number, flush=True)
        sys.stdin.read()
    os._exit(0)


@contextmanager
def proxy_process(port: int, delay_ms: int) -> Iterator[int]:
    """The proxy in a process of its own; yields its port."""
    with _printing_port([sys.executable, "-m", "jobs.bench.slow_store", str(delay_ms), str(port)]) as proxied:
        yield proxied


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
