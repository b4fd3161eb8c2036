"""Reads images by URI for a request, within limits."""

import http.client
import socket
import ssl
import threading
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from raydetect.errors import MemberError, StorageError
from raydetect.gateway.allowed_uris import WEB, resolved
from raydetect.storage import Storage

UNREADABLE = "unreadable"
PATH_LETTERS = "/!$&'()*+,;=:@~"  # of RFC 3986, besides letters and digits


@dataclass(frozen=True, slots=True)
class Fetcher:
    """Reads allowed URIs; errors reveal nothing about the storage.

    Attributes:
        storage: for URIs other than http(s) URLs.
        max_bytes: limit per image.
        seconds: limit per http(s) image, from connecting to the last byte. Other storages have their own timeouts per
            request.
    """

    storage: Storage
    max_bytes: int
    seconds: float

    def read(self, uri: str) -> bytes:
        """Returns the bytes of one image.

        Raises:
            MemberError: unreadable or too_many_bytes.
            NotAllowed: a URL whose host resolves to a refused address.
        """
        if uri.partition("://")[0] in WEB:
            return self._read_web(uri)
        try:
            info = self.storage.info(uri)
            if info is None:
                raise MemberError(UNREADABLE, "no such file. Check the URI.")
            if info.kind != "file":
                raise MemberError(UNREADABLE, "it is not a file. Name one.")
            self._refuse_large(info.size_bytes)
            return self.storage.read(uri)
        except StorageError:
            raise MemberError(UNREADABLE, "it cannot be read. Check the URI and its permissions.") from None

    def _read_web(self, uri: str) -> bytes:
        """Connects to the checked address, so that a second DNS lookup cannot change it; follows no redirect."""
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
                headers = {"Host": parts.netloc, "Connection": "close"}
                connection.request("GET", quote(parts.path, PATH_LETTERS) or "/", headers=headers)
                return self._body(connection.getresponse(), deadline)
            except (OSError, http.client.HTTPException):
                if deadline.passed:
                    raise MemberError(UNREADABLE, f"its server took more than {self.seconds:g} s. Try again.") from None
                raise MemberError(UNREADABLE, "its server sent an invalid response. Try again.") from None
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
    """Ends a connection after a total time; socket timeouts restart with every byte."""

    def __init__(self, seconds: float) -> None:
        """Creates a timer that starts when the block is entered."""
        self.passed = False
        self._socket: socket.socket | None = None
        self._timer = threading.Timer(seconds, self._pass)
        self._timer.daemon = True

    def __enter__(self) -> "_Deadline":
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def watch(self, connection: socket.socket) -> None:
        """Sets the socket to shut down.

        Raises:
            TimeoutError: the deadline has passed.
        """
        self._socket = connection
        if self.passed:
            raise TimeoutError

    def _pass(self) -> None:
        self.passed = True
        if self._socket is not None:
            with suppress(OSError):  # already closed
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # TLS would send close_notify first


def _secured(plain: socket.socket, host: str, deadline: _Deadline) -> ssl.SSLSocket:
    context = ssl.create_default_context()
    secured = context.wrap_socket(plain, server_hostname=host, do_handshake_on_connect=False)
    deadline.watch(secured)
    secured.do_handshake()
    return secured
