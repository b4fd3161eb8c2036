"""Restricts the replicas of a local Ray to the loopback interface.

Each Serve replica opens a gRPC port on all interfaces, without a token, and unpickles whatever it receives
(`ray.serve._private.replica`, for calls between deployments). `session` sets an environment variable, inherited by
replicas, that keeps all other processes of a local Ray on loopback; this module does the same for replicas. On a
cluster with token authentication, Serve requires the token on that port.
"""

import os
from typing import Any

from ray._private.ray_constants import ENABLE_RAY_CLUSTERS_ENV_VAR
from ray.serve._private import replica

EVERYWHERE, LOOPBACK = "[::]:0", "127.0.0.1:0"
open_port = replica.add_port_to_grpc_server


def listen_on_loopback() -> None:
    """Patches the replica of this process before it opens its port; does nothing on a cluster."""
    if os.environ.get(ENABLE_RAY_CLUSTERS_ENV_VAR) == "0":
        replica.add_port_to_grpc_server = _open_on_loopback


def _open_on_loopback(server: Any, address: str) -> Any:
    return open_port(server, LOOPBACK if address == EVERYWHERE else address)
