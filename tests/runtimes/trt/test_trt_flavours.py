"""Installed TensorRT versions, and their logger."""

from __future__ import annotations

import importlib.metadata
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from mmedge.errors import BackendUnavailableError
from mmedge.runtimes.trt import flavours
from mmedge.runtimes.trt.flavours import LoadedFlavour, installed_version, load_flavour, new_log


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that alone is searched for TensorRT; nothing is installed."""
    monkeypatch.syspath_prepend(str(tmp_path))
    found = flavours.find_spec

    def here(name: str) -> object:
        spec = found(name)
        if spec is None or spec.origin is None or not Path(spec.origin).is_relative_to(tmp_path):
            return None
        return spec

    def no_metadata(name: str) -> str:
        for path in importlib.metadata.distributions(name=name, path=[str(tmp_path)]):
            return path.version
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(flavours, "find_spec", here)
    monkeypatch.setattr(flavours, "version", no_metadata)
    for name in ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, name, None)  # so that what a test imports goes with it
        del sys.modules[name]
    return tmp_path


def install(folder: Path, module: str, source: str, distribution: str = "", at: str = "") -> None:
    (folder / module).mkdir()
    (folder / module / "__init__.py").write_text(source)
    if distribution:
        info = folder / f"{distribution}-{at}.dist-info"
        info.mkdir()
        name = distribution.replace("_", "-")
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {at}\n")


def test_the_version_is_read_and_nothing_is_loaded(packages: Path) -> None:
    install(packages, "something", "", "tensorrt_rtx", "1.7")  # metadata without the module
    assert installed_version("tensorrt-rtx") is None
    install(packages, "tensorrt_rtx_bindings", "raise", "tensorrt_rtx_cu12_bindings", "1.7.1.116")
    assert installed_version("tensorrt-rtx") == "1.7.1.116"
    install(packages, "tensorrt", 'import ctypes\n__version__ = "10.3.0"\nraise RuntimeError\n')
    assert installed_version("tensorrt") == "10.3.0"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            'raise ImportError("libnvinfer.so.10: missing")',
            r"10\.3\.0 cannot be loaded: libnvinfer",
        ),
        ("class Runtime: ...", "no builder and no ONNX parser"),
    ],
)
def test_an_incomplete_installation(source: str, message: str, packages: Path) -> None:
    install(packages, "tensorrt", source, "tensorrt", "10.3.0")
    with pytest.raises(BackendUnavailableError, match=message):
        load_flavour("tensorrt")


def test_a_flavour_is_loaded_by_the_first_of_its_names(packages: Path) -> None:
    for name in ("tensorrt_rtx_bindings", "tensorrt_rtx"):
        install(packages, name, "class Builder: ...\nclass OnnxParser: ...\n")
    loaded = load_flavour("tensorrt-rtx")
    assert loaded.module.__name__ == "tensorrt_rtx"
    assert loaded.version == "of an unknown version"


def library() -> Any:
    """A module with loggers."""
    made: Any = ModuleType("tensorrt")
    made.ILogger = type("ILogger", (), {"__init__": lambda _: None})
    return made


def test_differences_between_versions() -> None:
    made = library()
    loaded = LoadedFlavour("tensorrt", "10.3.0", made)
    assert loaded.network_flags == 0
    for number, flags in ((1, 0b10), (0, 0b1)):  # of 10.x, of 11.x
        made.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=number)
        assert loaded.network_flags == flags
    made.BuilderFlag = SimpleNamespace(TF32="TF32")
    assert (loaded.builder_flag("TF32"), loaded.builder_flag("WEIGHT_STREAMING")) == ("TF32", None)


def test_a_library_has_one_logger_and_threads_claim_their_messages() -> None:
    module = library()
    logger, mine = new_log(module)
    again, other = new_log(module)
    assert again is logger
    assert new_log(library())[0] is not logger
    with mine:
        logger.log(1, "failed\n")
        logger.log(2, "careful")
        logger.log(4, "Layers:\nName: a")
        logger.log(4, "chatter")
        elsewhere = threading.Thread(target=logger.log, args=(1, "of another thread"))
        elsewhere.start()
        elsewhere.join()
        with other:
            logger.log(1, "nested")
    assert (mine.errors, mine.warnings) == (["failed"], ["careful"])
    assert mine.layers == "Layers:\nName: a"
    assert (other.errors, other.warnings) == (["of another thread", "nested"], [])
    for number in range(500):
        logger.log(0, str(number))
    assert mine.errors[-1] == other.errors[-1] == "499"
    assert len(mine.errors) == 100
