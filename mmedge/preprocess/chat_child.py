"""Child process that renders chat templates in Jinja2's sandbox, within limits on time and memory.

Reads one JSON object a line and answers with one; imports nothing of mmedge.
"""

from __future__ import annotations

import json
import math
import resource
import sys
from datetime import datetime
from typing import Any, NoReturn

__all__ = ["main"]

_MEMORY_BYTES = 512 << 20
_LARGEST = 4 << 20  # characters of a rendered chat
_LARGEST_ERROR = 300


def main() -> None:
    """Answer requests until the input ends."""
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def fail(message: object) -> NoReturn:
        raise jinja2.TemplateError(str(message))

    def to_json(value: object, indent: int | None = None) -> str:
        # Jinja2's own escapes HTML, which transformers' does not.
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = fail
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    for line in sys.stdin:
        request = json.loads(line)
        _limit_time(request["seconds"])
        answer: dict[str, Any]
        try:
            template = environment.from_string(request["template"])
            text = ""
            for piece in template.generate(**request["given"]):
                text += piece
                if len(text) > _LARGEST:
                    fail(f"it makes more than {_LARGEST} characters")
            answer = {"text": text}
        except (jinja2.TemplateError, SyntaxError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:_LARGEST_ERROR]}
        except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:_LARGEST_ERROR]}
        except (MemoryError, RecursionError) as error:
            answer = {"error": f"{type(error).__name__}: it takes too much memory"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _limit_time(seconds: float) -> None:
    """Let the system end this process once it has used so much more CPU time."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    spent = usage.ru_utime + usage.ru_stime
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(spent + seconds), hard))


if __name__ == "__main__":
    main()
