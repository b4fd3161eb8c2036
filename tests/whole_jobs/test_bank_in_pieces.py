"""Results are the same when the memory bank is sharded over actors, even if one of them is killed."""

import os
import signal
from pathlib import Path

from tests.whole_jobs.conftest import Line
from tests.whole_jobs.runs import processes_of, wait_until
from tests.whole_jobs.test_same_rows import begin, same_as_truth

SHARDED = {"num_workers": 2, "cpus_per_worker": 1, "bank_shards": 2}


def test_a_sharded_bank_gives_the_same_rows_even_if_a_bank_actor_is_killed(
    line: Line, truth: str, cluster: str, tmp_path: Path
) -> None:
    running = begin(line, "holder", tmp_path, "--address", cluster, resources=SHARDED)
    victims = processes_of(b"BankActor", os.getpid())
    assert len(victims) == 2
    os.kill(victims[0], signal.SIGKILL)
    wait_until(lambda: victims[0] not in processes_of(b"BankActor", os.getpid()), 30, "the end of the bank actor")
    assert running.wait() == 0, running.text()
    same_as_truth(line, "holder", truth)
