"""The only room that imports Ray."""

import os

# Read when Ray is imported: a thread that still asks after a session's end must not start another Ray.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
