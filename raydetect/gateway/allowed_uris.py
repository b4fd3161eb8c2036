"""Which URIs a client may name: those below listed prefixes, after everything that could climb is resolved."""

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
    """A URI outside of what the server lists; the message names the URI and nothing of the server."""


@dataclass(frozen=True, slots=True)
class Prefixes:
    """Normalised prefixes, each with a slash at its end."""

    known: tuple[str, ...]

    @classmethod
    def of(cls, uris: Iterable[str]) -> "Prefixes":
        """From the words of a job file.

        Raises:
            SpecError: one is no URI.
        """
        return cls(tuple(_plain(uri) + "/" for uri in uris))

    def check(self, uri: str, what: str) -> str:
        """The normalised URI.

        Args:
            uri: as a client wrote it.
            what: the key it stands under, for messages.

        Raises:
            NotAllowed: it is not below a prefix, or could mean a place that is not.
        """
        try:
            plain = _plain(uri)
        except SpecError:
            raise NotAllowed(f"{what}: {uri[:200]!r} is no URI that this server reads.") from None
        if not any((plain + "/").startswith(prefix) for prefix in self.known):
            raise NotAllowed(f"{what}: {uri[:200]!r} is not below a prefix that this server allows.")
        return plain

    def holds(self, uri: str) -> bool:
        """Whether a file that was listed below a prefix lies below one, wherever links on the way to it lead."""
        if not uri.startswith("file://"):
            return True
        real = os.path.realpath(uri.removeprefix("file://"))
        return any(f"file://{real}".startswith(prefix) for prefix in self.known)


def _plain(uri: str) -> str:
    if any(ord(letter) < 32 or letter in "\\\x7f" for letter in uri):
        raise SpecError("a control character or backslash in a URI.")
    normal = normalise_uri(uri)
    scheme = normal.partition("://")[0]
    if scheme == "file":
        return "file://" + os.path.realpath(normal.removeprefix("file://"))
    return _plain_web(normal) if scheme in WEB else normal


def _plain_web(uri: str) -> str:
    """A web address with its host in small letters, without user, query or anything percent-encoded in its path."""
    parts = urlsplit(uri)
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment or not parts.hostname:
        raise SpecError("a web address with a user, query or fragment.")
    if unquote(parts.path) != parts.path:
        raise SpecError("a web address with percent-encoded letters.")
    port = f":{parts.port}" if parts.port else ""
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}{port}{parts.path}".rstrip("/")


def is_public_enough(address: str) -> bool:
    """Whether a server may open a connection to an IP address that a client's URI led to.

    Link-local ones (169.254.0.0/16 with the metadata service of clouds, fe80::/10), the metadata address of AWS over
    IPv6, multicast and unspecified ones are refused, also when they are wrapped into IPv6.
    """
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        found = found.ipv4_mapped or found.sixtofour or found
    refused = found.is_link_local or found.is_multicast or found.is_unspecified
    return not refused and found != ipaddress.ip_address("fd00:ec2::254")


def resolved(host: str, port: int) -> list[str]:
    """Addresses of a host that may be connected to.

    Raises:
        NotAllowed: it has one that may not, or none.
    """
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except OSError:
        raise NotAllowed(f"the host {host} has no address.") from None
    if not all(is_public_enough(address) for address in found):
        raise NotAllowed(f"the host {host} has an address that this server does not connect to.")
    return sorted(found)
