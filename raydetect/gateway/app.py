"""The endpoints, as a FastAPI application over a desk."""

import asyncio
import logging
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import ValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException

from raydetect import __version__
from raydetect.config import nearest
from raydetect.errors import RaydetectError
from raydetect.gateway import answers, archive_runs
from raydetect.gateway.bodies import (
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
from raydetect.gateway.desk import Busy, Desk, Served
from raydetect.gateway.document import SCORE_BODY, describe_bodies, problems
from raydetect.gateway.fetch import Fetcher
from raydetect.gateway.guard import LOOPBACK_NAMES, Guard
from raydetect.gateway.refusals import add_refusals
from raydetect.gateway.reports import Reports
from raydetect.gateway.tokens import Scope, Tokens, is_loopback
from raydetect.records import OK
from raydetect.spec import ServeSpec
from raydetect.storage import Storage, normalise_uri

log = logging.getLogger("raydetect.gateway")
POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
)
TOO_MANY_FILES = "Too many files"  # Starlette's own words
PAGE = Path(__file__).with_name("page.html")


def build_app(spec: ServeSpec, tokens: Tokens, desk: Desk) -> Guard:
    """The whole application.

    Args:
        spec: the job file.
        tokens: who may do what.
        desk: scores and runs.

    Raises:
        SpecError: a prefix of `allow` is no URI.
    """
    app = FastAPI(
        title="raydetect",
        version=__version__,
        description="Scores images by fitted anomaly detectors, one at a time or a whole archive.",
        docs_url=None,
        redoc_url=None,
    )
    door = Door(spec, tokens, desk)
    door.add_routes(app)
    describe_bodies(app)
    add_refusals(app)
    hosts = {*LOOPBACK_NAMES, *(name.lower() for name in spec.hosts)}
    if not is_loopback(spec.host) and not spec.hosts:
        hosts = set()
    limits = spec.limits
    return Guard(app, hosts, limits.max_body_bytes, limits.max_requests, limits.request_seconds)


