"""Whole jobs on Ray account for every file of an archive of all formats, and give the rows of one process.

That Serve does is in test_serve.py, beside its endpoints.
"""

from tests.whole_jobs.conftest import Whole
from tests.whole_jobs.runs import open_heatmaps, run_on


def test_ray_loses_and_doubles_nothing_and_gives_the_rows_of_one_process(whole: Whole, cluster: str) -> None:
    run_on(cluster, "score", whole.job("whole-ray", workers=2))
    assert whole.facts("whole-ray") == whole.expected
    store = whole.line.store
    assert open_heatmaps(store.uri("whole-ray"), store.storage) == whole.expected[1]["statuses"]["ok"]
