"""Files and folders that are there whole or not at all, whatever interrupts the writing."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mmedge.errors import StorageError
from mmedge.files import (
    atomic,
    atomic_directory,
    renaming,
    sha256_file,
    storage_errors,
    write_atomic,
)
from mmedge.files.atomic import temporary_file

OLD = {"a.bin": b"old a", "sub/b.bin": b"old b"}
NEW = {"a.bin": b"new a", "sub/c.bin": b"new c" * 1000}

# A writer of NEW in a process of its own. Statements given as the second argument run first and
# arrange for its death.
WRITER = """
import os, signal, sys
from pathlib import Path
from mmedge.files import atomic, atomic_directory, renaming

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

in_block = lambda: None
exec(sys.argv[2])
with atomic_directory(Path(sys.argv[1])) as folder:
    (folder / "sub").mkdir()
    (folder / "a.bin").write_bytes(b"new a")
    in_block()
    (folder / "sub" / "c.bin").write_bytes(b"new c" * 1000)
"""

AFTER = """
def then_die(function):
    def both(*arguments):
        function(*arguments)
        die()
    return both
"""

ROUND_ABOUT = "renaming._libc_renameat2 = lambda: None\n"

# Where the writer dies, and what is at the place afterwards.
DEATHS = {
    "in the block": ("in_block = die", OLD),
    "while syncing": ("atomic._sync = die", OLD),
    "before the exchange": ("atomic.exchange = die", OLD),
    "after the exchange": (AFTER + "atomic.exchange = then_die(atomic.exchange)", NEW),
    "before the old one is removed": ("atomic.remove = die", NEW),
    "while the old one is removed": (
        "renaming.shutil.rmtree = lambda path, **_: ((path / 'a.bin').unlink(), die())",
        NEW,
    ),
}


def fill(folder: Path, content: dict[str, bytes]) -> None:
    for relative, data in content.items():
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        (folder / relative).write_bytes(data)


def content_of(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def run_writer(place: Path, first: str) -> int:
    return subprocess.run(
        [sys.executable, "-c", WRITER, str(place), first], check=False, timeout=60
    ).returncode


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with the content OLD and an awkward name."""
    place = tmp_path / "clip [v1].*.mmedge"
    fill(place, OLD)
    return place


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    place = tmp_path / "made" / "on" / "the" / "way"
    with atomic_directory(place) as folder:
        fill(folder, NEW)
        assert not place.exists()
    assert content_of(place) == NEW
    assert list(place.parent.iterdir()) == [place]


def test_a_folder_is_replaced_whole(place: Path) -> None:
    with atomic_directory(place) as folder:
        fill(folder, NEW)
        assert content_of(place) == OLD
    assert content_of(place) == NEW
    assert list(place.parent.iterdir()) == [place]


def test_files_get_the_mode_that_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "file", b"")
        with atomic_directory(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError, StorageError])
def test_an_exception_in_the_block_leaves_the_old_folder(
    place: Path, error: type[BaseException]
) -> None:
    with pytest.raises(error), atomic_directory(place) as folder:  # noqa: PT012
        fill(folder, NEW)
        raise error
    assert content_of(place) == OLD
    assert list(place.parent.iterdir()) == [place]


