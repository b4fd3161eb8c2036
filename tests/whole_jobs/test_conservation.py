"""Whole jobs on Ray account for every file of an archive of all formats, and give the same rows as one process.

For Ray Serve see test_serve.py.
"""

from tests.whole_jobs.conftest import Whole
from tests.whole_jobs.runs import open_heatmaps, run_on


def test_ray_gives_the_rows_of_one_process_without_loss_or_duplicates(whole: Whole, cluster: str) -> None:
    run_on(cluster, "score", whole.job("whole-ray", workers=2))
    assert whole.facts("whole-ray") == whole.expected
    store = whole.line.store
    assert open_heatmaps(store.uri("whole-ray"), store.storage) == whole.expected[1]["statuses"]["ok"]
