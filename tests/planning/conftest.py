"""An archive and an artifact for tests of plans and commits."""

import pytest

from tests.builders.archives import mixed_files, normal_files, pack
from tests.local.test_local import fit


@pytest.fixture
def mixed_shards() -> None:
    """Three shards of 17 images in all, and the artifact that scores them."""
    pack("memory://data/normal", ".tar", normal_files(30), 2)
    pack("memory://data/mixed", ".tar", mixed_files(8, 3), 3)
    fit()
