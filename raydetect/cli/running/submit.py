"""`raydetect submit`: a job on a cluster, by Ray Jobs or as a RayJob of KubeRay."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from raydetect.cli.options import BAD_JOB, INTERRUPTED, errors, fail, job_file, job_values, overrides, parse
from raydetect.errors import SpecError

if TYPE_CHECKING:
    from raydetect.config import JobSpec
    from raydetect.kuberay.api import Api

ON_KUBERAY = (
    click.option("--kuberay", is_flag=True, help="Create a RayJob, on a cluster of its own, by the Kubernetes API."),
    click.option("--namespace", "-n", help="Namespace (default: the one of the kubeconfig's context)."),
    click.option("--context", help="Context of the kubeconfig (default: its current one)."),
    click.option("--name", help="Name of the RayJob (default: raydetect- and the name of the job file)."),
    click.option("--image", help="Image of all nodes."),
    click.option("--workers", type=click.IntRange(min=1), help="Worker pods (default: as many as the job needs)."),
    click.option("--gpus", type=click.IntRange(min=0), help="GPUs of a worker pod (default: the template's)."),
    click.option("--token-secret", help="Secret with the cluster's token (default: raydetect-token)."),
    click.option("--storage-secret", help="Secret with environment variables for the storage, which must exist."),
    click.option("--pull-secret", help="Secret for the registry of the image."),
    click.option(
        "--template", type=click.Path(dir_okay=False, path_type=Path), help="A RayJob to start from, for all else."
    ),
)


def on_kuberay(command: Any) -> Any:
    """Adds the options of `--kuberay`."""
    for option in reversed(ON_KUBERAY):
        command = option(command)
    return command


@click.command()
@job_file
@overrides
@click.option("--address", help="Ray dashboard, http://HOST:8265.")
@on_kuberay
@click.option("--no-wait", is_flag=True, help="Return as soon as the job is accepted.")
def submit(
    job: Path, overrides: tuple[str, ...], address: str | None, kuberay: bool, no_wait: bool, **stated: Any
) -> None:
    """Submit a job file to a cluster, follow its log and exit with its code.

    Either to a running cluster with --address, by Ray Jobs, or with --kuberay as a RayJob, for which KubeRay starts a
    cluster and removes it afterwards.
    """
    with errors(BAD_JOB):
        if kuberay == (address is not None):
            raise SpecError("--address, --kuberay: state one: a running cluster, or a cluster for this job.")
        needless = [name for name, value in stated.items() if value is not None and not kuberay]
        if needless:
            raise SpecError(f"--{needless[0].replace('_', '-')}: works with --kuberay only. Leave it out.")
        values = job_values(job, overrides)
        spec = parse(values, job)
    if address is not None:
        _by_ray_jobs(address, values, no_wait)
    else:
        _as_rayjob(job, spec, values, no_wait, stated)


def _by_ray_jobs(address: str, values: dict[str, Any], no_wait: bool) -> None:
    with errors(BAD_JOB):
        from raydetect.distributed import submit as jobs
    with errors():
        client, name = jobs.submit(address, values)
        click.echo(f"Submitted {name} to {address}.", err=True)
        if no_wait:
            click.echo(name)
            return
        code = jobs.follow(client, name, lambda text: click.echo(text, nl=False))
    _end(name, code)


def _as_rayjob(job: Path, spec: "JobSpec", values: dict[str, Any], no_wait: bool, stated: dict[str, Any]) -> None:
    with errors(BAD_JOB):
        from raydetect.kuberay import resources
        from raydetect.kuberay.api import Api

        given = {name: stated.pop(name) for name in ("context", "namespace", "name", "template")}
        if given["template"] is None and not stated["image"]:
            raise SpecError("--image: name the image of the nodes, built from cluster/Dockerfile or Dockerfile.gpu.")
        name = given["name"] or resources.name_of(job, spec.kind)
        resources.check_name(name)
        template = resources.read_template(given["template"])
        rayjob, config = resources.build(name, spec, values, template, resources.Overrides(**stated))
        api = Api(given["context"], given["namespace"])
    with errors():
        api.create(rayjob, config)
    click.echo(f"Created RayJob {name} in the namespace {api.namespace}.", err=True)
    if no_wait:
        click.echo(name)
        return
    _end(name, _followed(api, name))


def _followed(api: "Api", name: str) -> int:
    from raydetect.kuberay.follow import follow

    with errors():
        try:
            return follow(api, name, click.echo, lambda text: click.echo(text, err=True))
        except KeyboardInterrupt:
            of = f"{name} -n {api.namespace}"
            fail(
                f"Detached; RayJob {name} goes on. Its log: kubectl logs -f job/{of}; its status: kubectl get rayjob "
                f"{of}; to end it: kubectl delete rayjob {of}",
                INTERRUPTED,
            )


def _end(name: str, code: int) -> None:
    click.echo(f"{name} ended with exit code {code}.", err=True)
    sys.exit(code)
