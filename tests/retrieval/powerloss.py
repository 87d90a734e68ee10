"""A disk that forgets: file operations recorded with strace, and what a power failure leaves.

Only what was synced is sure to be on the disk: contents by fsync of the file, names by fsync of its
folder. Of the rest, any part may be.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

CALLS = "openat,close,lseek,write,pwrite64,fsync,fdatasync,rename,unlink,ftruncate"
_LINE = re.compile(rb"\d+ +(\w+)\((.*)\) += (-?\d+)")
_TEXT = re.compile(rb'"((?:\\x[0-9a-f]{2})*)"')
_Write = tuple[int, bytes | None]  # offset and data; None cuts the file there


@dataclass
class File:
    """One file: what is surely on the disk, and what was written since."""

    synced: bytes = b""
    pending: list[_Write] = field(default_factory=list)

    def content(self, keep: np.ndarray | bool = True) -> bytes:
        """The content with some of the pending writes, all by default."""
        data = bytearray(self.synced)
        kept = np.broadcast_to(keep, len(self.pending))
        for (offset, part), here in zip(self.pending, kept, strict=True):
            if here and part is None:
                del data[offset:]
                data.extend(bytes(offset - len(data)))
            elif here and part is not None:
                data.extend(bytes(max(0, offset - len(data))))
                data[offset : offset + len(part)] = part
        return bytes(data)


class Disk:
    """Replays a record of strace over the files of a folder."""

    def __init__(self, folder: Path) -> None:
        self.root = folder
        self.names = {p: File(p.read_bytes()) for p in folder.rglob("*") if p.is_file()}
        self.sure = dict(self.names)
        self.said = b""
        self._open: dict[int, File | Path] = {}
        self._place: dict[int, int] = {}

    def replay(self, log: Path) -> Iterator[None]:
        """Do what was recorded, step by step; pauses after each step that concerns the folder."""
        with log.open("rb") as lines:
            for line in lines:
                assert b"unfinished" not in line
                found = _LINE.match(line)
                if found is not None and int(found[3]) >= 0 and self._do(*found.groups()):
                    yield

    def _do(self, call: bytes, arguments: bytes, result: bytes) -> bool:
        texts = [bytes.fromhex(t.replace(b"\\x", b"").decode()) for t in _TEXT.findall(arguments)]
        paths = [Path(text.decode(errors="replace")) for text in texts]
        if call in (b"openat", b"rename", b"unlink"):
            if not paths[0].is_relative_to(self.root):
                return False
            return self._named(call, paths, arguments, int(result))
        number = int(re.match(rb"\d+", arguments)[0])  # type: ignore[index]
        if number == 1 and call == b"write":
            self.said += texts[0]
        file = self._open.get(number)
        if call == b"close":
            self._open.pop(number, None)
        elif call == b"lseek":
            self._place[number] = int(result)
        elif isinstance(file, Path):  # a folder, synced
            self.sure = {p: f for p, f in self.sure.items() if p.parent != file}
            self.sure |= {p: f for p, f in self.names.items() if p.parent == file}
        elif file is not None and call in (b"fsync", b"fdatasync"):
            file.synced, file.pending = file.content(), []
        elif file is not None and call == b"ftruncate":
            file.pending.append((int(arguments.split(b",")[-1]), None))
        elif file is not None:
            last = int(arguments.split(b",")[-1])
            offset = last if call == b"pwrite64" else self._place[number]
            file.pending.append((offset, texts[0][: int(result)]))
            if call == b"write":
                self._place[number] += int(result)
        return isinstance(file, File | Path) and call not in (b"close", b"lseek")

    def _named(self, call: bytes, paths: list[Path], arguments: bytes, result: int) -> bool:
        if call == b"unlink":
            self.names.pop(paths[0], None)
        elif call == b"rename":
            self.names[paths[1]] = self.names.pop(paths[0])
        elif paths[0] in self.names or b"O_CREAT" in arguments:
            self._open[result] = self.names.setdefault(paths[0], File())
            self._place[result] = 0
            if b"O_TRUNC" in arguments:
                self._open[result].pending.append((0, None))  # type: ignore[union-attr]
        else:
            self._open[result] = paths[0]
        return True

    def after_power_loss(self, kind: str, rng: np.random.Generator) -> dict[Path, bytes]:
        """The files after a power failure now.

        `nothing`: what was not synced is lost; `names`: names are there, contents are not;
        `some`: any of the pending names and writes are there; `all`: everything is.
        """
        if kind == "nothing":
            return {path: file.synced for path, file in self.sure.items()}
        if kind == "names":
            return {path: file.synced for path, file in self.names.items()}
        if kind == "all":
            return {path: file.content() for path, file in self.names.items()}
        names = self.names if rng.random() < 0.5 else self.sure
        return {
            path: file.content(rng.random(len(file.pending)) < 0.5) for path, file in names.items()
        }
