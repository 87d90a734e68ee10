"""The web application around what a path holds: an index here, other kinds by one line each."""

# No `from __future__ import annotations`: FastAPI is imported inside functions, and what it reads
# from annotations could not be found from text.

import asyncio
import importlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from mmedge.errors import InputError, MmedgeError
from mmedge.serving.guard import Guard, Limits
from mmedge.serving.problems import PROBLEM_TYPE, FieldError, Problem, problem, problem_of

if TYPE_CHECKING:
    from fastapi import FastAPI, Request, Response

__all__ = ["PROBLEMS", "ServeOptions", "Served", "Work", "add_pages", "create_app", "open_served"]

# One line per kind of thing that can be served: a module with `recognise(path)`, which returns
# whether a path holds one, and `open_path(path, options)`, which returns a Served.
_KINDS = ("mmedge.serving.search",)

_LOG = logging.getLogger("mmedge.serving")
_MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_NO_TELEMETRY = dict.fromkeys(
    ("tracing", "metrics", "logs", "operation_spans", "auto_configure"), False
)

PROBLEMS: dict[int | str, dict[str, Any]] = {
    code: {"model": Problem, "description": words}
    for code, words in {"4XX": "The request is refused.", "5XX": "The server fails."}.items()
}
"""Responses of every API route besides the good one; for `responses=`."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """How a path is served.

    Attributes:
        bundle: Model that encodes queries; None takes the one that the index records.
        folders: Folders whose images may be shown; None takes those recorded at indexing.
    """

    bundle: Path | None = None
    folders: Sequence[Path] | None = None


class Work(Protocol):
    """Runs functions that compute or wait, each in a thread."""

    def __call__(self, function: Callable[[], _T]) -> Awaitable[_T]:
        """Return what the function returns."""


class Served(Protocol):
    """Something with pages and routes of its own."""

    @property
    def title(self) -> str:
        """What it is, in a few words."""

    @property
    def notes(self) -> Iterable[str]:
        """Lines for the terminal when it is served."""

    @property
    def limits(self) -> Limits:
        """Bounds on its requests."""

    @property
    def hidden(self) -> Iterable[Path]:
        """Paths of which messages to clients show the name alone."""

    def add_routes(self, app: "FastAPI", work: Work) -> None:
        """Add its pages and routes."""

    def close(self) -> None:
        """Release files and sessions."""


def open_served(path: Path, options: ServeOptions) -> Served:
    """Open what a path holds.

    Raises:
        InputError: If it is nothing that can be served.
        MmedgeError: If it cannot be opened.
    """
    for name in _KINDS:
        kind = importlib.import_module(name)
        if kind.recognise(path):
            served: Served = kind.open_path(path, options)
            return served
    what = "cannot be served" if path.exists() else "no such folder"
    raise InputError(f"{path}: {what}. Expected an index, NAME.index.")


def create_app(served: Served, hosts: frozenset[str]) -> Guard:
    """Return the ASGI application of something that is served.

    Args:
        served: What is served; closing it stays with the caller.
        hosts: Names under which requests are served: see allowed_hosts.
    """
    from fastapi import FastAPI

    app = FastAPI(
        title=served.title,
        version=version("mmedge"),
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        openapi_url="/api/openapi.json",
        generate_unique_id_function=lambda route: route.name,
        telemetry=_NO_TELEMETRY,  # type: ignore[arg-type]
    )
    limits = served.limits
    pool = ThreadPoolExecutor(limits.running, "mmedge-serving")

    async def work(function: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(pool, function)

    served.add_routes(app, work)
    _add_problems(app, served)
    app.openapi = partial(_openapi, app.openapi)  # type: ignore[method-assign]
    return Guard(app, hosts, limits)


def add_pages(app: "FastAPI", pages: Mapping[str, str]) -> None:
    """Serve files of the package, read once, here.

    Args:
        app: The application.
        pages: Name of the file in mmedge/serving/pages/ by path.
    """
    for path, name in pages.items():
        body = files("mmedge.serving").joinpath("pages", name).read_bytes()
        app.add_route(path, _page(body, _MEDIA_TYPES[Path(name).suffix]), methods=["GET"])


def _page(body: bytes, media_type: str) -> Callable[["Request"], Awaitable["Response"]]:
    from fastapi import Request, Response

    async def show(_: Request) -> Response:
        return Response(body, media_type=media_type, headers={"cache-control": "no-cache"})

    return show


def _add_problems(app: "FastAPI", served: Served) -> None:
    """Turn every error into a problem object."""
    from fastapi import Request, Response
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException

    def respond(found: Problem, headers: Mapping[str, str] | None = None) -> Response:
        return Response(found.model_dump_json(), found.status, headers, PROBLEM_TYPE)

    def known(_: Request, error: Exception) -> Response:
        assert isinstance(error, MmedgeError)  # noqa: S101, registered for it
        found = problem_of(error, served.hidden)
        if found.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            _LOG.error("%s: %s", type(error).__name__, error)
        return respond(found)

    def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)  # noqa: S101, registered for it
        fields = tuple(
            FieldError(field=".".join(map(str, each["loc"][1:])), message=each["msg"])
            for each in error.errors()
        )
        named = "; ".join(f"{each.field}: {each.message}" for each in fields[:3])
        detail = f"The request cannot be used. {named}."
        return respond(problem(HTTPStatus.UNPROCESSABLE_ENTITY, detail, fields))

    def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # noqa: S101, registered for it
        status = HTTPStatus(error.status_code)
        return respond(problem(status, f"{status.description or status.phrase}."), error.headers)

    def failed(_: Request, error: Exception) -> Response:  # noqa: ARG001, it is raised again
        status = HTTPStatus.INTERNAL_SERVER_ERROR
        return respond(problem(status, "An error of mmedge. Its terminal shows the cause."))

    for kind, handler in (
        (MmedgeError, known),
        (RequestValidationError, invalid),
        (HTTPException, refused),
        (Exception, failed),
    ):
        app.add_exception_handler(kind, handler)


def _openapi(original: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the OpenAPI document, with problem objects under their own media type."""
    document = original()
    for path in document["paths"].values():
        for operation in path.values():
            for code in PROBLEMS:
                content = operation["responses"].get(code, {}).get("content", {})
                if "application/json" in content:
                    content[PROBLEM_TYPE] = content.pop("application/json")
    return document
