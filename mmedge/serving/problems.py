"""Errors of the HTTP APIs as problem objects (RFC 9457), without paths and tracebacks."""

from __future__ import annotations

import os
from collections.abc import Iterable
from http import HTTPStatus
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from mmedge.errors import IndexCorruptedError, InputError, MmedgeError, RetrievalError

__all__ = ["PROBLEM_TYPE", "FieldError", "Problem", "RequestError", "problem", "problem_of"]

PROBLEM_TYPE = "application/problem+json"


class FieldError(BaseModel):
    """One value of a request that cannot be used."""

    model_config = ConfigDict(frozen=True)

    field: str = Field(description="Where the value stands, such as 'k' or 'vector.3'.")
    message: str = Field(description="What is wrong with it.")


class Problem(BaseModel):
    """An error (RFC 9457)."""

    model_config = ConfigDict(frozen=True)

    type: str = Field("about:blank", description="Always about:blank: see status and detail.")
    title: str = Field(description="The status in words.")
    status: int = Field(description="The HTTP status.")
    detail: str = Field(description="Cause, value got, value expected, and the fix.")
    errors: tuple[FieldError, ...] = Field((), description="The values that cannot be used.")


class RequestError(InputError):
    """A request that is refused with a status of its own.

    Args:
        status: The HTTP status.
        detail: The message.
        errors: The values that cannot be used.
    """

    def __init__(self, status: HTTPStatus, detail: str, *errors: FieldError) -> None:
        super().__init__(detail)
        self.status, self.errors = status, errors


def problem(status: HTTPStatus, detail: str, errors: Iterable[FieldError] = ()) -> Problem:
    """Return the problem object of a status."""
    return Problem(title=status.phrase, status=status, detail=detail, errors=tuple(errors))


def problem_of(error: MmedgeError, hidden: Iterable[Path] = ()) -> Problem:
    """Return the problem object of an error.

    What the caller can mend keeps its message, in which the folders of `hidden` paths are left
    out. Other errors are the server's: their messages may name files, so they are not shown.
    """
    if isinstance(error, RequestError):
        return problem(error.status, str(error), error.errors)
    if isinstance(error, InputError | RetrievalError) and not isinstance(
        error, IndexCorruptedError
    ):
        return problem(HTTPStatus.BAD_REQUEST, _without_folders(str(error), hidden))
    return problem(
        HTTPStatus.INTERNAL_SERVER_ERROR,
        f"{type(error).__name__}: the server cannot do this. Its terminal shows the cause.",
    )


def _without_folders(text: str, hidden: Iterable[Path]) -> str:
    forms = {os.fspath(form): path.name for path in hidden for form in _forms(path)}
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, forms[form])
    return text


def _forms(path: Path) -> tuple[Path, ...]:
    return path, Path(os.path.abspath(path)), Path(os.path.realpath(path))  # noqa: PTH100