class Door:
    """The endpoints."""

    def __init__(self, spec: ServeSpec, tokens: Tokens, desk: Desk) -> None:
        """Normalises prefixes; touches no storage."""
        self.spec, self.tokens, self.desk = spec, tokens, desk
        self.allow = archive_runs.Allowed(spec.allow)
        self.storage = Storage(spec.storage)
        self.ledgers = archive_runs.Ledgers(self.storage)
        self.reports = Reports(self.storage, self.allow.sources)
        self.fetcher = Fetcher(self.storage, spec.limits.max_image_bytes)
        self.heatmaps = None if spec.heatmaps is None else normalise_uri(spec.heatmaps)
        self.page = PAGE.read_text()

    def add_routes(self, app: FastAPI) -> None:
        """Adds all endpoints."""
        score, archive, admin = (self._holder(scope) for scope in ("score", "archive", "admin"))
        plain: dict[str, Any] = {"include_in_schema": False}
        app.add_api_route("/", self.show_page, **plain, response_class=HTMLResponse)
        app.add_api_route("/healthz", self.healthz, tags=["health"])
        app.add_api_route("/readyz", self.readyz, tags=["health"], responses={503: {"model": Problem}})
        app.add_api_route(
            "/v1/detectors", self.detectors, tags=["detectors"], dependencies=[score], responses=problems()
        )
        one = "/v1/detectors/{name}"
        app.add_api_route(one, self.detector, tags=["detectors"], dependencies=[score], responses=problems(404))
        app.add_api_route(
            one, self.replace, methods=["PUT"], tags=["detectors"], dependencies=[admin], responses=problems(400, 404)
        )
        app.add_api_route(
            f"{one}/score",
            self.score,
            methods=["POST"],
            tags=["scores"],
            dependencies=[score],
            response_model=ScoreAnswer,
            responses={**problems(400, 404, 415), 422: {"model": NoneScored | Problem}},
            openapi_extra={"requestBody": SCORE_BODY},
        )
        runs = "/v1/archives"
        words: dict[str, Any] = {"tags": ["archives"], "dependencies": [archive]}
        app.add_api_route(runs, self.runs, **words, responses=problems())
        app.add_api_route(
            runs, self.start, methods=["POST"], status_code=202, **words, responses=problems(400, 404, 409)
        )
        app.add_api_route(f"{runs}/{{id}}", self.run, **words, responses=problems(404))
        app.add_api_route(
            f"{runs}/{{id}}/report", self.report, response_class=HTMLResponse, **words, responses=problems(404)
        )
        app.add_api_route(f"{runs}/{{id}}", self.cancel, methods=["DELETE"], **words, responses=problems(404))

    def _holder(self, scope: Scope) -> Any:
        """A dependency that lets holders of a scope pass."""

        def check(
            given: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
        ) -> None:
            if not self.tokens.known:
                return
            token = self.tokens.holder(f"{given.scheme} {given.credentials}" if given else None)
            if token is None:
                said = "a token is needed: Authorization: Bearer TOKEN."
                raise HTTPException(401, said, {"WWW-Authenticate": "Bearer"})
            if scope not in token.scopes:
                raise HTTPException(403, f"the token of {token.name!r} has not the scope {scope!r}.")

        return Depends(check)

    async def show_page(self) -> HTMLResponse:
        """The page for people; it may load nothing from elsewhere."""
        return HTMLResponse(self.page, headers={"Content-Security-Policy": POLICY})

    async def healthz(self) -> dict[str, str]:
        """The process answers."""
        return {"status": "ok", "version": __version__}

    async def readyz(self) -> dict[str, str]:
        """A request for a score would be answered now."""
        if not await self.desk.ready():
            raise HTTPException(503, "detectors are being loaded.")
        return {"status": "ready"}

    async def detectors(self) -> Detectors:
        """Every served detector."""
        served = await self.desk.served()
        return Detectors(detectors=[DetectorAnswer(**served[name].facts) for name in sorted(served)])

    async def detector(self, name: str) -> DetectorAnswer:
        """One served detector."""
        return DetectorAnswer(**(await self._served(name)).facts)

    async def replace(self, name: str, body: NewArtifact) -> DetectorAnswer:
        """Serves a new artifact version once it is loaded; requests meanwhile are scored by the old one."""
        await self._served(name)
        made = await self.desk.replace(name, self.allow.artifacts.check(body.artifact, "artifact"))
        return DetectorAnswer(**made.facts)

    async def score(self, name: str, request: Request) -> Any:
        """Scores images: uploads as multipart/form-data in parts named `images`, or JSON with URIs.

        A bad image has a status and an error instead of a score; when no image could be scored, the answer is 422.
        """
        served = await self._served(name)
        wanted = await self._wanted(request)
        scores = await self._scores(served, wanted)
        said = ScoreAnswer(detector=name, artifact=served.index.digest, results=scores)
        if not any(one.status == OK for one in scores):
            detail = f"none of {len(scores)} images could be scored; see results."
            return JSONResponse(NoneScored(detail=detail, **said.model_dump()).model_dump(), 422)
        return said

    async def _scores(self, served: Served, wanted: answers.Wanted) -> list[Score]:
        """Entries of the answer; what fails here is the server's matter, not the client's."""
        folder = self.heatmaps if wanted.store else None
        try:
            found = await self.desk.answer(served, wanted.members, [wanted.heatmaps] * len(wanted.members))
            return await asyncio.to_thread(lambda: [answers.score_of(one, folder, self.storage) for one in found])
        except Busy:
            raise
        except RaydetectError as error:
            log.error("%s: %s", served.name, error)
            raise Busy(f"{served.name}: cannot score just now; the server's log says why.") from None

    async def _wanted(self, request: Request) -> answers.Wanted:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "multipart/form-data":
            try:
                async with request.form(max_files=self.spec.limits.max_images, max_fields=8) as form:
                    wanted = await answers.uploaded(form, self.spec.limits.max_image_bytes)
            except StarletteHTTPException as error:
                raise self._many(error) from None
        elif kind == "application/json":
            try:
                body = ScoreRequest.model_validate_json(await request.body())
            except ValidationError as error:
                raise RequestValidationError(error.errors(include_url=False, include_context=False)) from None
            self._refuse_many(len(body.images))
            wanted = await asyncio.to_thread(answers.named, body, self.allow.sources, self.fetcher)
        else:
            raise HTTPException(415, "send multipart/form-data with parts named `images`, or application/json.")
        self._refuse_many(len(wanted.members))
        if wanted.store and self.heatmaps is None:
            raise HTTPException(422, "store_heatmaps: this server has no folder for them (`heatmaps` in its job file).")
        return wanted

    def _refuse_many(self, count: int) -> None:
        if count > self.spec.limits.max_images:
            raise HTTPException(413, f"{count} images; this server takes {self.spec.limits.max_images} in one request.")

    def _many(self, error: StarletteHTTPException) -> StarletteHTTPException:
        """The same refusal for a form, which is no longer read once it has too many parts."""
        if not str(error.detail).startswith(TOO_MANY_FILES):
            return error
        return HTTPException(413, f"this server takes {self.spec.limits.max_images} images in one request.")

    async def _served(self, name: str) -> Served:
        served = await self.desk.served()
        if name not in served:
            raise HTTPException(404, f"no detector {name[:100]!r} is served.{nearest(name[:100], list(served))}")
        return served[name]

    async def runs(self) -> Runs:
        """Archive runs since the server started, with progress from their ledgers."""
        known = await self.desk.runs()

        def told() -> list[RunAnswer | None]:
            return [archive_runs.answer_of(uri, state, self.ledgers) for uri, state in known.items()]

        return Runs(runs=[run for run in await asyncio.to_thread(told) if run is not None])

    async def start(self, body: RunRequest) -> RunAnswer:
        """Begins to score an archive; the same request again goes on where the run stopped."""
        served = await self._served(body.detector)
        job = archive_runs.job_of(body, served, self.spec, self.allow)
        state = await self.desk.start(job)
        return await self._told(state.uri)

    async def run(self, id: str) -> RunAnswer:
        """How far an archive run is, from its ledger; also of runs that another server did."""
        return await self._told(self._uri(id))

    async def report(self, id: str) -> HTMLResponse:
        """The report of an archive run, finished or not: one HTML page that loads nothing from elsewhere."""
        uri = self._uri(id)
        await self._told(uri)
        page = await asyncio.to_thread(self.reports.page, uri, await self.desk.served())
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})

    async def cancel(self, id: str) -> RunAnswer:
        """Stops an archive run; what is committed stays."""
        uri = self._uri(id)
        if not await self.desk.cancel(uri):
            raise HTTPException(404, "no archive run of that id is running.")
        return await self._told(uri)

    def _uri(self, name: str) -> str:
        uri = archive_runs.uri_of(name)
        if uri is None:
            raise HTTPException(404, "no archive run has that id.")
        return self.allow.sinks.check(uri, "id")

    async def _told(self, uri: str) -> RunAnswer:
        known = (await self.desk.runs()).get(uri)
        found = await asyncio.to_thread(archive_runs.answer_of, uri, known, self.ledgers)
        if found is None:
            raise HTTPException(404, "no archive run has that id.")
        return found
