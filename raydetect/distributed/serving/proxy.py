"""Applies the connection limits of `--local` to the proxies of Ray Serve.

Serve starts uvicorn without limits on request headers, and has no setting for them. Before a proxy listens, Serve calls
the function named by the variable CALLBACK, which `raydetect serve` sets for a local Ray and the image of `cluster/`
sets for nodes.
"""

from typing import Any

from uvicorn.config import HTTP_PROTOCOLS

from raydetect.gateway.http.connections import BoundedProtocol

CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
BOUNDED = "raydetect.distributed.serving.proxy.bound_connections"


def bound_connections() -> list[Any]:
    """Makes uvicorn use `BoundedProtocol` in this process; returns no middleware."""
    HTTP_PROTOCOLS["auto"] = f"{BoundedProtocol.__module__}:{BoundedProtocol.__qualname__}"
    return []
