"""Which URIs a client may use: those below the listed prefixes, once `..`, links and percent signs are resolved."""

import ipaddress
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from raydetect.errors import RaydetectError, SpecError
from raydetect.storage import normalise_uri

WEB = ("http", "https")


class NotAllowed(RaydetectError):
    """A URI outside the allowed prefixes; the message shows the URI and nothing about the server."""


class Malformed(NotAllowed):
    """Text that is not a URI at all."""


@dataclass(frozen=True, slots=True)
class Prefixes:
    """Normalised prefixes, each with a trailing slash."""

    known: tuple[str, ...]

    @classmethod
    def of(cls, uris: Iterable[str]) -> "Prefixes":
        """Normalises the prefixes of a job file.

        Raises:
            SpecError: one is not a URI.
        """
        try:
            return cls(tuple(_plain(uri) + "/" for uri in uris))
        except Malformed as error:
            raise SpecError(f"allow: a prefix {error}") from None

    def check(self, uri: str, what: str) -> str:
        """Returns the normalised URI.

        Args:
            uri: as the client sent it.
            what: its key in the request, for messages.

        Raises:
            NotAllowed: it is not below a prefix, or may resolve to a location that is not.
            Malformed: it is no URI, such as one whose port is not a number.
        """
        try:
            plain = _plain(uri)
        except Malformed as error:
            raise Malformed(f"{what}: {uri[:200]!r} {error}") from None
        except SpecError:
            raise NotAllowed(f"{what}: {uri[:200]!r} is not a URI that this server can read.") from None
        if not any((plain + "/").startswith(prefix) for prefix in self.known):
            raise NotAllowed(f"{what}: {uri[:200]!r} is not below an allowed prefix.")
        return plain

    def holds(self, uri: str) -> bool:
        """Whether a listed file still lies below a prefix once symbolic links are resolved."""
        if not uri.startswith("file://"):
            return True
        real = os.path.realpath(uri.removeprefix("file://"))
        return any(f"file://{real}".startswith(prefix) for prefix in self.known)


def _plain(uri: str) -> str:
    if any(ord(letter) < 32 or letter in "\\\x7f" for letter in uri):
        raise SpecError("a control character or backslash in a URI.")
    normalised = normalise_uri(uri)
    scheme = normalised.partition("://")[0]
    if scheme == "file":
        return "file://" + os.path.realpath(normalised.removeprefix("file://"))
    return _plain_web(normalised) if scheme in WEB else normalised


def _plain_web(uri: str) -> str:
    """An http(s) URL with a lower-case host, without user, query or percent-encoding in its path."""
    try:
        parts = urlsplit(uri)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:  # a bad port, an address in brackets that is none, letters that look like others
        raise Malformed("is not a valid URL. Correct its host or port.") from None
    if not parts.netloc.isascii():
        raise Malformed("is not a valid URL. Write its host in ASCII, such as xn--...")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment or not parts.hostname:
        raise SpecError("a URL with a user, query or fragment.")
    if unquote(parts.path) != parts.path:
        raise SpecError("a URL with percent-encoded characters.")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}{port}{parts.path}".rstrip("/")


def is_allowed_address(address: str) -> bool:
    """Whether the server may connect to an IP address that a client's URI resolved to.

    Refuses link-local addresses (fe80::/10, and 169.254.0.0/16 with the metadata service of clouds), AWS's metadata
    address over IPv6, and multicast and unspecified addresses, also when they are embedded in IPv6.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        ip = ip.ipv4_mapped or ip.sixtofour or ip
    refused = ip.is_link_local or ip.is_multicast or ip.is_unspecified
    return not refused and ip != ipaddress.ip_address("fd00:ec2::254")


def resolved(host: str, port: int) -> list[str]:
    """Resolves a host to addresses that the server may connect to.

    Raises:
        NotAllowed: it has no address, or one that is refused.
    """
    try:
        addresses = {str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        raise NotAllowed(f"the host {host} has no address.") from None
    if not all(is_allowed_address(address) for address in addresses):
        raise NotAllowed(f"the host {host} has an address that this server does not connect to.")
    return sorted(addresses)
