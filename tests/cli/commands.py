"""A command line run in this process."""

from __future__ import annotations

import pytest

from mmedge import cli

__all__ = ["run"]


def run(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    """Return what a command prints to stdout, or to stderr where it is to exit with another code.

    What was printed before is dropped.
    """
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        cli.main([str(each) for each in arguments])
    out, err = capsys.readouterr()
    assert done.value.code == code, err
    return out if code == 0 else err
