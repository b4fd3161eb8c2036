"""Connections of clients to the proxies of Ray Serve are bounded as those of `--local` are.

Serve starts uvicorn with a protocol that takes heads of any size for any time, and has no setting for it. It calls
what the variable CALLBACK names in each proxy before that listens, which `raydetect serve` sets for a local Ray, and
the image of `cluster/` for nodes.
"""

from typing import Any

from uvicorn.config import HTTP_PROTOCOLS

from raydetect.gateway.http.connections import BoundedProtocol

CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
BOUNDED = "raydetect.distributed.serving.proxy.bound_connections"


def bound_connections() -> list[Any]:
    """Has uvicorn use `gateway.wire.BoundedProtocol` in this process from now on; adds no middleware."""
    HTTP_PROTOCOLS["auto"] = f"{BoundedProtocol.__module__}:{BoundedProtocol.__qualname__}"
    return []
