"""Check of a tokenizer's regular expressions for bounded search time.

The engine of the tokenizers library (Oniguruma) searches by trying. What a pattern can cost is
therefore counted before it is compiled: the ways in which it can match one text of given lengths
(`ways`), and the repetitions without a bound that follow each other (`degree`). Patterns of
tokenizers in use have a few of the one and at most two of the other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

__all__ = ["check_pattern"]

_MAX_LENGTH = 1 << 13
_MAX_REPEAT = 1000
_MAX_WAYS = 256
_MAX_DEGREE = 3
_MAX_DEPTH = 16
_MAX_SIZE = 1 << 14

_FLAGS = re.compile(r"\?[ims]*(?:-[ims]+)?(:|\))")  # (?i: and (?i)
_LOOK = re.compile(r"\?(?:=|!|<=|<!)")
_REPEAT = re.compile(r"([*+?])[?+]?|\{(\d{1,6})?(,)?(\d{1,6})?\}\??")
_ESCAPE = re.compile(
    r"\\(?:[pP]\{\^?[A-Za-z0-9_ -]{1,40}\}|x\{[0-9A-Fa-f]{1,8}\}|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}"
    r"|[nrtfvaesSdDwWhHbBAzZG]|[^A-Za-z0-9])",
    re.DOTALL,
)
_ANCHORS = {"^", "$", *(rf"\{letter}" for letter in "bBAzZG")}


@dataclass(frozen=True, slots=True)
class _Cost:
    ways: int = 1
    degree: int = 0
    size: int = 1  # of the compiled pattern
    shortest: int = 1  # minimum match length in characters


def check_pattern(pattern: str) -> int:
    """Check that a search for a pattern takes a bounded time.

    Returns:
        How many characters it matches at least.

    Raises:
        ValueError: If it may not, or if it has parts whose cost is not known here: repetitions
            within repetitions, references to groups, lookarounds with repetitions, ...
    """
    if len(pattern) > _MAX_LENGTH:
        raise ValueError(f"the pattern has {len(pattern)} characters, more than {_MAX_LENGTH}")
    reader = _Reader(pattern)
    cost = reader.alternatives(0)
    if reader.at < len(pattern):
        raise ValueError(f"an unmatched ')' at character {reader.at}")
    return cost.shortest


class _Reader:
    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.at = 0

    def alternatives(self, depth: int) -> _Cost:
        """Read up to a closing parenthesis or the end."""
        if depth > _MAX_DEPTH:
            raise ValueError(f"groups nested deeper than {_MAX_DEPTH}")
        branches = [self._branch(depth)]
        while self._take("|"):
            branches.append(self._branch(depth))
        return self._bounded(
            _Cost(
                sum(each.ways for each in branches),
                max(each.degree for each in branches),
                sum(each.size for each in branches),
                min(each.shortest for each in branches),
            )
        )

    def _branch(self, depth: int) -> _Cost:
        cost = _Cost(shortest=0)
        while self.at < len(self.pattern) and self.pattern[self.at] not in "|)":
            part = self._repeated(self._atom(depth))
            cost = self._bounded(
                _Cost(
                    cost.ways * part.ways,
                    cost.degree + part.degree,
                    cost.size + part.size,
                    cost.shortest + part.shortest,
                )
            )
        return cost

    def _atom(self, depth: int) -> _Cost:
        if self._take("("):
            return self._group(depth)
        start = self.at
        if self._take("["):
            self._class()
        elif self.pattern[start] == "\\":
            self._escape()
        elif self.pattern[start] in "*+?":
            raise ValueError(f"nothing to repeat at character {start}")
        else:
            self.at += 1
        return _Cost(shortest=int(self.pattern[start : self.at] not in _ANCHORS))

    def _group(self, depth: int) -> _Cost:
        flags, look = (kind.match(self.pattern, self.at) for kind in (_FLAGS, _LOOK))
        if flags is not None:
            self.at = flags.end()
            if flags[1] == ")":
                if flags.start() != 1:  # it would group the rest, including alternatives
                    raise ValueError(f"flags within the pattern at character {flags.start()}")
                return _Cost(shortest=0)
        elif look is not None:
            self.at = look.end()
        elif self.pattern.startswith("?", self.at):
            raise ValueError(f"a group of an unknown kind at character {self.at}")
        cost = self.alternatives(depth + 1)
        if not self._take(")"):
            raise ValueError("a group without its ')'")
        if look is not None and cost.degree:
            raise ValueError("a repetition without a bound in a lookaround")
        return cost if look is None else replace(cost, shortest=0)

    def _class(self) -> None:
        """Read a set of characters behind its '['; sets may hold sets."""
        depth = 1
        self._take("^")
        if self.pattern.startswith("]", self.at):
            raise ValueError(f"an empty set at character {self.at}")
        while depth:
            if self.at >= len(self.pattern):
                raise ValueError("a set without its ']'")
            if self.pattern[self.at] == "\\":
                self._escape()
                continue
            depth += {"[": 1, "]": -1}.get(self.pattern[self.at], 0)
            self.at += 1
            if self.pattern.startswith(("[]", "[^]"), self.at - 1):
                raise ValueError(f"an empty set at character {self.at}")

    def _escape(self) -> None:
        match = _ESCAPE.match(self.pattern, self.at)
        if match is None:
            raise ValueError(
                f"{self.pattern[self.at : self.at + 2]!r} at character {self.at}, which refers to "
                "a group or is unknown"
            )
        self.at = match.end()

    def _repeated(self, cost: _Cost) -> _Cost:
        match = _REPEAT.match(self.pattern, self.at)
        if match is None or match[0] in {"{}", "{,}", "{}?", "{,}?"}:  # literal characters
            return cost
        self.at = match.end()
        if _REPEAT.match(self.pattern, self.at):
            raise ValueError(f"a repetition of a repetition at character {self.at}")
        if match[1] == "?":
            return replace(cost, ways=cost.ways + 1, shortest=0)
        low = int(match[2] or 0)
        high = low if not match[3] and not match[1] else int(match[4] or 0)
        endless = match[1] is not None or (match[3] is not None and match[4] is None)
        if cost.degree or (endless and cost.ways > 1):
            raise ValueError(f"a repetition within a repetition at character {match.start()}")
        if endless:
            low = 1 if match[1] == "+" else low
            return _Cost(1, 1, cost.size * max(low, 1), cost.shortest * low)
        if not low <= high <= _MAX_REPEAT or (cost.ways > 1 and high > _MAX_DEPTH):
            raise ValueError(f"a repetition {match[0]} beyond the bounds")
        ways = cost.ways**high * (high - low + 1)
        return _Cost(ways, 0, cost.size * max(high, 1), cost.shortest * low)

    def _bounded(self, cost: _Cost) -> _Cost:
        if cost.ways > _MAX_WAYS or cost.degree > _MAX_DEGREE or cost.size > _MAX_SIZE:
            raise ValueError("too many repetitions or ways to match one text")
        return cost

    def _take(self, character: str) -> bool:
        found = self.pattern.startswith(character, self.at)
        self.at += found
        return found
