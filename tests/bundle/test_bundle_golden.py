"""Golden vectors: equal bytes for equal arrays, and nothing believed on an archive's word."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from bundles import golden_vectors
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mmedge.bundle import Golden, load_golden, save_golden
from mmedge.bundle import golden as golden_module
from mmedge.errors import InputError, IntegrityError
from mmedge.specs import Array


def one(array: Array, name: str = "x") -> Golden:
    return Golden(inputs={"role": {name: array}}, outputs={"role": {"fp32": {"y": array}}})


def npy(array: Array, **settings_: bool) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, **settings_)
    return buffer.getvalue()


def header(dtype: str, shape: str, body: bytes = b"\0" * 4) -> bytes:
    """A member with a header of any dtype and shape."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + body


NO_DTYPES = ["|b4", "<b8", "<f1", "|f8", "<i1", ">f4", "|O", "<U1", "<c8", "|V4", "<m8[s]"]
LARGE = npy(np.zeros(100, np.float64))


def zipped(path: Path) -> list[zipfile.ZipInfo]:
    with zipfile.ZipFile(path) as file:
        return file.infolist()


def archive(path: Path, members: Mapping[str, bytes], compression: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


@settings(max_examples=60)
@given(
    array=hnp.arrays(
        st.sampled_from([np.dtype(kind) for kind in "?bBhHiIqQefd"]),
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
    ),
    name=st.sampled_from(["x", "past.0/key", "a b", "größe"]),
)
def test_arrays_survive(array: Array, name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("golden") / "golden.npz"
    save_golden(path, one(array, name))
    loaded = load_golden(path)
    for given_back in (loaded.inputs["role"][name], loaded.outputs["role"]["fp32"]["y"]):
        assert given_back.dtype == array.dtype
        assert given_back.shape == array.shape
        np.testing.assert_array_equal(given_back, array)  # NaN equals NaN here
        assert not given_back.flags.writeable


def test_numpy_reads_the_file(tmp_path: Path) -> None:
    save_golden(tmp_path / "golden.npz", golden_vectors())
    with np.load(tmp_path / "golden.npz", allow_pickle=False) as arrays:
        assert "inputs/image_encoder/pixel_values" in arrays
        np.testing.assert_array_equal(
            arrays["outputs/text_encoder/fp32/embedding"],
            golden_vectors().outputs["text_encoder"]["fp32"]["embedding"],
        )


def test_equal_arrays_give_equal_bytes_whatever_their_order_and_layout(tmp_path: Path) -> None:
    a = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    b = np.arange(3)
    for name, golden in {
        "first": Golden({"r": {"a": a, "b": b}}, {"r": {"v": {"a": a}}, "q": {"v": {"b": b}}}),
        "second": Golden(
            {"r": {"b": b[::-1][::-1], "a": np.asfortranarray(a)}},
            {"q": {"v": {"b": b}}, "r": {"v": {"a": a.astype(">f4")}}},
        ),
    }.items():
        save_golden(tmp_path / name, golden)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_another_process_at_another_time_gives_the_same_bytes(tmp_path: Path) -> None:
    save_golden(tmp_path / "here", golden_vectors())
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from bundles import golden_vectors; from mmedge.bundle import save_golden\n"
        "save_golden(Path(sys.argv[1]), golden_vectors())"
    )
    command = [
        sys.executable,
        "-c",
        script,
        str(tmp_path / "there"),
        str(Path(__file__).parents[1]),
    ]
    environment = {**os.environ, "TZ": "Pacific/Kiritimati", "PYTHONHASHSEED": "1"}
    subprocess.run(command, check=True, timeout=120, env=environment)
    assert (tmp_path / "here").read_bytes() == (tmp_path / "there").read_bytes()


@pytest.mark.parametrize(
    "array", [np.array([{}], dtype=object), np.array(["text"]), np.array([1j]), np.array(b"raw")]
)
def test_only_numbers_are_saved(tmp_path: Path, array: Array) -> None:
    with pytest.raises(InputError, match="inputs/role/x has dtype"):
        save_golden(tmp_path / "golden.npz", one(array))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("role", ["", "a/b"])
def test_a_role_that_would_not_come_back_is_not_saved(tmp_path: Path, role: str) -> None:
    with pytest.raises(InputError, match="cannot name a role or variant"):
        save_golden(tmp_path / "golden.npz", Golden({role: {"x": np.zeros(1)}}, {}))


class Trap:
    """Unpickled, it makes the folder that it was given."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    trap = np.array([Trap(sprung)], dtype=object)
    path = archive(tmp_path / "golden.npz", {"inputs/role/x.npy": npy(trap, allow_pickle=True)})
    with pytest.raises(IntegrityError, match="not a plain numeric array"):
        load_golden(path)
    assert not sprung.exists()


def test_a_compressed_archive_is_not_unpacked(tmp_path: Path) -> None:
    bomb = {"inputs/role/x.npy": npy(np.zeros(10_000_000, np.uint8))}
    path = archive(tmp_path / "golden.npz", bomb, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 20_000
    with pytest.raises(IntegrityError, match="compressed or encrypted"):
        load_golden(path)


def rewrite(path: Path, old: bytes, new: bytes, *, times: int = 1) -> None:
    data = path.read_bytes()
    assert data.count(old) == times
    assert len(old) == len(new)
    path.write_bytes(data.replace(old, new))


def test_a_header_is_not_believed(tmp_path: Path) -> None:
    """Numpy itself would allocate what the header declares before it reads."""
    member = npy(np.zeros((2, 3), np.float32)).replace(b"(2, 3), }     ", b"(200000, 3), }")
    path = archive(tmp_path / "golden.npz", {"inputs/role/x.npy": member})
    with pytest.raises(IntegrityError, match=r"declares float32\(200000, 3\) and has \d+ bytes"):
        load_golden(path)


def test_members_that_share_bytes_are_refused(tmp_path: Path) -> None:
    """Two entries of the directory point at the same bytes: the trick behind the densest bombs."""
    path = archive(tmp_path / "golden.npz", {f"inputs/role/{n}.npy": LARGE for n in "ab"})
    first, second = zipped(path)
    content = path.read_bytes()
    old = second.header_offset.to_bytes(4, "little")
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, first.header_offset.to_bytes(4, "little")))
    with pytest.raises(IntegrityError, match=r"'inputs/role/b\.npy' is cut off, or contradicts"):
        load_golden(path)


def test_a_member_inside_another_is_refused(tmp_path: Path) -> None:
    inner = archive(tmp_path / "inner.npz", {"inputs/role/b.npy": LARGE}).read_bytes()
    start, end = inner.index(b"PK\x01\x02"), inner.index(b"PK\x05\x06")
    outer = {"inputs/role/a.npy": npy(np.frombuffer(inner[:start], np.uint8))}
    content = archive(tmp_path / "golden.npz", outer).read_bytes()
    place = content.index(inner[:start])
    entry = inner[start : end - 17 - 4] + place.to_bytes(4, "little") + inner[end - 17 : end]
    first, last = content.index(b"PK\x01\x02", place + start), content.rindex(b"PK\x05\x06")
    directory = content[first:last] + entry
    numbers = struct.pack("<4H2IH", 0, 0, 2, 2, len(directory), first, 0)
    content = content[:first] + directory + b"PK\x05\x06" + numbers
    (tmp_path / "golden.npz").write_bytes(content)
    with np.load(tmp_path / "golden.npz") as arrays:
        assert arrays["inputs/role/b"].shape == (100,)
    with pytest.raises(IntegrityError, match=r"it declares \d+ bytes and has \d+"):
        load_golden(tmp_path / "golden.npz")


def test_a_file_beyond_the_cap_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "golden.npz"
    save_golden(path, golden_vectors())
    monkeypatch.setattr(golden_module, "MAX_GOLDEN_BYTES", path.stat().st_size - 1)
    with pytest.raises(IntegrityError, match="expected at most"):
        load_golden(path)


GOOD = npy(np.zeros(3, np.float32))
NO_SHAPES = ["(,)", "(3)", "(1 2)", "(1,2)", "(01,)", "(3, )", "(1, 1", f"({'1, ' * 33}1)"]
NO_SHAPES += [f"(0, {'9' * 30})", f"({2**70},)", "(0, -1)", "[3]"]
MALFORMED = {
    "a name without a role": {"x.npy": GOOD},
    "an input without a name": {"inputs/role.npy": GOOD},
    "an output without a variant": {"outputs/role/x.npy": GOOD},
    "no array": {"inputs/role/readme.txt": b"hello"},
    "a foreign file": {"inputs/role/x.npy": b"hello"},
    "nothing": {"inputs/role/x.npy": b""},
    "a cut header": {"inputs/role/x.npy": GOOD[:40]},
    "cut data": {"inputs/role/x.npy": GOOD[:-1]},
    "data too many": {"inputs/role/x.npy": GOOD + b"\0"},
    "text": {"inputs/role/x.npy": npy(np.array(["text"]))},
    "a structure": {"inputs/role/x.npy": npy(np.zeros(1, "f4,f4"))},
    "Fortran order": {"inputs/role/x.npy": npy(np.asfortranarray(np.zeros((2, 2))))},
    "a negative axis": {"inputs/role/x.npy": GOOD.replace(b"(3,), }", b"(-3,), ")},
    "code in the header": {"inputs/role/x.npy": GOOD.replace(b"False", b"exit ")},
    "parentheses without end": {"inputs/role/x.npy": GOOD.replace(b"(3,)", b"((((")},
    **{f"dtype {name}": {"inputs/role/x.npy": header(name, "()")} for name in NO_DTYPES},
    **{f"shape {shape}": {"inputs/role/x.npy": header("<f4", shape)} for shape in NO_SHAPES},
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_member_is_refused(tmp_path: Path, kind: str) -> None:
    path = archive(tmp_path / "golden.npz", MALFORMED[kind])
    with pytest.raises(IntegrityError, match="cannot be trusted"):
        load_golden(path)


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "golden.npz", {"inputs/role/x.npy": GOOD, "inputs/role/y.npy": GOOD})
    rewrite(path, b"inputs/role/y.npy", b"inputs/role/x.npy", times=2)
    with pytest.raises(IntegrityError, match="two members have one name"):
        load_golden(path)


@pytest.mark.parametrize("data", [b"", b"hello", b"PK\x05\x06" + b"\0" * 17, b"\x93NUMPY"])
def test_a_file_that_is_no_archive_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "golden.npz").write_bytes(data)
    with pytest.raises(IntegrityError, match="cannot be trusted"):
        load_golden(tmp_path / "golden.npz")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=r"Cannot read .*golden\.npz: No such"):
        load_golden(tmp_path / "golden.npz")


@given(data=st.data())
@settings(max_examples=400)
def test_any_damage_is_found_or_harmless(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever changes, load_golden ends in an IntegrityError or in the same arrays."""
    path = tmp_path_factory.mktemp("golden") / "golden.npz"
    array = np.arange(4, dtype=np.float32)
    save_golden(path, one(array))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        # Most of the file is padding: half of the changes fall on the directory at its end.
        first = data.draw(st.sampled_from([0, content.find(b"PK\x01\x02")]))
        at = data.draw(st.integers(max(first, 0), len(content) - 1))
        piece = st.binary(max_size=4) | st.sampled_from([b"\xff" * 4, b"\xff" * 8, b"\0" * 4])
        content[at : at + data.draw(st.integers(0, 8))] = data.draw(piece)
    path.write_bytes(content)
    try:
        loaded = load_golden(path)
    except IntegrityError:
        return
    for arrays in loaded.inputs.values():
        for found in arrays.values():
            np.testing.assert_array_equal(found, array)
