"""Posts audit summaries to a webhook: to allowed addresses only, signed, with retries, and once for each night.

The signature is HMAC-SHA256 of `<timestamp>.<body>` with the secret, in hex, in the header `X-Raydetect-Signature` as
`t=<timestamp>,v1=<hex>`, so that a receiver can refuse old requests. `X-Raydetect-Night` names the night, so that it
can drop duplicates.
"""

import hashlib
import hmac
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

from raydetect.config import WebhookSpec
from raydetect.errors import RaydetectError, SpecError
from raydetect.gateway.allowed_uris import WEB, NotAllowed, Prefixes, resolved

SECRET, ALLOW = "RAYDETECT_WEBHOOK_SECRET", "RAYDETECT_WEBHOOK_ALLOW"
MIN_SECRET_CHARS = 16
RETRIED = (408, 425, 429)


class WebhookError(RaydetectError):
    """The webhook did not accept the summary; the audit itself is finished and remains."""


@dataclass(frozen=True, slots=True)
class Webhook:
    """A checked target with its secret, which never appears in a message or file."""

    url: str
    spec: WebhookSpec
    _secret: bytes

    def __repr__(self) -> str:
        return f"Webhook({self.place!r})"

    @property
    def place(self) -> str:
        """Scheme and host; the path may be what opens the webhook, so no message and no file holds it either."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc}"

    def send(self, night: str, body: bytes, pause: Callable[[float], None] = time.sleep) -> int:
        """Posts the body, with retries, until it is accepted; returns the HTTP status.

        Args:
            night: name of the night.
            body: JSON.
            pause: sleeps between attempts; called with seconds.

        Raises:
            WebhookError: the webhook refused it or could not be reached.
        """
        problem = ""
        for attempt in range(self.spec.attempts):
            if attempt:
                pause(2.0 ** (attempt - 1))
            started = time.monotonic()
            try:
                status = self._post(night, body)
            except NotAllowed as error:
                raise WebhookError(f"webhook.url: {error} The audit is finished; run it again to retry.") from None
            except (OSError, http.client.HTTPException) as error:
                is_late = time.monotonic() - started >= self.spec.request_seconds
                problem = f"no answer within {self.spec.request_seconds:g} s" if is_late else type(error).__name__
                continue
            if 200 <= status < 300:
                return status
            problem = f"status {status}"
            if status < 500 and status not in RETRIED:
                break
        raise WebhookError(
            f"webhook.url: {self.place} did not accept the summary ({problem} after {attempt + 1} attempts). The audit "
            "is finished; run it again to retry."
        )

    def _post(self, night: str, body: bytes) -> int:
        """Makes one attempt, to the resolved and checked address (no second DNS lookup); follows no redirects."""
        parts = urlsplit(self.url)
        secure = parts.scheme == "https"
        port = parts.port or (443 if secure else 80)
        end = time.monotonic() + self.spec.request_seconds
        address = resolved(str(parts.hostname), port)[0]
        connection = http.client.HTTPConnection(address, port, timeout=max(0.001, end - time.monotonic()))
        try:
            connection.connect()
            if secure:
                context = ssl.create_default_context()
                connection.sock = context.wrap_socket(
                    connection.sock, server_hostname=parts.hostname, do_handshake_on_connect=False
                )
            with _shut_after(connection.sock, end - time.monotonic()):
                if isinstance(connection.sock, ssl.SSLSocket):
                    connection.sock.do_handshake()
                headers = self._headers(parts.netloc, night, body)
                connection.request("POST", parts.path or "/", body=body, headers=headers)
                status = connection.getresponse().status
            if time.monotonic() >= end:  # the connection was shut while headers arrived
                raise TimeoutError
            return status
        finally:
            connection.close()

    def _headers(self, host: str, night: str, body: bytes) -> dict[str, str]:
        timestamp = str(int(time.time()))
        return {
            "Host": host,
            "Content-Type": "application/json",
            "Connection": "close",
            "X-Raydetect-Night": night,
            "X-Raydetect-Signature": f"t={timestamp},v1={signature(self._secret, timestamp, body)}",
        }


@contextmanager
def _shut_after(connected: socket.socket, seconds: float) -> Iterator[None]:
    """Shuts the socket down after a total time, as its own timeout restarts with every received byte."""
    timer = threading.Timer(max(0.0, seconds), _shut, [connected])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _shut(connected: socket.socket) -> None:
    with suppress(OSError):  # already closed
        socket.socket.shutdown(connected, socket.SHUT_RDWR)  # SSLSocket.shutdown would drop its state under a reader


def signature(secret: bytes, moment: str, body: bytes) -> str:
    """HMAC-SHA256 of `<moment>.<body>`, hex."""
    return hmac.new(secret, moment.encode() + b"." + body, hashlib.sha256).hexdigest()


def webhook_of(spec: WebhookSpec | None, environment: Mapping[str, str]) -> Webhook | None:
    """Returns the webhook of a job, None if it has none.

    Args:
        spec: of the job file.
        environment: holds RAYDETECT_WEBHOOK_SECRET, and RAYDETECT_WEBHOOK_ALLOW with URL prefixes separated by spaces.

    Raises:
        SpecError: a variable is missing, the secret is too short, or the URL has no allowed prefix.
    """
    if spec is None:
        return None
    prefixes = environment.get(ALLOW, "").split()
    if not prefixes:
        raise SpecError(f"webhook: {ALLOW} is not set, so no address is allowed. Set it to URL prefixes.")
    secret = environment.get(SECRET, "")
    if len(secret) < MIN_SECRET_CHARS:
        raise SpecError(
            f"webhook: {SECRET} is missing or has fewer than {MIN_SECRET_CHARS} characters. Set a longer one."
        )
    try:
        url = Prefixes.of(prefixes).check(spec.url, "webhook.url")
    except NotAllowed:
        raise SpecError(f"webhook.url: matches no prefix of {ALLOW}. Add one or correct it.") from None
    if urlsplit(url).scheme not in WEB:
        raise SpecError("webhook.url: is not a web address. Write https://...")
    return Webhook(url, spec, secret.encode())
