"""The only package that imports Ray."""

import os

# Ray reads this on import. A thread that calls Ray after the session has ended must not start a new cluster.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
