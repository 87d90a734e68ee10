"""Which TensorRT is installed, and one logger for all that is made with it."""

from __future__ import annotations

import importlib.metadata
import sys
import threading
from pathlib import Path

import pytest
from fake_builder import FakeBuilderLibrary, OldBuilderFlag

from mmedge.errors import BackendUnavailableError
from mmedge.runtimes.trt import flavours
from mmedge.runtimes.trt.flavours import LoadedFlavour, installed_version, load_flavour, new_log


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is searched first for modules and metadata; no flavour is installed."""
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


def test_nothing_is_installed(packages: Path) -> None:
    assert installed_version("tensorrt") is None
    assert installed_version("tensorrt-rtx") is None


def test_the_version_comes_from_the_metadata_and_nothing_is_loaded(packages: Path) -> None:
    install(packages, "tensorrt", "raise RuntimeError", "tensorrt_cu13_bindings", "11.4.1.7")
    install(packages, "tensorrt_rtx_bindings", "raise", "tensorrt_rtx_cu12_bindings", "1.7.1.116")
    assert installed_version("tensorrt") == "11.4.1.7"
    assert installed_version("tensorrt-rtx") == "1.7.1.116"


def test_a_package_without_metadata_says_its_version_itself(packages: Path) -> None:
    install(packages, "tensorrt", 'import ctypes\n__version__ = "10.3.0"\nraise RuntimeError\n')
    assert installed_version("tensorrt") == "10.3.0"


def test_metadata_without_the_module_is_not_installed(packages: Path) -> None:
    install(packages, "something", "", "tensorrt", "10.3.0")
    assert installed_version("tensorrt") is None


@pytest.mark.parametrize(
    ("flavour", "told"),
    [
        ("tensorrt", ["--system-site-packages", "tensorrt-cu13", "mmedge[tensorrt-rtx]"]),
        ("tensorrt-rtx", ["mmedge[tensorrt-rtx]", "on a Jetson or a server ask for tensorrt"]),
    ],
)
def test_what_to_install_is_told_for_each_machine(
    flavour: str, told: list[str], packages: Path
) -> None:
    with pytest.raises(BackendUnavailableError, match="is not installed") as caught:
        load_flavour(flavour)
    assert all(words in str(caught.value) for words in told)


def test_bindings_without_their_libraries_are_told(packages: Path) -> None:
    source = 'raise ImportError("libnvinfer.so.10: cannot open shared object file")'
    install(packages, "tensorrt", source, "tensorrt", "10.3.0")
    with pytest.raises(BackendUnavailableError, match=r"10\.3\.0 cannot be loaded: libnvinfer"):
        load_flavour("tensorrt")


def test_a_runtime_alone_is_told(packages: Path) -> None:
    install(packages, "tensorrt", "class Runtime: ...", "tensorrt", "10.3.0")
    with pytest.raises(BackendUnavailableError, match="no builder and no ONNX parser"):
        load_flavour("tensorrt")


def test_a_flavour_is_loaded_by_the_first_of_its_names(packages: Path) -> None:
    for name in ("tensorrt_rtx_bindings", "tensorrt_rtx"):
        install(packages, name, "class Builder: ...\nclass OnnxParser: ...\n")
    loaded = load_flavour("tensorrt-rtx")
    assert loaded.module.__name__ == "tensorrt_rtx"
    assert loaded.version == "of an unknown version"


@pytest.mark.parametrize(("version", "flags"), [("10.3.0", 0b10), ("11.4.1", 0b1)])
def test_networks_are_asked_to_be_strongly_typed(version: str, flags: int) -> None:
    library = FakeBuilderLibrary(version)
    assert LoadedFlavour("tensorrt", version, library).network_flags == flags
    del library.NetworkDefinitionCreationFlag
    assert LoadedFlavour("tensorrt", version, library).network_flags == 0


def test_a_missing_builder_flag_is_none() -> None:
    library = FakeBuilderLibrary()
    loaded = LoadedFlavour("tensorrt", "10.3.0", library)
    assert loaded.builder_flag("WEIGHT_STREAMING") is library.BuilderFlag["WEIGHT_STREAMING"]
    library.BuilderFlag = OldBuilderFlag
    assert loaded.builder_flag("WEIGHT_STREAMING") is None


def test_a_library_has_one_logger_in_a_process() -> None:
    library = FakeBuilderLibrary()
    first, _ = new_log(library)
    second, _ = new_log(library)
    assert first is second
    assert new_log(FakeBuilderLibrary())[0] is not first


def test_a_thread_that_claims_its_messages_has_them_alone() -> None:
    logger, mine = new_log(FakeBuilderLibrary())
    _, other = new_log(logger.library)
    with mine:
        logger.log(1, "failed\n")
        logger.log(2, "careful")
        logger.log(4, "Layers:\nName: a")
        logger.log(4, "chatter")
        elsewhere = threading.Thread(target=logger.log, args=(1, "of another thread"))
        elsewhere.start()
        elsewhere.join()
    assert (mine.errors, mine.warnings, mine.layers) == (
        ["failed"],
        ["careful"],
        "Layers:\nName: a",
    )
    assert (other.errors, other.warnings, other.layers) == (["of another thread"], [], "")
    logger.log(0, "to all")
    assert (mine.errors[-1], other.errors[-1]) == ("to all", "to all")


def test_claims_can_be_nested() -> None:
    logger, outer = new_log(FakeBuilderLibrary())
    _, inner = new_log(logger.library)
    with outer:
        with inner:
            logger.log(1, "inner")
        logger.log(1, "outer")
    assert (outer.errors, inner.errors) == (["outer"], ["inner"])


def test_a_log_keeps_the_last_messages_and_no_more() -> None:
    logger, log = new_log(FakeBuilderLibrary())
    for number in range(500):
        logger.log(1, str(number))
    assert len(log.errors) == 100
    assert log.errors[-1] == "499"
