"""Constrained output: texts that match a JSON schema, a regular expression or a grammar."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmedge.errors import BackendUnavailableError, InputError
from mmedge.specs import Array, Float32Array

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Constraint", "Matcher", "Vocabulary"]

_KINDS = ("json_schema", "regex", "grammar")
_MAX_BYTES = 1 << 20
_MAX_RULES = 1500  # llguidance overflows the stack where some 3000 rules each lead to the next


@dataclass(frozen=True, slots=True)
class Constraint:
    """What a text must match, whole. It takes the package llguidance.

    A text that is cut off at max_new_tokens is a beginning of one that matches.

    Attributes:
        kind: json_schema, regex or grammar.
        content: A JSON schema, a regular expression of Rust's syntax, or a grammar of Lark's.

    Raises:
        InputError: If the kind is unknown, or the content is too large.
    """

    kind: str
    content: str

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise InputError(f"constraint: got kind {self.kind!r}, expected one of {_KINDS}.")
        size = len(self.content.encode("utf-8", "replace"))
        if size > _MAX_BYTES:
            raise InputError(
                f"constraint: got {size} bytes, expected at most {_MAX_BYTES}. Use a smaller one."
            )
        rules = self.content.count(":")
        if self.kind != "regex" and rules > _MAX_RULES:
            raise InputError(
                f"constraint: got a {self.kind} with {rules} colons, which are as many rules or "
                f"keys, expected at most {_MAX_RULES}. Use a smaller one."
            )

    @classmethod
    def json_schema(cls, schema: Mapping[str, object]) -> Self:
        """Match JSON of a schema, without spaces that it may have between its parts.

        Raises:
            InputError: If JSON cannot hold the schema, or it is too large.
        """
        settings = {"x-guidance": {"whitespace_flexible": False}}
        try:
            return cls("json_schema", json.dumps({**settings, **schema}))
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"json_schema: {error}. Pass what JSON can hold.") from error

    @classmethod
    def regex(cls, pattern: str) -> Self:
        """Match a regular expression, from beginning to end."""
        return cls("regex", pattern)

    @classmethod
    def grammar(cls, lark: str) -> Self:
        """Match a context-free grammar in Lark's format, from its rule `start`."""
        return cls("grammar", lark)

    @classmethod
    def choice(cls, texts: Sequence[str]) -> Self:
        """Match one of several texts.

        Raises:
            InputError: If there are none, one is empty, or they are too large.
        """
        if isinstance(texts, str) or not texts or not all(texts):
            raise InputError(f"choice: got {texts!r}, expected one text or more, none empty.")
        return cls("regex", "|".join(map(re.escape, texts)))


class Vocabulary:
    """The tokens that constraints choose from. Making it takes a second for a large vocabulary.

    Args:
        tokenizer_file: The bundle's tokenizer.json.
        size: Logits of a row.
        eos_ids: Tokens that end a text.

    Raises:
        BackendUnavailableError: If llguidance is not installed.
        InputError: If it cannot use the tokenizer.
    """

    def __init__(self, tokenizer_file: Path, size: int, eos_ids: Collection[int]) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise BackendUnavailableError(
                "Constrained output takes the package llguidance, which is not installed. "
                "Install mmedge[constrain]."
            ) from error
        if not eos_ids:
            raise InputError("Constrained output takes a model with an end token.")
        self._library: Any = llguidance
        self._size = size
        text = tokenizer_file.read_text(encoding="utf-8")
        try:
            self._tokens: Any = llguidance.LLTokenizer(
                text, n_vocab=size, eos_token=sorted(eos_ids)
            )
        except (ValueError, RuntimeError) as error:
            raise InputError(
                f"{tokenizer_file}: llguidance cannot use this tokenizer ({error})."
            ) from error

    def matcher(self, constraint: Constraint) -> Matcher:
        """Return a matcher at the beginning of a text.

        Raises:
            InputError: If the constraint is invalid, or no text can match it.
        """
        compiler: Any = self._library.LLMatcher
        made = {
            "json_schema": compiler.grammar_from_json_schema,
            "regex": compiler.grammar_from_regex,
            "grammar": compiler.grammar_from_lark,
        }[constraint.kind]
        try:
            grammar = made(constraint.content)
            matcher = compiler(self._tokens, grammar, log_level=0)
        except (ValueError, RuntimeError) as error:
            raise _refused(constraint, str(error)) from error
        if matcher.is_error():
            raise _refused(constraint, matcher.get_error())
        return Matcher(matcher, self._size, constraint)


class Matcher:
    """The place of one text in a constraint.

    Args:
        matcher: llguidance's own.
        size: Logits of a row.
        constraint: For messages.
    """

    def __init__(self, matcher: Any, size: int, constraint: Constraint) -> None:  # noqa: ANN401
        self._matcher = matcher
        self._size = size
        self._constraint = constraint

    @property
    def done(self) -> bool:
        """Whether the text is whole and nothing can follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self, logits: Float32Array) -> Float32Array:
        """Return logits (V,), -inf for tokens that cannot follow.

        Raises:
            InputError: If none can.
        """
        bits: Array = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: self._size].astype(bool)
        if self._matcher.is_error() or not allowed.any():
            raise _refused(self._constraint, self._matcher.get_error() or "no token can follow")
        return np.where(allowed, logits, np.float32(-np.inf))

    def accept(self, token: int) -> None:
        """Follow a token.

        Raises:
            InputError: If it cannot follow.
        """
        if not self.done and not self._matcher.consume_token(token):
            raise _refused(self._constraint, self._matcher.get_error() or f"token {token}")


def _refused(constraint: Constraint, reason: str) -> InputError:
    lines = [line for line in reason.strip().splitlines() if line]
    return InputError(
        f"constraint: no text can match {constraint.kind} {constraint.content[:80]!r} "
        f"({(lines or ['unknown'])[0][:200]}). Correct it."
    )
