"""Every mistake of a job file that can be found without a cluster, in seconds.

Only what a kind of job needs is loaded: the checks of jobs that score are over before torch would have started.
"""

from raydetect.check.places import Check
from raydetect.errors import RaydetectError
from raydetect.spec import AuditSpec, CalibrateSpec, EvaluateSpec, FitSpec, JobSpec, ScoreSpec, ServeSpec


def find_problems(spec: JobSpec) -> list[str]:
    """One sentence for each mistake; empty when the job can run."""
    found = [sentence for check in _checks(spec) if (sentence := _sentence(check))]
    if not found and isinstance(spec, ScoreSpec):
        from raydetect.plan import plan_score

        found = [sentence for sentence in [_sentence(lambda: plan_score(spec))] if sentence]
    return list(dict.fromkeys(found))


def _checks(spec: JobSpec) -> list[Check]:
    if isinstance(spec, FitSpec):
        from raydetect.check.fit import fit_checks

        return fit_checks(spec)
    if isinstance(spec, EvaluateSpec | CalibrateSpec):
        from raydetect.check import judge

        return judge.evaluate_checks(spec) if isinstance(spec, EvaluateSpec) else judge.calibrate_checks(spec)
    from raydetect.check import score

    if isinstance(spec, ServeSpec):
        return score.serve_checks(spec)
    return score.score_checks(spec) + (score.audit_checks(spec) if isinstance(spec, AuditSpec) else [])


def _sentence(check: Check) -> str | None:
    try:
        check()
    except RaydetectError as error:
        return str(error)
    return None
