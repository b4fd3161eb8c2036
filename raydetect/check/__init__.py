"""Finds every mistake in a job file that can be found without a cluster, in seconds.

Each kind of job imports only what it needs: the checks of scoring jobs finish in less time than importing torch takes.
"""

from raydetect.check.locations import Check
from raydetect.config import AuditSpec, CalibrateSpec, EvaluateSpec, FitSpec, JobSpec, ScoreSpec, ServeSpec
from raydetect.errors import RaydetectError, is_outage


def find_problems(spec: JobSpec) -> list[str]:
    """Returns one sentence for each mistake; empty if the job can run.

    Raises:
        StorageError: a storage failed and nothing else is wrong, so the job may be correct.
    """
    found = [error for check in _checks(spec) if (error := _error(check))]
    if not found and isinstance(spec, ScoreSpec):
        from raydetect.planning.plan import plan_score

        found = [error for error in [_error(lambda: plan_score(spec))] if error]
    if found and all(is_outage(error) for error in found):
        raise found[0]
    return list(dict.fromkeys(str(error) for error in found))


def _checks(spec: JobSpec) -> list[Check]:
    if isinstance(spec, FitSpec):
        from raydetect.check.fit import fit_checks

        return fit_checks(spec)
    if isinstance(spec, EvaluateSpec | CalibrateSpec):
        from raydetect.check import evaluate

        return evaluate.evaluate_checks(spec) if isinstance(spec, EvaluateSpec) else evaluate.calibrate_checks(spec)
    from raydetect.check import score

    if isinstance(spec, ServeSpec):
        return score.serve_checks(spec)
    return score.score_checks(spec) + (score.audit_checks(spec) if isinstance(spec, AuditSpec) else [])


def _error(check: Check) -> RaydetectError | None:
    try:
        check()
    except RaydetectError as error:
        return error
    return None
