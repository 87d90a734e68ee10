"""Gates: comparisons of three tokens, parsed and never evaluated as code.

```
gate   = name op number
name   = word ("." word)*         word: letters, digits, "_", "-"
op     = "<" | "<=" | ">" | ">=" | "=="
```

A gate must not hold: `image_encoder.p95_ms > 20` fails if it is true. A figure that
does not exist, or that the sample does not support, is an error and never a pass.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from mmedge.errors import ProfileError
from mmedge.profiling.metrics import Metric
from mmedge.profiling.result import GateResult
from mmedge.profiling.statistics import required_samples
from mmedge.specs import did_you_mean

__all__ = ["Gate", "check_names", "evaluate", "parse_gate", "runs_needed"]

_Op = Literal["<", "<=", ">", ">=", "=="]
_OPS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
}
_GATE = re.compile(
    r"\s*(?P<name>[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)+)"
    r"\s*(?P<op><=|>=|==|<|>)"
    r"\s*(?P<number>[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*"
)
_PERCENTILE = re.compile(r"\.p([0-9]{1,2})_ms$")


@dataclass(frozen=True, slots=True)
class Gate:
    """One parsed expression: `name op limit` must not hold."""

    expression: str
    name: str
    op: _Op
    limit: float


def parse_gate(expression: str) -> Gate:
    """Read one gate.

    Raises:
        ProfileError: If it is not `NAME OP NUMBER`.
    """
    match = _GATE.fullmatch(expression)
    if match is None or not math.isfinite(limit := float(match["number"])):
        raise ProfileError(
            f"Not a gate: got {expression!r}, expected NAME OP NUMBER with OP one of "
            f"{' '.join(_OPS)}, e.g. 'image_encoder.p95_ms > 20'."
        )
    return Gate(expression.strip(), match["name"], cast(_Op, match["op"]), limit)


def check_names(gates: Sequence[Gate], names: Collection[str]) -> None:
    """Reject a gate on a figure that will not exist, before anything is measured.

    Raises:
        ProfileError: With the nearest names and all the short ones.
    """
    for gate in gates:
        if gate.name not in names:
            raise _unknown(gate, names)


def _unknown(gate: Gate, names: Collection[str]) -> ProfileError:
    role = gate.name.split(".")[0]
    short = sorted({n for n in names if n.count(".") - n.count(".end_to_end.") == 1})
    there = [name for name in short if name.split(".")[0] == role] or short
    return ProfileError(
        f"Gate '{gate.expression}': no figure '{gate.name}'."
        f"{did_you_mean(gate.name, names)} Figures (also with variant, batch, threads and "
        f"sequence, as in {max(names, key=len, default='role.variant.metric')}): "
        f"{', '.join(there)}."
    )


def runs_needed(gates: Sequence[Gate], bases: Sequence[str]) -> int:
    """Return the runs per cell that the percentiles of the gates need.

    Args:
        gates: All gates.
        bases: The cell's names.
    """
    needed = 1
    for gate in gates:
        match = _PERCENTILE.search(gate.name)
        if match and gate.name[: match.start()] in bases:
            needed = max(needed, required_samples(int(match[1])))
    return needed


def evaluate(gates: Sequence[Gate], figures: Sequence[Metric]) -> tuple[GateResult, ...]:
    """Apply every gate to its figures.

    Returns:
        One result for each figure of each gate; a gate that names no variant has one a variant.

    Raises:
        ProfileError: If a gate names no figure, or one that the sample does not support.
    """
    results: list[GateResult] = []
    for gate in gates:
        named = [figure for figure in figures if gate.name in figure.aliases]
        if not named:
            raise _unknown(gate, [alias for figure in figures for alias in figure.aliases])
        for figure in named:
            if figure.value is None:
                raise ProfileError(
                    f"Gate '{gate.expression}': {figure.name} was not measured: {figure.missing}."
                )
            results.append(
                GateResult(
                    expression=gate.expression,
                    metric=figure.name,
                    got=figure.value,
                    op=gate.op,
                    limit=gate.limit,
                    failed=_OPS[gate.op](figure.value, gate.limit),
                )
            )
    return tuple(results)
