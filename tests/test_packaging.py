"""The wheel, installed into empty environments: whole, alone, and without what it must not need."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
TREES = {"mmedge": "mmedge", "mmedge/converters": "converters", "mmedge/runtimes": "runtimes"}
PAGES = ROOT / "mmedge" / "serving" / "pages"
WORKSTATION = ["torch", "transformers", "optimum", "onnx", "onnx_ir", "onnxscript", "psutil"]


@dataclass(frozen=True)
class Environment:
    """An environment that holds the wheel and nothing of this source tree."""

    folder: Path

    @property
    def site_packages(self) -> Path:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return self.folder / "lib" / version / "site-packages"

    def run(self, *command: str, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
        """Run a command of the environment in its own folder, away from the source tree."""
        return subprocess.run(
            [str(self.folder / "bin" / command[0]), *command[1:]],
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def output(self, *command: str) -> str:
        """Run a command that must succeed, as run, and return what it prints."""
        done = self.run(*command, timeout_s=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def import_all(self, modules: list[str]) -> dict[str, str]:
        """Import modules in one process and return the file that each came from."""
        code = (
            "import importlib, json, sys\n"
            "found = {n: importlib.import_module(n).__file__ for n in json.loads(sys.argv[1])}\n"
            "print('\\n' + json.dumps(found))"
        )
        done = self.run("python", "-I", "-c", code, json.dumps(modules))
        assert done.returncode == 0, done.stderr
        files: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
        return files


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the source tree."""
    source = tmp_path_factory.mktemp("source")
    for name in ["pyproject.toml", "setup.py", "README.md", "LICENSE"]:
        shutil.copy(ROOT / name, source / name)
    for name in [*TREES.values(), "tests", "examples", "benchmarks"]:
        for file in (ROOT / name).rglob("*"):
            if file.suffix in {".py", ".typed", ".html", ".css", ".js", ".svg"}:
                copy = source / file.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, copy)
    built = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."],
        cwd=source,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (found,) = (source / "dist").glob("*.whl")
    return found