def test_ctrl_c_while_publishing_leaves_one_whole_folder(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange = atomic.exchange

    def exchange_then_interrupt(source: Path, target: Path) -> None:
        exchange(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic, "exchange", exchange_then_interrupt)
    with pytest.raises(KeyboardInterrupt), atomic_directory(place) as folder:
        fill(folder, NEW)
    assert content_of(place) == NEW
    assert list(place.parent.iterdir()) == [place]


@pytest.mark.parametrize("way", ["", ROUND_ABOUT], ids=["renameat2", "two renames"])
@pytest.mark.parametrize("death", DEATHS)
def test_a_kill_leaves_the_old_or_the_new_and_the_next_writer_tidies(
    place: Path, death: str, way: str
) -> None:
    first, expected = DEATHS[death]
    assert run_writer(place, way + first) == -signal.SIGKILL
    assert content_of(place) == expected
    assert len(list(place.parent.iterdir())) == 2
    with atomic_directory(place):
        assert content_of(place) == expected
        assert len(list(place.parent.iterdir())) == 2
    assert list(place.parent.iterdir()) == [place]


def test_a_kill_between_two_renames_is_mended_by_the_next_writer(place: Path) -> None:
    assert run_writer(place, ROUND_ABOUT + "renaming._rename = die") == -signal.SIGKILL
    # The one state that renameat2 does not know: the old folder is whole, but aside.
    assert run_writer(place, "in_block = die") == -signal.SIGKILL
    assert content_of(place) == OLD


TIRELESS = """
import itertools, sys
from pathlib import Path
from mmedge.files import atomic_directory

for mark in itertools.cycle(range(256)):
    with atomic_directory(Path(sys.argv[1])) as folder:
        for name in "wxyz":
            (folder / name).write_bytes(bytes([mark]) * 999)
    print(mark, flush=True)
"""


@pytest.mark.parametrize("delay_ms", [0, 1, 2, 3, 5, 8, 13, 21])
def test_a_kill_at_any_moment(tmp_path: Path, delay_ms: int) -> None:
    place = tmp_path / "place"
    command = [sys.executable, "-c", TIRELESS, str(place)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(delay_ms / 1000)
        writer.kill()
    content = content_of(place)
    assert content.keys() == set("wxyz")
    assert len(set(content.values())) == 1
    assert len(content["w"]) == 999


@pytest.mark.parametrize("linux", [True, False], ids=["renameat2", "two renames"])
def test_concurrent_writers_each_publish_a_whole_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linux: bool
) -> None:
    if not linux:
        monkeypatch.setattr(renaming, "_libc_renameat2", lambda: None)
    place = tmp_path / "contested"
    failures: list[BaseException] = []

    def write(mark: int) -> None:
        try:
            for _ in range(10):
                with atomic_directory(place) as folder:
                    fill(folder, {name: bytes([mark]) * 99 for name in ("x", "y", "z/w")})
        except BaseException as error:  # noqa: BLE001, handed to the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=write, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    content = content_of(place)
    assert content.keys() == {"x", "y", "z/w"}
    assert len(set(content.values())) == 1
    assert list(tmp_path.iterdir()) == [place]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_a_reader_always_finds_a_whole_folder(place: Path) -> None:
    done = threading.Event()
    seen: list[object] = []

    def read() -> None:
        while not done.is_set():
            try:
                seen.append((place / "a.bin").read_bytes())
            except OSError as error:  # noqa: PERF203, each read counts
                seen.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    replaced = 0
    while replaced < 30 or len(seen) < 30:
        with atomic_directory(place) as folder:
            fill(folder, NEW)
        replaced += 1
    done.set()
    reader.join()
    assert set(seen) <= {OLD["a.bin"], NEW["a.bin"]}


def test_a_writer_at_work_is_not_taken_for_a_leftover(place: Path) -> None:
    with atomic_directory(place) as first:
        fill(first, NEW)
        with atomic_directory(place) as second:
            fill(second, {"second": b"2"})
        assert content_of(first) == NEW
        assert content_of(place) == {"second": b"2"}
    assert content_of(place) == NEW


def test_only_leftovers_are_removed(place: Path) -> None:
    kept = [f".{place.name}.partial", f".{place.name}.backup.old", ".other.0123abcd.partial"]
    for name in kept:
        (place.parent / name).mkdir()
    leftover = place.parent / f".{place.name}.0123abcd.partial"
    leftover.mkdir()
    with atomic_directory(place):
        pass
    assert not leftover.exists()
    assert all((place.parent / name).is_dir() for name in kept)


def test_a_temporary_file_of_a_killed_process_is_removed_by_the_next(tmp_path: Path) -> None:
    killed, other = (tmp_path / f".{name}.0123abcd.temporary.jpg" for name in ("frame", "other"))
    for path in (killed, other):
        path.touch()
    with temporary_file(tmp_path, "frame", "jpg") as path:
        assert path.stat().st_mode & 0o777 == 0o600
        with temporary_file(tmp_path, "frame", "jpg") as second:
            assert path.exists()
            assert second != path
    assert list(tmp_path.iterdir()) == [other]


def test_without_replace_existing_paths_stay(place: Path) -> None:
    with (
        pytest.raises(StorageError, match="exists already"),
        atomic_directory(place, replace=False),
    ):
        pytest.fail("the block must not run")
    assert content_of(place) == OLD


def test_without_replace_a_new_path_stays(tmp_path: Path) -> None:
    place = tmp_path / "new"
    with (  # noqa: PT012
        pytest.raises(StorageError, match="exists already"),
        atomic_directory(place, replace=False) as folder,
    ):
        fill(folder, NEW)
        fill(place, OLD)
    assert content_of(place) == OLD
    assert list(tmp_path.iterdir()) == [place]


def make_file(place: Path) -> None:
    place.write_bytes(b"mine")


def make_link(place: Path) -> None:
    place.symlink_to(place.parent)


@pytest.mark.parametrize(("make", "what"), [(make_file, "a file"), (make_link, "a link")])
def test_a_file_is_left_alone(tmp_path: Path, make: Callable[[Path], None], what: str) -> None:
    place = tmp_path / "place"
    make(place)
    with pytest.raises(StorageError, match=f"{what} is where"), atomic_directory(place):
        pytest.fail("the block must not run")
    assert place.is_symlink() == (what == "a link")
    assert list(tmp_path.iterdir()) == [place]


@pytest.mark.parametrize("below", ["file/place", "file/deep/place"])
def test_a_place_below_a_file_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    place = tmp_path / below
    with pytest.raises(StorageError, match="a file is where a folder is needed"):
        write_atomic(place, b"")
    with pytest.raises(StorageError), atomic_directory(place):
        pytest.fail("the block must not run")
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_a_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="too long"), atomic_directory(tmp_path / ("n" * 250)):
        pytest.fail("the block must not run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "reason"),
    [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "quota"), (errno.EROFS, "read-only")],
)
def test_a_full_or_read_only_disk_while_publishing(
    place: Path, monkeypatch: pytest.MonkeyPatch, code: int, reason: str
) -> None:
    def refuse(path: Path) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(atomic, "_sync", refuse)
    with pytest.raises(StorageError, match=reason) as caught, atomic_directory(place) as folder:
        fill(folder, NEW)
    assert str(place) in str(caught.value)
    assert content_of(place) == OLD
    assert list(place.parent.iterdir()) == [place]


