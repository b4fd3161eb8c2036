"""Errors on their way through Ray: every deliberate one arrives with its class, its message and its attributes."""

import importlib
import json
import pkgutil
import traceback
from collections.abc import Callable

import pytest
from ray import cloudpickle, exceptions
from ray.data.exceptions import UserCodeException
from ray.exceptions import ActorDiedError, RayError, RayTaskError
from ray.train import TrainingFailedError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

import raydetect
from raydetect.distributed.ray_errors import ClusterError, deliberate, translate, translated
from raydetect.errors import (
    ArtifactError,
    MemberError,
    MissingError,
    RaydetectError,
    SpecError,
    StorageError,
    UnreadableError,
    error_of,
    error_text,
)
from raydetect.python_api.inputs import BadImagesError

MESSAGE = "s3://b/a.tar: was replaced. Start the job again."
for found in pkgutil.walk_packages(raydetect.__path__, "raydetect."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)


def kinds_below(kind: type[RaydetectError]) -> list[type[RaydetectError]]:
    below = [inner for sub in kind.__subclasses__() for inner in kinds_below(sub)]
    return [kind, *(one for one in below if one.__module__.startswith("raydetect."))]


KINDS = {kind.__name__: kind for kind in kinds_below(RaydetectError) if not issubclass(kind, RayTaskError)}


def made(kind: type[RaydetectError]) -> RaydetectError:
    if issubclass(kind, BadImagesError):
        return kind([(0, "k", MESSAGE)], 2)
    if issubclass(kind, MemberError):
        return kind("corrupt", MESSAGE)
    return kind(MESSAGE, True) if issubclass(kind, UnreadableError) else kind(MESSAGE)


def raised(error: Exception, by: Exception | None = None) -> tuple[Exception, str]:
    """The error as it was raised, and its traceback in Ray's way."""
    try:
        if by is not None:
            raise error from by
        raise error
    except Exception as caught:
        return caught, traceback.format_exc()


def of_task(error: Exception) -> Exception:
    caught, text = raised(error)
    return RayTaskError("f", text, caught, "ray::f", 1, "127.0.0.1").as_instanceof_cause()


def of_user_code(error: Exception) -> Exception:
    return of_task(raised(UserCodeException("UDF failed"), error)[0])


def of_actor_start(error: Exception) -> Exception:
    caught, text = raised(error)
    return ActorDiedError(RayTaskError("A.__init__", text, caught, "ray::A", 1, "127.0.0.1"))


def of_training(error: Exception) -> Exception:
    return WorkerGroupError("rank 1", {1: UserExceptionWithTraceback(error, raised(error)[1])})


WAYS: list[Callable[[Exception], Exception]] = [
    lambda error: error,
    of_task,
    of_user_code,
    of_actor_start,
    of_training,
    lambda error: of_training(of_task(error)),
    lambda error: ControllerError(of_task(error)),
    lambda error: ExceptionGroup("several", [ValueError("other"), of_task(error)]),
    lambda error: RuntimeError(f"Deploying application raydetect failed: {raised(error)[1]}"),
    lambda error: raised(ValueError("while handling"), of_task(error))[0],
]


@pytest.mark.parametrize("name", sorted(KINDS))
def test_every_error_survives_the_way_to_another_process(name: str) -> None:
    error = made(KINDS[name])
    for again in (cloudpickle.loads(cloudpickle.dumps(error)), error_of(error_text(error))):
        assert type(again) is type(error) and str(again) == str(error) and again.exit_code == error.exit_code
        assert json.dumps(again.__dict__) == json.dumps(error.__dict__)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [SpecError, ArtifactError, StorageError, MissingError, MemberError, ClusterError])
def test_every_wrapping_of_ray_is_taken_off(kind: type[RaydetectError], way: Callable[[Exception], Exception]) -> None:
    error = made(kind)
    wrapped = way(error)
    if isinstance(wrapped, RayError | TrainingFailedError):  # these cross processes
        wrapped = cloudpickle.loads(cloudpickle.dumps(wrapped))
    found = translate(wrapped, "ray://head")
    assert type(found) is kind and str(found) == MESSAGE and found.exit_code == error.exit_code
    with pytest.raises(kind) as caught, translated(None):
        raise wrapped
    assert str(caught.value) == MESSAGE


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (exceptions.OutOfMemoryError("node 1 killed 2 workers\n\nlong advice"), "a node ran out of memory"),
        (ActorDiedError(), "a worker or its node was lost (ActorDiedError). Start the same job again"),
        (exceptions.NodeDiedError("node\nlost"), "a worker or its node was lost"),
        (exceptions.WorkerCrashedError(), "a worker or its node was lost"),
        (of_training(exceptions.OutOfMemoryError("x\ny")), "a node ran out of memory"),
        (of_training(of_task(ZeroDivisionError("by zero"))), "by zero. Check the logs of Ray"),
        (TrainingFailedError("head\n\nValueError: the cause"), "ValueError: the cause. Check the logs of Ray"),
        (ConnectionError("code 401: unauthenticated\nmore"), "refused the connection (authentication)"),
        (RuntimeError(""), "RuntimeError: no message"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_what_is_not_deliberate_is_one_sentence_about_the_cluster(error: Exception, message: str) -> None:
    assert deliberate(error) is None
    said = str(translate(error, None))
    assert said.startswith("the local Ray: ") and message in said and "\n" not in said and len(said) < 500


def test_text_that_only_looks_like_an_error_is_none_of_ours() -> None:
    for text in ("raydetect.errors.Nothing: x", "see raydetect.errors.SpecError: x", "raydetect/errors.py: SpecError"):
        assert deliberate(RuntimeError(text)) is None


def test_no_secret_of_a_uri_comes_back() -> None:
    said = str(translate(OSError("GET http://user:CANARY@h/x?token=CANARY refused"), "http://head?token=CANARY"))
    assert "CANARY" not in said and "refused" in said