def make_environment(folder: Path, wheel: Path) -> Environment:
    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)
    environment = Environment(folder)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    options = ["install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    subprocess.run([*pip, *options, str(wheel)], check=True, timeout=120)
    return environment


@pytest.fixture(scope="module")
def workstation(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The wheel with everything that this environment has installed (but not its mmedge)."""
    environment = make_environment(tmp_path_factory.mktemp("workstation") / "venv", wheel)
    # A folder named in a .pth joins sys.path, its own .pth files (the editable mmedge) do not.
    lines = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    (environment.site_packages / "this.pth").write_text("\n".join(lines) + "\n", "utf-8")
    return environment


@pytest.fixture(scope="module")
def device(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The wheel with its declared base dependencies, and theirs, and not a package more."""
    environment = make_environment(tmp_path_factory.mktemp("device") / "venv", wheel)
    (mmedge,) = distributions(name="mmedge", path=[str(environment.site_packages)])
    for found in closure(mmedge):
        for file in found.files or []:
            top = file.parts[0]
            link = environment.site_packages / top
            if top not in {"..", "__pycache__"} and not link.exists():
                link.symlink_to(Path(str(found.locate_file(top))))
    return environment


def closure(root: Distribution) -> list[Distribution]:
    """Everything that an install of `root` without extras brings."""
    seen: dict[str, Distribution] = {}
    todo = [root]
    while todo:
        for line in todo.pop().requires or []:
            requirement = Requirement(line)
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            name = canonicalize_name(requirement.name)
            if name not in seen:
                seen[name] = distribution(requirement.name)
                todo.append(seen[name])
    return list(seen.values())


def source_files() -> dict[str, Path]:
    """Every .py of the three trees by its path in the wheel."""
    return {
        f"{package}/{file.relative_to(ROOT / folder).as_posix()}": file
        for package, folder in TREES.items()
        for file in (ROOT / folder).rglob("*.py")
    }


def source_modules() -> list[str]:
    return sorted(
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in source_files()
    )


def test_the_wheel_holds_the_three_trees_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        licences = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    pages = {f"mmedge/serving/pages/{page.name}" for page in PAGES.iterdir()}
    assert names == {*source_files(), *pages, "mmedge/py.typed", "mmedge/reports/page.html"}
    assert len(licences) == 1


def test_every_module_imports_from_the_installed_wheel(workstation: Environment) -> None:
    files = workstation.import_all(source_modules())
    outside = {n: f for n, f in files.items() if not Path(f).is_relative_to(workstation.folder)}
    assert outside == {}


def test_the_device_side_needs_only_what_the_base_install_declares(device: Environment) -> None:
    modules = [name for name in source_modules() if not name.startswith("mmedge.converters")]
    files = device.import_all(modules)
    assert all(Path(file).is_relative_to(device.folder) for file in files.values())


def test_the_base_install_has_no_torch(device: Environment) -> None:
    code = (
        "import importlib.util as u, json, sys\n"
        "print(json.dumps([n for n in json.loads(sys.argv[1]) if u.find_spec(n)]))"
    )
    absent = device.run("python", "-I", "-c", code, json.dumps([*WORKSTATION, "numpy"]))
    assert json.loads(absent.stdout) == ["numpy"], absent.stderr


def test_the_metadata_keeps_the_workstation_in_an_extra(device: Environment) -> None:
    (mmedge,) = distributions(name="mmedge", path=[str(device.site_packages)])
    requirements = [Requirement(line) for line in mmedge.requires or []]
    base = {canonicalize_name(found.name) for found in requirements if not found.marker}
    convert = {
        canonicalize_name(found.name)
        for found in requirements
        if found.marker and found.marker.evaluate({"extra": "convert"})
    }
    assert {"torch", "transformers", "optimum", "onnx"} <= convert
    assert base & convert == set()
    assert len(base) < 10


def test_no_build_of_onnx_runtime_is_a_dependency(wheel: Path) -> None:
    """They share one module, so users who need another than ours could not install it."""
    builds = {"onnxruntime", "onnxruntime-gpu"}
    found = {}
    for extra in ("", "cpu", "gpu", "convert", "openvino", "cuda", "tensorrt-rtx"):
        needed = (r for r in declared(wheel) if not r.marker or r.marker.evaluate({"extra": extra}))
        found[extra] = {canonicalize_name(requirement.name) for requirement in needed} & builds
    assert found.pop("cpu") == {"onnxruntime"}
    assert found.pop("gpu") == {"onnxruntime-gpu"}
    assert not any(found.values())


@pytest.mark.parametrize("build", [None, "onnxruntime", "onnxruntime-gpu"])
def test_pip_check_passes_without_an_engine_and_with_each(
    device: Environment, build: str | None
) -> None:
    stub = device.site_packages / f"{build}-1.32.0.dist-info"
    if build is not None:
        stub.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {build}\nVersion: 1.32.0\n"
        (stub / "METADATA").write_text(metadata, "utf-8")
    python = str(device.folder / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "check"]
    checked = subprocess.run(pip, capture_output=True, text=True, timeout=120, check=False)
    shutil.rmtree(stub, ignore_errors=True)
    assert checked.returncode == 0, checked.stdout


def test_loading_without_an_engine_names_the_command(
    device: Environment, tiny_bundle_original: Path
) -> None:
    code = "import sys, mmedge; mmedge.load(sys.argv[1])"
    done = device.run("python", "-c", code, str(tiny_bundle_original))
    assert "BackendUnavailableError: " in done.stderr
    assert 'pip install "mmedge[cpu]"' in done.stderr
    assert '"mmedge[gpu]" for CUDA' in done.stderr


def test_the_installed_command_prints_its_version(device: Environment) -> None:
    (mmedge,) = distributions(name="mmedge", path=[str(device.site_packages)])
    done = device.run("mmedge", "--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"mmedge {mmedge.version}"), done.stderr


def test_convert_without_its_extra_names_the_command(device: Environment) -> None:
    done = device.run("mmedge", "convert", str(ROOT / "examples"), "-o", "out.mmedge")
    assert done.returncode != 0
    assert "mmedge[convert,cpu]" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    assert not (device.folder / "out.mmedge").exists()


def test_serve_without_its_extra_names_the_command(device: Environment) -> None:
    done = device.run("mmedge", "serve", "photos.index")
    assert done.returncode == 1
    assert 'pip install "mmedge[serve]"' in done.stderr
    assert "Traceback" not in done.stderr


SMOKE = """
import json, sys
import numpy as np
import mmedge

found = {}
frames = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)
for precision in ["fp32", "fp16", "int8-dynamic", "int8-static"]:
    with mmedge.load(sys.argv[1], precision=precision) as model:
        images = model.encode_image(list(frames))
        texts = model.encode_text(["a red circle", "a photo of a green square"])
    found[precision] = (images @ texts.T).tolist()
print(json.dumps(found))
"""


def interpreter(version: str) -> str:
    """A Python of that version which really starts, or skip."""
    name = f"python{version}"
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/{name}"))
    for candidate in [*filter(None, [shutil.which(name)]), *map(str, pyenv)]:
        started = subprocess.run([candidate, "-c", "import venv"], capture_output=True, check=False)
        if started.returncode == 0:
            return candidate
    pytest.skip(f"no {name} on this machine")


def lowest(requirement: Requirement) -> str:
    (bound,) = [spec.version for spec in requirement.specifier if spec.operator == ">="]
    return f"{requirement.name}=={bound}"


@pytest.fixture(scope="module")
def converted(
    clip_folder: Path, photo_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A bundle with every precision there is, from this environment's converter."""
    bundle = tmp_path_factory.mktemp("converted") / "tiny.mmedge"
    convert = [sys.executable, "-c", "import mmedge.cli as cli; cli.main()", "convert"]
    options = ["-o", str(bundle), "--precision", "fp32,fp16,int8"]
    calibration = ["--calibration", str(photo_folder), "--quiet"]
    command = [*convert, str(clip_folder), *options, *calibration]
    subprocess.run(command, check=True, timeout=300)
    return bundle


def declared(wheel: Path) -> list[Requirement]:
    """The requirements of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = archive.read(name).decode("utf-8")
    return [Requirement(found) for found in re.findall(r"(?m)^Requires-Dist: (.*)$", metadata)]


def fresh(python: str, folder: Path) -> Environment:
    """An environment of a Python, with its pip and nothing else."""
    subprocess.run([python, "-m", "venv", str(folder)], check=True, timeout=120)
    return Environment(folder)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("version", "ends"), [("3.10", "lowest"), ("3.13", "newest")])
def test_a_device_runs_at_both_ends_of_the_ranges(
    version: str, ends: str, wheel: Path, converted: Path, tmp_path: Path
) -> None:
    """Needs a package index: the lowest versions that pyproject.toml allows, and today's newest."""
    wanted = [
        lowest(found) if ends == "lowest" else f"{found.name}{found.specifier}"
        for found in declared(wheel)
        if not found.marker or found.marker.evaluate({"extra": "cpu"})
    ]
    run = fresh(interpreter(version), tmp_path / "venv").output

    run("pip", "install", "--quiet", "--only-binary", ":all:", *wanted, str(wheel))
    bundle = str(converted)
    run("mmedge", "--help")  # typer 0.15 breaks here beside a newer click
    run("mmedge", "verify", bundle)
    run("mmedge", "inspect", bundle)
    report = ["--json", "profile.json", "--html", "profile.html", "--quiet"]
    run("mmedge", "profile", bundle, "--seconds", "0.1", "--cold-starts", "1", *report)
    similarities = json.loads(run("python", "-W", "error", "-c", SMOKE, bundle))
    here = subprocess.run(
        [sys.executable, "-c", SMOKE, bundle], capture_output=True, check=True, timeout=120
    )
    for precision, expected in json.loads(here.stdout).items():
        tolerance = 0.02 if precision.startswith("int8") else 0.005
        np.testing.assert_allclose(similarities[precision], expected, atol=tolerance)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ends", ["lowest", "newest"])
def test_a_workstation_converts_at_both_ends_of_the_ranges(
    ends: str, wheel: Path, clip_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    """Needs a package index. torch is the pinned one at both ends: each further one is gigabytes.

    By hand, on the whole of tests/converters: torch 2.10 and 2.11; one conversion: torch 2.14.
    """
    pins = (ROOT / "constraints.txt").read_text("utf-8")
    (torch,) = re.findall(r"(?m)^torch==\S+$", pins)
    ours = {"extra": "convert"}
    extra = [found for found in declared(wheel) if found.marker and found.marker.evaluate(ours)]
    extra.append(Requirement("onnxruntime>=1.27"))  # the first with tables of 2 bits
    wanted = [
        lowest(found) if ends == "lowest" else f"{found.name}{found.specifier}"
        for found in extra
        if found.name != "torch"
    ]
    run = fresh(interpreter("3.11"), tmp_path / "venv").output
    run("pip", "install", "--quiet", torch, *wanted, str(wheel))

    names = "fp32,fp16,bf16,int8-dynamic,int8-static,int8-weight,int4,fp8"
    options = ["-o", "tiny.mmedge", "--precision", names, "--calibration", str(photo_folder)]
    reported = json.loads(run("mmedge", "convert", str(clip_folder), *options, "--json"))
    assert {entry["variant"] for entry in reported["variants"]} == set(names.split(","))
    run("mmedge", "verify", "tiny.mmedge")
