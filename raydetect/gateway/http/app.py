"""The endpoints, as a FastAPI application over a `Backend`."""

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException as StarletteHTTPException

from raydetect import __version__
from raydetect.config import ServeSpec
from raydetect.config.validation import nearest
from raydetect.errors import RaydetectError
from raydetect.gateway.allowed_uris import WEB
from raydetect.gateway.backend import Backend, Busy, Served
from raydetect.gateway.fetch import Fetcher
from raydetect.gateway.http import answers
from raydetect.gateway.http.authorization import Authorization
from raydetect.gateway.http.capacity import ThreadLane
from raydetect.gateway.http.errors import add_refusals
from raydetect.gateway.http.json_bodies import KIND, JsonBodies, kind_of
from raydetect.gateway.http.limits import FORM, LOOPBACK_NAMES, Guard
from raydetect.gateway.http.openapi import SCORE_BODY, describe_bodies, json_body, problems
from raydetect.gateway.http.schemas import (
    DetectorAnswer,
    Detectors,
    NewArtifact,
    NoneScored,
    Problem,
    RunAnswer,
    RunRequest,
    Runs,
    Score,
    ScoreAnswer,
    ScoreRequest,
)
from raydetect.gateway.http.tokens import Scope, Tokens, is_loopback
from raydetect.gateway.runs import archive_runs
from raydetect.gateway.runs.reports import Reports
from raydetect.records import OK
from raydetect.storage import Storage, normalise_uri

log = logging.getLogger("raydetect.gateway")
POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
)
TOO_MANY_FILES = "Too many files"  # start of Starlette's message
BEARER = Depends(HTTPBearer(auto_error=False))  # for the OpenAPI document only: `Authorization` does the check
WEB_THREADS, STORAGE_THREADS, REPORTS_WAITING = 16, 16, 8
PAGE = Path(__file__).with_name("page.html")


def build_app(spec: ServeSpec, tokens: Tokens, backend: Backend) -> Guard:
    """Builds the whole application.

    Args:
        spec: the job file.
        tokens: the accepted tokens and their scopes.
        backend: scores images and runs archives.

    Raises:
        SpecError: a prefix of `allow` is not a URI.
    """
    app = FastAPI(
        title="raydetect",
        version=__version__,
        description="Scores images with fitted anomaly detectors, one at a time or a whole archive.",
        docs_url=None,
        redoc_url=None,
    )
    gate = Authorization(tokens)
    Endpoints(spec, backend).add_routes(app, gate)
    describe_bodies(app)
    add_refusals(app)
    hosts = {*LOOPBACK_NAMES, *(name.lower() for name in spec.hosts)}
    if not is_loopback(spec.host) and not spec.hosts:
        hosts = set()
    return Guard(app, hosts, gate, spec.limits)


