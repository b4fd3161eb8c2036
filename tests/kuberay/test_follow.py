"""What following a RayJob takes from Ray's words."""

import inspect

from ray.dashboard.modules.job import job_supervisor

from raydetect.kuberay.follow import CODE


def test_this_ray_says_the_exit_code_in_the_words_that_are_searched() -> None:
    source = inspect.getsource(job_supervisor)
    assert source.count("failed with exit code {return_code}") == 2
    for code in (0, 3, -9):
        found = CODE.search(f"Job entrypoint command failed with exit code {code}, last available logs")
        assert found and int(found.group(1)) == code
