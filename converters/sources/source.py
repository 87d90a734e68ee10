"""Model sources: a local folder, an ONNX file or a hub id, read without running its code.

A folder is in transformers' format (`config.json`) or in open_clip's (`open_clip_config.json`).
Where it is in both, transformers' is read; open_clip's own prefixes, `local-dir:` of a folder and
`hf-hub:` of a hub id, ask for open_clip's.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmedge.converters.sources.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter
from mmedge.converters.sources.clean import unread_keys
from mmedge.converters.sources.config import Fields, check_architecture, read_fields
from mmedge.converters.sources.sentence_modules import model_folder, prompts
from mmedge.errors import BackendError, SourceError
from mmedge.files import sha256_file, storage_errors
from mmedge.runtimes.onnx_file import check_external_data, read_onnx_file

__all__ = ["OPEN_CLIP", "Source", "open_source"]

OPEN_CLIP = "open_clip"
"""`model_type` of a source in open_clip's format."""

# What transformers may open of a folder beside the weights; of these, objects of settings.
_READ = (".json", ".txt", ".model", ".jinja")
_SETTINGS = {
    "added_tokens.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    ADAPTER_CONFIG,
}
_MAX_TOKENIZER_BYTES = 256 << 20
_CONFIG = "config.json"
_OPEN_CLIP_CONFIG = "open_clip_config.json"
_OPEN_CLIP_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "model.safetensors",
)
_PREFIXES = ("local-dir:", "hf-hub:")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
# What is fetched from a hub: weights as safetensors, configuration, tokenizer. Never code.
_WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
# Of subfolders, those of sentence-transformers' modules alone: "1_Pooling".
_UNWANTED = ["[!0-9]*/*", "*/*/*"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_TO_SAFETENSORS = (
    "Load it where you trust it and save it again with model.save_pretrained(FOLDER), which "
    "writes model.safetensors."
)


@dataclass(frozen=True)
class Source:
    """A model on disk, checked to hold readable safetensors and a configuration.

    Attributes:
        folder: Where its files lie.
        name: How the source is called in the provenance; no path of this machine.
        revision: Commit of the hub repository, None for a folder.
        config: The content of the configuration file, with a `model_type`. The sizes of a
            `config.json` are checked against the tensors.
        weight_files: Safetensors files, sorted by name.
        shapes: Shape of each tensor, by name.
        adapter: The settings of a LoRA adapter to merge into the weights; None for no adapter.
        notes: What was left out, for the user to read.
        graph: The ONNX file where that is the source, else None.
        config_file: Name of the configuration file.
    """

    folder: Path
    name: str
    revision: str | None
    config: Mapping[str, Any]
    weight_files: tuple[Path, ...]
    shapes: Mapping[str, tuple[int, ...]]
    adapter: Fields | None = None
    notes: tuple[str, ...] = field(default=())
    graph: Path | None = None
    config_file: str = _CONFIG

    def sha256(self) -> str:
        """Return the hash of the graph's file and of the external data that it reads."""
        if self.graph is None:
            raise SourceError(f"{self.name} is not an ONNX file.")
        names = read_onnx_file(self.graph).external_locations
        files = [self.graph, *(self.graph.parent / name for name in names)]
        return hashlib.sha256("".join(map(sha256_file, files)).encode()).hexdigest()

    @property
    def fields(self) -> Fields:
        """The content of the configuration file, for typed reading."""
        return Fields(self.folder / self.config_file, self.config)

    @property
    def model_type(self) -> str:
        """The architecture's name: what `config.json` says, OPEN_CLIP, or onnx."""
        return str(self.config["model_type"])


def open_source(
    spec: str,
    revision: str | None = None,
    *,
    merge_adapter: bool = False,
    check: Callable[[Fields], None] | None = None,
) -> Source:
    """Open a local folder, or fetch a hub repository, and check that it can be converted.

    Args:
        spec: A folder, an .onnx file, or a hub id such as "openai/clip-vit-base-patch32". What
            exists wins. With the prefix `local-dir:` or `hf-hub:`, in open_clip's format.
        revision: Branch, tag or commit of the hub repository; None takes its default branch.
        merge_adapter: Merge the LoRA adapter beside the weights.
        check: Called with config.json before weights are fetched or read; refuses by an error.

    Raises:
        SourceError: If the source does not exist or cannot be fetched, has no configuration, has
            no safetensors weights (a pickle is never opened), its weights are damaged, or there
            is no adapter to merge.
    """
    for prefix in _PREFIXES:
        if spec.startswith(prefix):
            return _open_prefixed(prefix, spec.removeprefix(prefix), revision, merge_adapter)
    path = Path(spec).expanduser()
    if path.exists():
        if revision is not None:
            raise SourceError(
                f"{spec} is a local folder and has no revision '{revision}'. Omit it."
            )
        if path.suffix == ".onnx":
            return _read_graph(path, _local_name(spec))
        _check_config(path, check)
        return _read_folder(path, _local_name(spec), None, merge_adapter=merge_adapter)
    if not is_hub_id(spec):
        raise SourceError(
            f"No such folder: {spec}. Pass a folder in transformers' or open_clip's format, or a "
            "hub id such as openai/clip-vit-base-patch32, or an .onnx file."
        )
    if check is not None:
        _check_config(_fetch(spec, revision, [_CONFIG, _OPEN_CLIP_CONFIG]), check)
    folder = _fetch(spec, revision)
    return _read_folder(folder, spec, folder.name, merge_adapter=merge_adapter)


def is_hub_id(spec: str) -> bool:
    """Return whether a source is a hub id: spelled like one, and no path that exists."""
    if spec.startswith(_PREFIXES):
        return spec.startswith("hf-hub:")
    path_like = spec.startswith((".", "/", "~")) or Path(spec).expanduser().exists()
    return not path_like and _HUB_ID.fullmatch(spec) is not None


def _open_prefixed(prefix: str, spec: str, revision: str | None, merge_adapter: bool) -> Source:
    """Open a folder or a hub repository in open_clip's format."""
    if merge_adapter:
        raise SourceError(f"{prefix}{spec} has no adapter that can be merged. Omit the option.")
    if prefix == "local-dir:":
        if revision is not None:
            raise SourceError(f"{spec} is a folder and has no revision '{revision}'. Omit it.")
        return _read_open_clip(Path(spec).expanduser(), prefix + _local_name(spec), None)
    if _HUB_ID.fullmatch(spec) is None:
        raise SourceError(f"{prefix}{spec}: expected a hub id after {prefix}, such as timm/NAME.")
    folder = _fetch(spec, revision)
    return _read_open_clip(folder, prefix + spec, folder.name)


def _local_name(spec: str) -> str:
    path = Path(spec)
    if path.is_absolute() or spec.startswith("~") or ".." in path.parts:
        return path.expanduser().resolve().name
    return path.resolve().name if path.as_posix() == "." else path.as_posix()


def _check_config(folder: Path, check: Callable[[Fields], None] | None) -> None:
    """Check the config.json of a folder in transformers' format, where it has one."""
    path = folder / _CONFIG
    if check is not None and path.is_file() and not (folder / _OPEN_CLIP_CONFIG).is_file():
        check(read_fields(path))


def _fetch(repository: str, revision: str | None, wanted: Sequence[str] = _WANTED) -> Path:
    """Download files of a hub repository; the snapshot folder is named by its commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE

    # HTTPError is that of whichever client this version of the hub library uses.
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        GatedRepoError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        with storage_errors(Path(HF_HUB_CACHE)):
            folder = snapshot_download(
                repository,
                revision=revision,
                allow_patterns=list(wanted),
                ignore_patterns=_UNWANTED,
            )
    except GatedRepoError as error:
        why = "the repository is gated. Accept its terms on the hub and log in with `hf auth login`"
        raise SourceError(f"Cannot fetch {repository}: {why}.") from error
    except RevisionNotFoundError as error:
        why = f"it has no revision '{revision}'. Pass a branch, a tag or a commit that it has"
        raise SourceError(f"Cannot fetch {repository}: {why}.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        why = "there is no such folder here and no such repository on the hub. Check the spelling"
        raise SourceError(f"Cannot open {repository}: {why}.") from error
    except (LocalEntryNotFoundError, HTTPError) as error:
        why = (
            "there is no such folder here, and the hub cannot be reached. Check the spelling and "
            "the network, or download the repository elsewhere and pass its folder"
        )
        raise SourceError(f"Cannot open {repository}: {why}.") from error
    return Path(folder)


def _read_folder(folder: Path, name: str, revision: str | None, *, merge_adapter: bool) -> Source:
    if not folder.is_dir():
        raise SourceError(f"{folder} is not a folder. Pass the folder that holds config.json.")
    if not merge_adapter and _is_open_clip(folder):
        return _read_open_clip(folder, name, revision)
    folder = model_folder(folder)
    _check_files(folder)
    config = _read_config(folder)
    notes = []
    if "auto_map" in config.values:
        notes.append(
            f"{name} brings its own code (auto_map in config.json); it is not run, transformers' "
            f"own classes for '{config.text('model_type')}' are used."
        )
    for file, keys in unread_keys(folder).items():
        notes.append(f"{name}: keys of {file} that mmedge does not read: {', '.join(keys)}.")
    if names := tuple(prompts(folder)):
        notes.append(
            f"{name} was trained with prompts ({', '.join(names)}), which mmedge does not put "
            "before texts: pass texts that begin with them."
        )
    adapter = read_adapter(folder) if merge_adapter else None
    if adapter is None and (folder / ADAPTER_CONFIG).is_file():
        notes.append(
            f"{name} holds an adapter ({ADAPTER_CONFIG}), which was not applied: the bundle is of "
            "the base model. Pass --merge-adapter to merge it."
        )
    weight_files = _weight_files(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files:
        shapes.update(_read_shapes(path))
    check_architecture(config, shapes)
    return Source(
        folder, name, revision, config.values, weight_files, shapes, adapter, tuple(notes)
    )


def _is_open_clip(folder: Path) -> bool:
    """Tell whether a folder is in open_clip's format, and not in transformers' too.

    Beside open_clip's file, a config.json may be timm's, without a model_type, or that of the text
    tower.
    """
    if not (folder / _OPEN_CLIP_CONFIG).is_file():
        return False
    if not (folder / _CONFIG).is_file():
        return True
    model = read_fields(folder / _OPEN_CLIP_CONFIG).section("model_cfg")
    text = None if model is None else model.section("text_cfg")
    hugging_face = text is not None and text.values.get("hf_model_name") is not None
    return hugging_face or "model_type" not in read_fields(folder / _CONFIG).values


def _read_open_clip(folder: Path, name: str, revision: str | None) -> Source:
    if not (folder / _OPEN_CLIP_CONFIG).is_file():
        raise SourceError(f"{folder} has no {_OPEN_CLIP_CONFIG}. Pass a folder that has one.")
    _check_files(folder)
    config = {**read_fields(folder / _OPEN_CLIP_CONFIG).values, "model_type": OPEN_CLIP}
    found = [folder / file for file in _OPEN_CLIP_WEIGHTS if (folder / file).is_file()]
    if not found:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
        raise SourceError(
            f"{folder} holds no weights: expected {' or '.join(_OPEN_CLIP_WEIGHTS)}. "
            + (
                f"A pickle ({', '.join(pickles)}) can run any code when it is opened and is "
                "rejected: load it where you trust it, and save it again with safetensors.torch."
                "save_file(model.state_dict(), 'open_clip_model.safetensors')."
                if pickles
                else "Download it completely."
            )
        )
    shapes = _read_shapes(found[0])
    decoder = any(tensor.startswith("text_decoder.") for tensor in shapes)
    notes = (f"{name}: its text decoder, which writes captions, is left out.",) if decoder else ()
    return Source(
        folder, name, revision, config, (found[0],), shapes, None, notes,
        config_file=_OPEN_CLIP_CONFIG,
    )  # fmt: skip


def _read_graph(path: Path, name: str) -> Source:
    """Read an ONNX file and check that its external data is there."""
    try:
        check_external_data(path, read_onnx_file(path))
    except BackendError as error:
        raise SourceError(str(error)) from error
    return Source(path.parent, name, None, {"model_type": "onnx"}, (), {}, graph=path)


def _check_files(folder: Path) -> None:
    """Check that what transformers may open of a folder is regular files of bounded size."""
    for path in sorted(folder.iterdir()):
        if path.is_file():
            if path.name in _SETTINGS:
                read_fields(path)
            elif path.suffix in _READ and path.stat().st_size > _MAX_TOKENIZER_BYTES:
                raise SourceError(
                    f"{path} is larger than {_MAX_TOKENIZER_BYTES >> 20} MiB, the most that is "
                    "read. Remove it if it is not part of the model."
                )
        elif path.suffix in (*_READ, ".safetensors"):
            raise SourceError(
                f"{path} is not a regular file (a folder, a pipe, a device or a broken link). "
                "Replace it by the file itself."
            )


def _read_config(folder: Path) -> Fields:
    path = folder / "config.json"
    if not path.is_file():
        adapter = (folder / ADAPTER_CONFIG).is_file()
        raise SourceError(
            f"{folder} holds an adapter without its base model. Put both into one folder and pass "
            "--merge-adapter."
            if adapter
            else f"{folder} has no config.json. Pass a folder written by model.save_pretrained."
        )
    config = read_fields(path)
    config.text("model_type")
    return config


def _weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the files that transformers would load, in its order of preference."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        return (single,)
    if index.is_file():
        return _shards(index)
    found = sorted(folder.glob("*.safetensors"))
    found = [path for path in found if path.name != ADAPTER_WEIGHTS]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise SourceError(
            f"{folder} holds {names}: expected model.safetensors, or its index of several files. "
            "Name the one that is the model so."
        )
    if found:
        return tuple(found)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise SourceError(
            f"{folder} holds its weights as a pickle ({', '.join(pickles)}), which can run any "
            f"code when it is opened and is rejected. {_TO_SAFETENSORS}"
        )
    raise SourceError(
        f"{folder} holds no weights: expected model.safetensors. Download it completely."
    )


def _shards(index: Path) -> tuple[Path, ...]:
    files = read_fields(index)
    section = files.section("weight_map")
    if section is None or not section.values:
        raise files.error("weight_map", "the file of each tensor")
    names = sorted({section.text(tensor) for tensor in section.values})
    for name in names:
        if Path(name).name != name:
            raise SourceError(f"{index} names a file outside its folder: {name}. It is rejected.")
        if not (index.parent / name).is_file():
            raise SourceError(f"{index} names {name}, which is missing. Download it completely.")
    return tuple(index.parent / name for name in names)


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read a file's header and check that the file is whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError) as error:
        raise SourceError(
            f"{path} is not a whole safetensors file: {error}. Download it again."
        ) from error
    if not shapes:
        raise SourceError(f"{path} holds no tensors. Download it again.")
    return shapes