class Endpoints:
    """The endpoints."""

    def __init__(self, spec: ServeSpec, backend: Backend) -> None:
        """Normalises the prefixes; reads nothing from storage."""
        self.spec, self.backend = spec, backend
        self.allow = archive_runs.Allowed(spec.allow)
        self.storage = Storage(spec.storage)
        self.ledgers = archive_runs.Ledgers(self.storage)
        self.reports = Reports(self.storage, self.allow.sources)
        self.fetcher = Fetcher(self.storage, spec.limits.max_image_bytes, spec.limits.fetch_seconds)
        self.heatmaps = None if spec.heatmaps is None else normalise_uri(spec.heatmaps)
        self.page = PAGE.read_text()
        self.bodies = JsonBodies(spec.limits)
        self.web = ThreadLane("read images by URL", WEB_THREADS, WEB_THREADS)
        self.stored = ThreadLane("read or write storage", STORAGE_THREADS, spec.limits.max_requests)
        self.reporting = ThreadLane("make reports", 1, REPORTS_WAITING)

    def add_routes(self, app: FastAPI, gate: Authorization) -> None:
        """Adds all endpoints, each with the scope that it requires."""

        def add(scope: Scope | None, path: str, endpoint: Callable[..., Any], *statuses: int, **options: Any) -> None:
            if scope is not None:
                options = {"dependencies": [BEARER], "responses": problems(*statuses), **options}
            app.add_api_route(path, endpoint, **options)
            if scope is not None:
                gate.add(app.router.routes[-1], scope)

        add(None, "/", self.show_page, include_in_schema=False, response_class=HTMLResponse)
        add(None, "/healthz", self.healthz, tags=["health"])
        add(None, "/readyz", self.readyz, tags=["health"], responses={503: {"model": Problem}})
        one, runs = "/v1/detectors/{name}", "/v1/archives"
        add("score", "/v1/detectors", self.detectors, tags=["detectors"])
        add("score", one, self.detector, 404, tags=["detectors"])
        put: dict[str, Any] = {"methods": ["PUT"], "openapi_extra": json_body(NewArtifact)}
        add("admin", one, self.replace, 400, 404, 415, tags=["detectors"], **put)
        add(
            "score",
            f"{one}/score",
            self.score,
            methods=["POST"],
            tags=["scores"],
            response_model=ScoreAnswer,
            responses={**problems(400, 404, 415), 422: {"model": NoneScored | Problem}},
            openapi_extra={"requestBody": SCORE_BODY},
        )
        options: dict[str, Any] = {"tags": ["archives"]}
        add("archive", runs, self.runs, **options)
        post: dict[str, Any] = {"methods": ["POST"], "status_code": 202, "openapi_extra": json_body(RunRequest)}
        add("archive", runs, self.start, 400, 404, 409, 415, **post, **options)
        add("archive", f"{runs}/{{id}}", self.run, 404, **options)
        add("archive", f"{runs}/{{id}}/report", self.report, 404, response_class=HTMLResponse, **options)
        add("archive", f"{runs}/{{id}}", self.cancel, 404, methods=["DELETE"], **options)

    async def show_page(self) -> HTMLResponse:
        """The web page; it loads nothing from other hosts."""
        return HTMLResponse(self.page, headers={"Content-Security-Policy": POLICY})

    async def healthz(self) -> dict[str, str]:
        """Whether the process is alive."""
        return {"status": "ok", "version": __version__}

    async def readyz(self) -> dict[str, str]:
        """Whether a scoring request can be answered now."""
        if not await self.backend.ready():
            raise HTTPException(503, "the detectors are still loading.")
        return {"status": "ready"}

    async def detectors(self) -> Detectors:
        """Every served detector."""
        served = await self.backend.served()
        return Detectors(detectors=[DetectorAnswer(**served[name].facts) for name in sorted(served)])

    async def detector(self, name: str) -> DetectorAnswer:
        """One served detector."""
        return DetectorAnswer(**(await self._served(name)).facts)

    async def replace(self, name: str, request: Request) -> DetectorAnswer:
        """Serves a new artifact version; the old one keeps scoring until the new one is loaded."""
        body = await self.bodies.read(NewArtifact, request)
        await self._served(name)
        artifact = await self.stored.run(lambda: self.allow.artifacts.check(body.artifact, "artifact"))
        replaced = await self.backend.replace(name, artifact)
        return DetectorAnswer(**replaced.facts)

    async def score(self, name: str, request: Request) -> Any:
        """Scores images: uploads as multipart/form-data in parts named `images`, or JSON with URIs.

        A bad image gets a status and an error instead of a score; if no image can be scored, the response is 422.
        """
        served = await self._served(name)
        wanted = await self._wanted(request)
        scores = await self._scores(served, wanted)
        response = ScoreAnswer(detector=name, artifact=served.index.digest, results=scores)
        if not any(one.status == OK for one in scores):
            detail = f"none of {len(scores)} images could be scored; see results."
            return JSONResponse(NoneScored(detail=detail, **response.model_dump()).model_dump(), 422)
        return response

    async def _scores(self, served: Served, wanted: answers.Wanted) -> list[Score]:
        """Entries of the response; a failure here is the server's, not the client's."""
        folder = self.heatmaps if wanted.store else None
        try:
            found = await self.backend.answer(served, wanted.members, [wanted.heatmaps] * len(wanted.members))
            return await self.stored.run(lambda: [answers.score_of(one, folder, self.storage) for one in found])
        except Busy:
            raise
        except RaydetectError as error:
            log.error("%s: %s", served.name, error)
            raise Busy(f"{served.name}: cannot score right now; see the server's log.") from None

    async def _wanted(self, request: Request) -> answers.Wanted:
        kind = kind_of(request)
        if kind == FORM:
            try:
                async with request.form(max_files=self.spec.limits.max_images, max_fields=8) as form:
                    wanted = await answers.uploaded(form, self.spec.limits.max_image_bytes)
            except StarletteHTTPException as error:
                raise self._too_many_files(error) from None
        elif kind == KIND:
            body = await self.bodies.read(ScoreRequest, request)
            self._check_count(len(body.images))
            wanted = await self._named(body, request)
        else:
            raise HTTPException(415, "send multipart/form-data with parts named `images`, or application/json.")
        self._check_count(len(wanted.members))
        if wanted.store and self.heatmaps is None:
            raise HTTPException(
                422, "store_heatmaps: this server has no folder for heatmaps. Set `heatmaps` in its job file."
            )
        return wanted

    async def _named(self, body: ScoreRequest, request: Request) -> answers.Wanted:
        """Reads images by URI, http(s) in a pool of its own, until the request times out."""
        until = time.monotonic() + self.spec.limits.request_seconds
        budget = answers.Budget(request.scope["take"], self.spec.limits.max_body_bytes, until, threading.Event())
        is_web = any(image.uri.partition("://")[0].lower() in WEB for image in body.images)
        work = partial(answers.named, body, self.allow.sources, self.fetcher, budget)
        try:
            if is_web:
                share = WEB_THREADS // 2 if request.scope["several_tokens"] else None
                return await self.web.run(work, request.scope["holder"], share)
            return await self.stored.run(work)
        finally:
            budget.ended.set()

    def _check_count(self, count: int) -> None:
        if count > self.spec.limits.max_images:
            raise HTTPException(413, f"{count} images; this server accepts {self.spec.limits.max_images} per request.")

    def _too_many_files(self, error: StarletteHTTPException) -> StarletteHTTPException:
        """The error of `_check_count` for a form, which Starlette stops reading at too many parts."""
        if not str(error.detail).startswith(TOO_MANY_FILES):
            return error
        return HTTPException(413, f"this server accepts {self.spec.limits.max_images} images per request.")

    async def _served(self, name: str) -> Served:
        served = await self.backend.served()
        if name not in served:
            raise HTTPException(404, f"no detector {name[:100]!r} is served.{nearest(name[:100], list(served))}")
        return served[name]

    async def runs(self) -> Runs:
        """Archive runs since the server started, with progress from their ledgers."""
        known = await self.backend.runs()

        def answers() -> list[RunAnswer | None]:
            return [archive_runs.answer_of(uri, state, self.ledgers) for uri, state in known.items()]

        return Runs(runs=[run for run in await self.stored.run(answers) if run is not None])

    async def start(self, request: Request) -> RunAnswer:
        """Starts scoring an archive; the same request resumes a run that stopped."""
        body = await self.bodies.read(RunRequest, request)
        served = await self._served(body.detector)
        job = await self.stored.run(lambda: archive_runs.job_of(body, served, self.spec, self.allow))
        state = await self.backend.start(job)
        return await self._run_answer(state.uri)

    async def run(self, id: str) -> RunAnswer:
        """The progress of an archive run, from its ledger; also works for runs of another server."""
        return await self._run_answer(await self._uri(id))

    async def report(self, id: str) -> HTMLResponse:
        """The report of an archive run, finished or not: one self-contained HTML page."""
        uri = await self._uri(id)
        await self._run_answer(uri)
        served = await self.backend.served()
        page = await self.reporting.run(lambda: self.reports.page(uri, served))
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})

    async def cancel(self, id: str) -> RunAnswer:
        """Stops an archive run; keeps what is committed."""
        uri = await self._uri(id)
        if not await self.backend.cancel(uri):
            raise HTTPException(404, "no archive run with that id is in progress.")
        return await self._run_answer(uri)

    async def _uri(self, name: str) -> str:
        uri = archive_runs.uri_of(name)
        if uri is None:
            raise HTTPException(404, "no archive run has that id.")
        return await self.stored.run(lambda: self.allow.sinks.check(uri, "id"))

    async def _run_answer(self, uri: str) -> RunAnswer:
        known = (await self.backend.runs()).get(uri)
        found = await self.stored.run(lambda: archive_runs.answer_of(uri, known, self.ledgers))
        if found is None:
            raise HTTPException(404, "no archive run has that id.")
        return found
