"""Batching of texts in bounded memory, and what an encoding reports."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from mmedge.ahead import run_ahead, worker_threads
from mmedge.errors import TextError
from mmedge.preprocess.text import TextProcessor, check_tokens
from mmedge.specs import Array, Float32Array

__all__ = ["EncodedFiles", "Skipped", "encode_ids", "text_batches", "token_ids"]

# Smaller buckets pad less, larger ones make fewer calls. 4 took the least CPU time of 1 to 16 on
# 100 texts of 6 to 40 tokens, in fp32 and in int8 (docs/architecture.md, exact savings).
_BUCKET_TOKENS = 4
_TEXTS_AT_ONCE = 4096  # that are tokenized and sorted by length together


@dataclass(frozen=True, slots=True)
class Skipped:
    """An image or a text that was skipped.

    Attributes:
        position: Its place among those given, from 0.
        path: An image's path, empty if it was not given by one.
        reason: What is wrong with it and what to do.
    """

    position: int
    path: str
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class EncodedFiles:
    """Embeddings of image files, and the skipped files.

    Attributes:
        embeddings: (K, D) float32, L2-normalised; row i belongs to paths[i].
        paths: The K files that were encoded, in the order they were given.
        skipped: The files that were not.
    """

    embeddings: Float32Array = field(repr=False)
    paths: tuple[str, ...]
    skipped: tuple[Skipped, ...]


def token_ids(
    texts: Iterable[str], processor: TextProcessor, skipped: list[Skipped] | None = None
) -> Generator[list[list[int]], None, None]:
    """Tokenize texts in chunks of a few thousand, the next one in a thread.

    Args:
        texts: Read in the calling thread, at most one chunk ahead.
        processor: Checks and tokenizes them.
        skipped: Takes the texts that cannot be used; None raises instead.

    Yields:
        Token ids of at least one text, in the order of the texts. Closing the generator ends the
        thread.

    Raises:
        TextError: If a text cannot be used; its position is named.
    """
    read = enumerate(texts)
    first = list(itertools.islice(read, _TEXTS_AT_ONCE))
    rest = iter(lambda: list(itertools.islice(read, _TEXTS_AT_ONCE)), [])
    chunks = itertools.chain([first] if first else [], rest)
    calls = (partial(_tokenize, processor, chunk, skip=skipped is not None) for chunk in chunks)
    threads = 1 if len(first) == _TEXTS_AT_ONCE and worker_threads(texts) else 0
    with closing(run_ahead(calls, threads=threads, ahead=1)) as results:
        for usable, bad in results:
            if skipped is not None:
                skipped += bad
            if usable:
                yield usable


def _tokenize(
    processor: TextProcessor, chunk: Sequence[tuple[int, str]], *, skip: bool
) -> tuple[list[list[int]], list[Skipped]]:
    """Tokenize texts with their positions; return the ids of those that can be used, and the rest.

    Raises:
        TextError: If one cannot be used, unless `skip` is on.
    """
    bad: list[Skipped] = []
    checked: dict[int, str] = {}
    for position, text in chunk:
        with _skipping(position, bad if skip else None):
            checked[position] = processor.check(text, position)
    usable: list[list[int]] = []
    for position, tokens in zip(checked, processor.encode(list(checked.values())), strict=True):
        with _skipping(position, bad if skip else None):
            check_tokens(tokens, position)
            usable.append(tokens)
    return usable, bad


@contextmanager
def _skipping(position: int, skipped: list[Skipped] | None) -> Iterator[None]:
    try:
        yield
    except TextError as error:
        if skipped is None:
            raise
        skipped.append(Skipped(position, "", str(error)))


def text_batches(
    ids: Sequence[Sequence[int]], batch_size: int, *, by_length: bool
) -> list[list[int]]:
    """Group texts into batches.

    Args:
        ids: Token ids of each text.
        batch_size: Texts in a batch, at most.
        by_length: Whether texts of like length go together, so that padding costs a text at most
            3 tokens.

    Returns:
        Positions in `ids`, batch by batch; every position is in exactly one.
    """
    buckets: dict[int, list[int]] = {}
    for position, tokens in enumerate(ids):
        bucket = -(-len(tokens) // _BUCKET_TOKENS) if by_length else 0
        buckets.setdefault(bucket, []).append(position)
    return [
        bucket[start : start + batch_size]
        for _, bucket in sorted(buckets.items())
        for start in range(0, len(bucket), batch_size)
    ]


def encode_ids(
    ids: Sequence[Sequence[int]],
    processor: TextProcessor,
    batch_size: int,
    run: Callable[[Mapping[str, Array]], Float32Array],
) -> Float32Array:
    """Encode tokenized texts, those of like length together.

    Args:
        ids: Token ids of each of N >= 1 texts.
        processor: Pads them.
        batch_size: Texts in a batch, at most.
        run: From the inputs of n texts to (n, D) float32.

    Returns:
        (N, D) float32, in the order of the texts.
    """
    by_length = processor.config.padding == "longest"
    batches = text_batches(ids, batch_size, by_length=by_length)
    parts = [run(processor.pad([ids[position] for position in batch])) for batch in batches]
    if len(parts) == 1:
        return parts[0]
    embeddings = np.empty((len(ids), parts[0].shape[1]), np.float32)
    embeddings[np.concatenate(batches)] = np.concatenate(parts)
    return embeddings
