"""Object stores for tests: OpenStack Swift with its S3 API, moto's server as a fallback, and a faulty proxy."""

import secrets
import socket
from contextlib import suppress
from dataclasses import dataclass

from raydetect.config import StorageOptions
from raydetect.storage import Storage


@dataclass(frozen=True)
class ObjectStore:
    """One running store and a bucket of its own for a test."""

    kind: str
    endpoint_url: str
    key: str
    secret: str
    bucket: str = ""

    @property
    def options(self) -> StorageOptions:
        """Options that reach it."""
        return StorageOptions(endpoint_url=self.endpoint_url, key=self.key, secret=self.secret, region="us-east-1")

    @property
    def settings(self) -> dict[str, str]:
        """The same for a job file."""
        return {"endpoint_url": self.endpoint_url, "key": self.key, "secret": self.secret, "region": "us-east-1"}

    @property
    def storage(self) -> Storage:
        """Ready to use."""
        return Storage(self.options)

    def uri(self, *parts: str) -> str:
        """`s3://bucket/part/...`."""
        return "/".join([f"s3://{self.bucket}", *parts])


def free_port() -> int:
    """A port nobody listens on, below those that the system gives to connections: it stays free for a moment."""
    while True:
        port = secrets.choice(range(20_000, 32_000))
        with socket.socket() as found, suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port
