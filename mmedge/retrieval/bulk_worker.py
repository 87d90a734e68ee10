"""Worker process of mmedge.retrieval.bulk: embeds image files with a bundle that it loads once.

It reads requests as lines of JSON from standard input and writes a line of JSON for each to
standard output, followed by the vectors as float32 bytes. It ends when its input does, so it never
outlives its parent.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import IO, Any

import numpy as np

from mmedge.errors import ImageError, MmedgeError
from mmedge.files import sha256_file
from mmedge.models.batches import Skipped
from mmedge.models.embedding import EmbeddingModel
from mmedge.models.load import load_as
from mmedge.runtimes.session import SessionOptions
from mmedge.specs import Modality

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
            _send(replies, *_embed(model, request["files"], request["known"]))


def _embed(
    model: EmbeddingModel, files: list[str], known: list[str | None]
) -> tuple[dict[str, Any], bytes]:
    unchanged: list[int] = []
    skipped: list[list[Any]] = []
    wanted: list[tuple[int, str]] = []
    for number, file in enumerate(files):
        try:
            digest = sha256_file(Path(file))
        except (OSError, MmedgeError) as error:
            skipped.append([number, str(error)])
            continue
        if digest == known[number]:
            unchanged.append(number)
        else:
            wanted.append((number, digest))
    bad: list[Skipped] = []
    vectors = np.empty((0, model.embedding_dim), np.float32)
    if wanted:
        try:
            vectors = model.encode_image([files[number] for number, _ in wanted], skipped=bad)
        except ImageError as error:  # of all of them
            bad = [Skipped(place, "", str(error)) for place in range(len(wanted))]
    gone = {each.position: each.reason for each in bad}
    skipped += [[wanted[place][0], reason] for place, reason in gone.items()]
    kept = [each for place, each in enumerate(wanted) if place not in gone]
    reply = {"kept": kept, "unchanged": unchanged, "skipped": skipped}
    return reply, np.ascontiguousarray(vectors, np.float32).tobytes()


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
