"""Reads the images that a request names by URI, within limits."""

import http.client
import socket
import ssl
import threading
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

from raydetect.errors import MemberError, StorageError
from raydetect.gateway.allowed_uris import WEB, resolved
from raydetect.storage import Storage

UNREADABLE = "unreadable"


@dataclass(frozen=True, slots=True)
class Fetcher:
    """Reads allowed URIs; one that cannot be read has a status and says nothing of the storage behind it.

    Attributes:
        storage: of URIs that are no web addresses.
        max_bytes: of one image.
        seconds: for one image of a web address, from the connection to its last byte. Other storages have limits of
            their own for each request.
    """

    storage: Storage
    max_bytes: int
    seconds: float

    def read(self, uri: str) -> bytes:
        """The bytes of one image.

        Raises:
            MemberError: unreadable or too_many_bytes.
            NotAllowed: a web address that leads to an address which is refused.
        """
        if uri.partition("://")[0] in WEB:
            return self._read_web(uri)
        try:
            found = self.storage.info(uri)
            if found is None:
                raise MemberError(UNREADABLE, "no file is there. Check the URI.")
            if found.kind != "file":
                raise MemberError(UNREADABLE, "it is no file. Name one.")
            self._refuse_large(found.size_bytes)
            return self.storage.read(uri)
        except StorageError:
            raise MemberError(UNREADABLE, "it cannot be read. Check the URI and who may read it.") from None

    def _read_web(self, uri: str) -> bytes:
        """Connects to an address that was checked, so that no second lookup can lead elsewhere; follows nothing."""
        parts = urlsplit(uri)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        address = resolved(str(parts.hostname), port)[0]
        connection = http.client.HTTPConnection(address, port, timeout=self.seconds)
        with _Deadline(self.seconds) as deadline:
            try:
                connection.connect()
                deadline.watch(connection.sock)
                if parts.scheme == "https":
                    connection.sock = _secured(connection.sock, str(parts.hostname), deadline)
                connection.request("GET", parts.path or "/", headers={"Host": parts.netloc, "Connection": "close"})
                return self._body(connection.getresponse(), deadline)
            except (OSError, http.client.HTTPException):
                if deadline.passed:
                    raise MemberError(UNREADABLE, f"its server took more than {self.seconds:g} s. Try again.") from None
                raise MemberError(UNREADABLE, "its server does not answer as it should. Try again.") from None
            finally:
                connection.close()

    def _body(self, response: http.client.HTTPResponse, deadline: "_Deadline") -> bytes:
        with response:
            if response.status != http.client.OK:
                raise MemberError(UNREADABLE, f"its server answered {response.status}. Redirects are not followed.")
            data = response.read(self.max_bytes + 1)
            if deadline.passed:
                raise TimeoutError
            self._refuse_large(len(data))
            if response.length:
                raise MemberError(UNREADABLE, "its server sent less than it announced. Try again.")
            return data

    def _refuse_large(self, size_bytes: int) -> None:
        if size_bytes > self.max_bytes:
            raise MemberError("too_many_bytes", f"more than {self.max_bytes:,} bytes, which this server allows.")


class _Deadline:
    """Ends a connection after some seconds, however slowly bytes come; timeouts of sockets count from the last byte."""

    def __init__(self, seconds: float) -> None:
        """Begins with the block."""
        self.passed = False
        self._socket: socket.socket | None = None
        self._timer = threading.Timer(seconds, self._pass)
        self._timer.daemon = True

    def __enter__(self) -> "_Deadline":
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def watch(self, found: socket.socket) -> None:
        """The connection.

        Raises:
            TimeoutError: the seconds have passed.
        """
        self._socket = found
        if self.passed:
            raise TimeoutError

    def _pass(self) -> None:
        self.passed = True
        if self._socket is not None:
            with suppress(OSError):  # it has ended by itself
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # that of TLS would say goodbye first


def _secured(plain: socket.socket, host: str, deadline: _Deadline) -> ssl.SSLSocket:
    context = ssl.create_default_context()
    made = context.wrap_socket(plain, server_hostname=host, do_handshake_on_connect=False)
    deadline.watch(made)
    made.do_handshake()
    return made
