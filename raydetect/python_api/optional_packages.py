"""Imports packages that raydetect does not install, when a call needs them."""

import importlib
from typing import Any

from raydetect.errors import RaydetectError


class MissingPackageError(RaydetectError, ImportError):
    """A call needs a package that is not installed."""


def optional(module: str, what: str, command: str) -> Any:
    """The module.

    Args:
        module: its name.
        what: the call that needs it, for the message.
        command: installs it.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingPackageError(f"{what}: {package} cannot be imported ({error}). Run `{command}`.") from None
