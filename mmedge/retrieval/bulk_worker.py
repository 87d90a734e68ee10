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

from mmedge.errors import InputError, MmedgeError
from mmedge.retrieval.pipeline import Job, embedded
from mmedge.retrieval.throughput import load_bulk_model
from mmedge.specs import Float32Array, Modality

__all__ = ["FileEmbedder", "serve"]


class FileEmbedder:
    """A loaded bundle that embeds image files.

    Args:
        task: "bundle", "precision" and "cpus" to use, None for all.

    Attributes:
        ready: {"space": fingerprint, "dim": D}.

    Raises:
        InputError: If the bundle does not embed images.
        MmedgeError: If it cannot be loaded.
    """

    def __init__(self, task: dict[str, Any]) -> None:
        self._cpus = task["cpus"]
        self._bulk = load_bulk_model(task["bundle"], task["precision"], None, cpus=self._cpus)
        model = self._bulk.model
        role = model.encoders.get(Modality.IMAGE)
        if role is None:
            raise InputError(f"{task['bundle']} has no image encoder. Use a bundle with one.")
        self.ready = {"space": model.spaces[role], "dim": model.embedding_dim}

    def embed(self, files: list[str], known: list[str | None]) -> tuple[dict[str, Any], bytes]:
        """Embed files.

        Args:
            files: Paths.
            known: A file of this sha256 is not embedded.

        Returns:
            {"kept": [(number, sha256), ...], "unchanged": [number, ...], "skipped": [(number,
            reason), ...]}, and the (kept, D) float32 vectors.
        """
        kept: list[tuple[int, str | None]] = []
        unchanged: list[int] = []
        skipped: list[tuple[int, str]] = []
        vectors: list[Float32Array] = []
        jobs = [
            Job(number, Modality.IMAGE, file, digest)
            for number, (file, digest) in enumerate(zip(files, known, strict=True))
        ]
        for one in embedded(self._bulk, jobs, workers=self._cpus):
            if one.error is not None:
                skipped.append((one.key, one.error))
            elif one.vector is None:
                unchanged.append(one.key)
            else:
                kept.append((one.key, one.content_hash))
                vectors.append(one.vector)
        reply = {"kept": kept, "unchanged": unchanged, "skipped": skipped}
        return reply, b"".join(np.ascontiguousarray(each, np.float32).tobytes() for each in vectors)


def serve(task: dict[str, Any], requests: IO[bytes], replies: IO[bytes]) -> None:
    """Load a bundle, say so, and reply to requests until their end.

    Args:
        task: As for FileEmbedder.
        requests: Lines {"files": [path, ...], "known": [sha256 or null, ...]}.
        replies: Takes the line FileEmbedder.ready first, then for each request what
            FileEmbedder.embed returns, a line and bytes.
    """
    embedder = FileEmbedder(task)
    _send(replies, embedder.ready)
    for line in requests:
        request = json.loads(line)
        _send(replies, *embedder.embed(request["files"], request["known"]))


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