LIMITED = """
import resource, sys
from pathlib import Path
from mmedge.errors import StorageError
from mmedge.files import atomic_directory, write_atomic

resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
place = Path(sys.argv[1])
try:
    if sys.argv[2] == "folder":
        with atomic_directory(place) as folder:
            (folder / "small").write_bytes(b"1")
            (folder / "large").write_bytes(b"1" * 100_000)
    else:
        write_atomic(place, b"1" * 100_000)
except StorageError as error:
    print(error)
"""


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_disk_without_room_for_the_data(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "place"
    if kind == "folder":
        fill(place, OLD)
    else:
        place.write_bytes(b"old")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(place), kind],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.startswith(f"Cannot write {place}: the file would be too large")
    assert list(tmp_path.iterdir()) == [place]
    if kind == "folder":
        assert content_of(place) == OLD
    else:
        assert place.read_bytes() == b"old"


def test_an_error_of_the_block_that_is_not_the_places_passes_unchanged(place: Path) -> None:
    with pytest.raises(PermissionError), atomic_directory(place):
        raise PermissionError(errno.EACCES, "denied", "/photos/secret.jpg")
    with pytest.raises(FileNotFoundError), atomic_directory(place):
        (place.parent / "no such photo").read_bytes()
    assert content_of(place) == OLD


def test_an_error_about_another_place_is_not_blamed_on_this_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), storage_errors(tmp_path / "out" / "model.onnx"):
        (tmp_path / "source" / "model.safetensors").read_bytes()
    place = tmp_path / "out" / "model.onnx"
    with pytest.raises(StorageError, match="its folder does not exist"), storage_errors(place):
        place.write_bytes(b"")
    with pytest.raises(StorageError, match="disk is full"), storage_errors(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "full", "/elsewhere/temporary")


def test_write_atomic_replaces_a_file_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.json"
    for data in (b"first", b"second"):
        write_atomic(path, data)
        assert path.read_bytes() == data
        assert list(path.parent.iterdir()) == [path]


def test_write_atomic_keeps_a_link_and_writes_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    write_atomic(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_write_atomic_refuses_irregular_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(StorageError, match="not a regular file"):
            write_atomic(path, b"")
    assert (tmp_path / "pipe").is_fifo()


def test_write_atomic_killed_half_way(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    killed = (
        "import os, sys; from pathlib import Path; from mmedge.files import atomic\n"
        "atomic._sync = lambda _: os.kill(os.getpid(), 9)\n"
        "atomic.write_atomic(Path(sys.argv[1]), b'new')"
    )
    done = subprocess.run([sys.executable, "-c", killed, str(path)], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 2
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_sha256_of_a_file_larger_than_one_chunk(tmp_path: Path) -> None:
    data = b"0123456789" * 300_000
    (tmp_path / "file").write_bytes(data)
    assert sha256_file(tmp_path / "file") == hashlib.sha256(data).hexdigest()
