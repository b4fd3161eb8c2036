"""Calls commands in this process, and runs code that is killed at one of its writes."""

import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

from click.testing import CliRunner, Result

from raydetect.cli.main import main

KILL = """
import os, signal, sys
from raydetect.storage import Storage

plain, left = Storage.write, [int(sys.argv[1])]

def counted(self, uri, data):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    plain(self, uri, data)

Storage.write = counted
"""


def call(*arguments: str) -> Result:
    """Calls `raydetect`; only an exit is no failure."""
    result = CliRunner().invoke(main, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def killed_after(writes: int, code: str, *arguments: str) -> int:
    """Runs code in a process that is killed (-9) when it begins its next write; returns how it ended.

    Args:
        writes: how many files it may write.
        code: finds its arguments in `sys.argv[2:]`.
        arguments: of the code.
    """
    command = [sys.executable, "-c", KILL + textwrap.dedent(code), str(writes), *arguments]
    return subprocess.run(command, check=False).returncode


@contextmanager
def interruptible() -> Iterator[None]:
    """Restores SIGINT, which background jobs of a shell and their children ignore.

    A `preexec_fn` would fork this process while Ray's threads are running.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
