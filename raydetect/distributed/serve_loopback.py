"""On a local Ray, replicas listen on loopback alone.

Each replica of Serve opens a gRPC port on every interface of the machine, asks for no token there, and unpickles what
comes (`ray.serve._private.replica`, for calls between deployments). `session` keeps all other processes of a local Ray
on loopback by a variable, which replicas inherit; this does the same for them. Where a cluster has a token, Serve asks
for it on that port.
"""

import os
from typing import Any

from ray._private.ray_constants import ENABLE_RAY_CLUSTERS_ENV_VAR
from ray.serve._private import replica

EVERYWHERE, LOOPBACK = "[::]:0", "127.0.0.1:0"
open_port = replica.add_port_to_grpc_server


def listen_on_loopback() -> None:
    """For the replica of this process, before it listens; changes nothing on a cluster."""
    if os.environ.get(ENABLE_RAY_CLUSTERS_ENV_VAR) == "0":
        replica.add_port_to_grpc_server = _open_on_loopback


def _open_on_loopback(server: Any, address: str) -> Any:
    return open_port(server, LOOPBACK if address == EVERYWHERE else address)
