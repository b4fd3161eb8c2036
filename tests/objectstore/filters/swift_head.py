"""A filter for Swift's proxy pipeline: an answer to HEAD ends with its head.

eventlet 0.33 (Debian 12) closes an answer without a length by an empty chunk, also after HEAD, which HTTP forbids
(RFC 9110, sec. 9.3.2) and aiohttp refuses. Behind a TLS proxy nobody sees it. Loaded by the system's own Python.
"""

from collections.abc import Callable, Iterable
from typing import Any


def filter_factory(global_conf: dict[str, str], **local_conf: str) -> Callable[[Any], Any]:
    """Made for paste.deploy."""

    def filtered(app: Any) -> Any:
        def call(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
                named = {name.lower() for name, _ in headers}
                missing = environ["REQUEST_METHOD"] == "HEAD" and "content-length" not in named
                return start_response(status, [*headers, ("Content-Length", "0")] if missing else headers, exc_info)

            return app(environ, start)

        return call

    return filtered
