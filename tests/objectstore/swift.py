"""OpenStack Swift with its S3 API on loopback: one replica on one folder, its own memcached, ended by process id.

Its defaults are for many disks and many machines. With one of each, a disk that is 99 % full (`fallocate_reserve`) or a
server that was slow ten times (`error_suppression_limit`) would make every request fail as "reduce your request rate".
"""

import http.client
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.objectstore import ObjectStore, free_port

PROGRAMS = ("swift-proxy-server", "swift-ring-builder", "memcached")
SERVERS = ("account", "container", "object")
START_SECONDS = 30
DIE_WITH_PARENT = ("setpriv", "--pdeathsig", "TERM")  # also when the tests are killed
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parent / "filters")}
PROXY = """[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
swift_dir = {folder}
log_udp_host = 127.0.0.1
log_udp_port = {log_port}

[pipeline:main]
pipeline = head catch_errors gatekeeper healthcheck cache listing_formats bulk s3api tempauth slo dlo proxy-server

[app:proxy-server]
use = egg:swift#proxy
error_suppression_limit = 1000000
conn_timeout = 10
node_timeout = 60
allow_account_management = true
account_autocreate = true

[filter:head]
paste.filter_factory = swift_head:filter_factory

[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin

[filter:s3api]
use = egg:swift#s3api
location = us-east-1

[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:{memcached}
"""
PLAIN_FILTERS = ("catch_errors", "gatekeeper", "healthcheck", "listing_formats", "bulk", "slo", "dlo")
PROXY += "".join(f"\n[filter:{name}]\nuse = egg:swift#{name}\n" for name in PLAIN_FILTERS)
SERVER = """[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
swift_dir = {folder}
devices = {folder}/devices
mount_check = false
fallocate_reserve = 0
log_udp_host = 127.0.0.1
log_udp_port = {log_port}

[pipeline:main]
pipeline = healthcheck {kind}-server

[filter:healthcheck]
use = egg:swift#healthcheck

[app:{kind}-server]
use = egg:swift#{kind}
"""


def is_installed() -> bool:
    """Whether the Debian packages are there."""
    return all(shutil.which(program) for program in PROGRAMS)


@contextmanager
def running_swift(folder: Path) -> Iterator[ObjectStore]:
    """Starts Swift below `folder` and ends exactly what it started."""
    ports = {name: free_port() for name in ("proxy", "memcached", *SERVERS)}
    receiver = _receive_log(folder)
    _configure(folder, ports, receiver.getsockname()[1])
    commands = [
        [*DIE_WITH_PARENT, "memcached", "-l", "127.0.0.1", "-p", str(ports["memcached"]), "-u", _user(), "-U", "0"]
    ]
    commands += [
        [*DIE_WITH_PARENT, f"swift-{kind}-server", str(folder / f"{kind}-server.conf")] for kind in (*SERVERS, "proxy")
    ]
    with (folder / "log").open("ab") as log:
        options = {"stdout": log, "stderr": log, "cwd": folder, "env": ENVIRONMENT}
        processes = [subprocess.Popen(command, **options) for command in commands]
    try:
        for name, port in ports.items():
            _wait_until_healthy(name, port, folder)
        yield ObjectStore("swift", f"http://127.0.0.1:{ports['proxy']}", "test:tester", "testing")
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(timeout=20)
        receiver.close()


def _receive_log(folder: Path) -> socket.socket:
    """Swift logs to syslog over UDP only, and fails requests when nobody listens; this writes it to a file."""
    receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver.bind(("127.0.0.1", 0))

    def write() -> None:
        with (folder / "log").open("ab", buffering=0) as log:
            while receiver.fileno() != -1:
                try:
                    log.write(receiver.recv(65536) + b"\n")
                except OSError:  # closed: the servers have ended
                    return

    threading.Thread(target=write, daemon=True).start()
    return receiver


def _user() -> str:
    import getpass

    return getpass.getuser()


def _configure(folder: Path, ports: dict[str, int], log_port: int) -> None:
    (folder / "devices" / "one").mkdir(parents=True)
    settings = {"folder": folder, "user": _user(), "memcached": ports["memcached"], "log_port": log_port}
    (folder / "swift.conf").write_text(
        "[swift-hash]\nswift_hash_path_prefix = raydetect\nswift_hash_path_suffix = raydetect\n"
        "[storage-policy:0]\nname = one\ndefault = yes\n"
    )
    (folder / "proxy-server.conf").write_text(PROXY.format(port=ports["proxy"], **settings))
    for kind in SERVERS:
        (folder / f"{kind}-server.conf").write_text(SERVER.format(kind=kind, port=ports[kind], **settings))
        ring = str(folder / f"{kind}.builder")
        device = f"r1z1-127.0.0.1:{ports[kind]}/one"
        for step_arguments in (["create", "4", "1", "0"], ["add", device, "1"], ["rebalance"]):
            step = ["swift-ring-builder", ring, *step_arguments]
            subprocess.run(step, check=True, capture_output=True, cwd=folder)


def _wait_until_healthy(name: str, port: int, folder: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if _answers(name, port):
            return
        time.sleep(0.1)
    raise RuntimeError(f"the {name} of Swift did not start: {(folder / 'log').read_text()[-2000:]}")


def _answers(name: str, port: int) -> bool:
    try:
        if name == "memcached":
            with socket.create_connection(("127.0.0.1", port), timeout=2):
                return True
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
        connection.request("GET", "/healthcheck")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
