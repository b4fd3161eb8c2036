"""Reads the images that a request names by URI, within limits."""

import http.client
import ssl
from dataclasses import dataclass
from urllib.parse import urlsplit

from raydetect.errors import MemberError, StorageError
from raydetect.gateway.allow import WEB, resolved
from raydetect.storage import Storage

SECONDS = 10.0
UNREADABLE = "unreadable"


@dataclass(frozen=True, slots=True)
class Fetcher:
    """Reads allowed URIs; one that cannot be read has a status and says nothing of the storage behind it."""

    storage: Storage
    max_bytes: int

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
            self._refuse_large(found.size_bytes)
            return self.storage.read(uri)
        except StorageError:
            raise MemberError(UNREADABLE, "it cannot be read. Check the URI and who may read it.") from None

    def _read_web(self, uri: str) -> bytes:
        """Connects to an address that was checked, so that no second lookup can lead elsewhere; follows nothing."""
        parts = urlsplit(uri)
        secure = parts.scheme == "https"
        port = parts.port or (443 if secure else 80)
        address = resolved(str(parts.hostname), port)[0]
        connection = http.client.HTTPConnection(address, port, timeout=SECONDS)
        try:
            connection.connect()
            if secure:
                context = ssl.create_default_context()
                connection.sock = context.wrap_socket(connection.sock, server_hostname=parts.hostname)
            connection.request("GET", parts.path or "/", headers={"Host": parts.netloc, "Connection": "close"})
            response = connection.getresponse()
            if response.status != http.client.OK:
                raise MemberError(UNREADABLE, f"its server answered {response.status}. Redirects are not followed.")
            data = response.read(self.max_bytes + 1)
            self._refuse_large(len(data))
            if response.length:
                raise MemberError(UNREADABLE, "its server sent less than it announced. Try again.")
            return data
        except (OSError, http.client.HTTPException):
            raise MemberError(UNREADABLE, "its server does not answer as it should. Try again.") from None
        finally:
            connection.close()

    def _refuse_large(self, size_bytes: int) -> None:
        if size_bytes > self.max_bytes:
            raise MemberError("too_many_bytes", f"more than {self.max_bytes:,} bytes, which this server allows.")
