"""Worker process of mmedge.retrieval.bulk: embeds image files with a bundle that it loads once.

It reads requests as lines of JSON from standard input and writes a line of JSON for each to
standard output, followed by the vectors as float32 bytes. It ends when its input does, so it never
outlives its parent.
"""

from __future__ import annotations

import json
import os
import sys
from typing import IO, Any

import numpy as np

from mmedge.errors import MmedgeError
from mmedge.models.embedding import EmbeddingModel
from mmedge.models.load import load_as
from mmedge.retrieval.pipeline import Job, embedded
from mmedge.runtimes.session import SessionOptions
from mmedge.specs import Float32Array, Modality

__all__ = ["serve"]


def serve(task: dict[str, Any], requests: IO[bytes], replies: IO[bytes]) -> None:
    """Load a bundle, say so, and reply to requests until their end.

    Args:
        task: "bundle", "precision" and "threads".
        requests: Lines {"files": [path, ...], "known": [sha256 or null, ...]}.
        replies: Takes a line {"space", "dim"} first, then for each request a line {"kept":
            [[number, sha256], ...], "unchanged": [number, ...], "skipped": [[number, reason],
            ...]} and the (kept, D) float32 vectors.
    """
    options = SessionOptions(threads=task["threads"], spin=False)
    with load_as(
        EmbeddingModel, task["bundle"], precision=task["precision"], options=options
    ) as model:
        space = model.spaces[model.encoders[Modality.IMAGE]]
        _send(replies, {"space": space, "dim": model.embedding_dim})
        for line in requests:
            request = json.loads(line)
            reply = _embed(model, request["files"], request["known"], task["threads"])
            _send(replies, *reply)


def _embed(
    model: EmbeddingModel, files: list[str], known: list[str | None], threads: int
) -> tuple[dict[str, Any], bytes]:
    kept: list[tuple[int, str | None]] = []
    unchanged: list[int] = []
    skipped: list[tuple[int, str]] = []
    vectors: list[Float32Array] = []
    jobs = [
        Job(number, Modality.IMAGE, file, digest)
        for number, (file, digest) in enumerate(zip(files, known, strict=True))
    ]
    for one in embedded(model, jobs, workers=threads):
        if one.error is not None:
            skipped.append((one.key, one.error))
        elif one.vector is None:
            unchanged.append(one.key)
        else:
            kept.append((one.key, one.content_hash))
            vectors.append(one.vector)
    reply = {"kept": kept, "unchanged": unchanged, "skipped": skipped}
    return reply, b"".join(np.ascontiguousarray(each, np.float32).tobytes() for each in vectors)


def _send(replies: IO[bytes], message: dict[str, Any], payload: bytes = b"") -> None:
    replies.write(json.dumps(message).encode() + b"\n" + payload)
    replies.flush()


if __name__ == "__main__":
    # What libraries print must not get among the replies.
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)
        try:
            serve(json.loads(sys.argv[1]), sys.stdin.buffer, out)
        except MmedgeError as error:
            _send(out, {"error": str(error)})
            sys.exit(1)
