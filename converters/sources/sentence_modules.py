"""Folders of sentence-transformers: the modules of `modules.json`, without that library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mmedge.converters.sources.config import Fields, read_fields
from mmedge.errors import SourceError
from mmedge.files.json_file import read_json

__all__ = [
    "MODULES_NAME",
    "POOLINGS",
    "SentenceModule",
    "check_similarity",
    "model_folder",
    "prompts",
    "read_modules",
    "read_pooling",
    "read_text_settings",
]

MODULES_NAME = "modules.json"
_PROMPTS_NAME = "config_sentence_transformers.json"
_MAX_BYTES, _MAX_MODULES = 1 << 20, 16
# By the pooling's name, in the order in which several are joined: its key in older files.
POOLINGS: Mapping[str, str] = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
# Names that the file has had.
_SETTINGS = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_ARGUMENTS = ("model_args", "tokenizer_args", "config_args", "processing_kwargs")


@dataclass(frozen=True)
class SentenceModule:
    """One module of a folder of sentence-transformers.

    Attributes:
        kind: Name of its class: Transformer, Pooling, Dense, Normalize, ...
        folder: Where its files lie.
        entry: Its entry of modules.json, for messages.
    """

    kind: str
    folder: Path
    entry: Fields


def read_modules(folder: Path) -> tuple[SentenceModule, ...]:
    """Return the modules of a folder, in order.

    Raises:
        SourceError: If modules.json cannot be read, holds no modules, or names code or a place
            outside of the folder.
    """
    file = folder / MODULES_NAME
    entries = read_json(file, max_bytes=_MAX_BYTES, error=SourceError)
    if not isinstance(entries, list) or not 1 <= len(entries) <= _MAX_MODULES:
        raise SourceError(f"{file}: expected a list of 1 to {_MAX_MODULES} modules.")
    return tuple(_module(folder, file, *entry) for entry in enumerate(entries))


def _module(folder: Path, file: Path, index: int, entry: object) -> SentenceModule:
    if not isinstance(entry, Mapping):
        raise SourceError(f"{file}, {index}: got {type(entry).__name__}, expected an object.")
    fields = Fields(file, entry, f"{index}.")
    kind, path = fields.text("type"), fields.values.get("path", "")
    if not kind.startswith("sentence_transformers."):
        raise fields.error("type", "a module of sentence_transformers", "Other code is not run.")
    if not isinstance(path, str) or (path and (Path(path).name != path or path == "..")):
        raise fields.error("path", "the name of a folder beside modules.json, or ''")
    return SentenceModule(kind.rsplit(".", 1)[-1], folder / path, fields)


def model_folder(folder: Path) -> Path:
    """Return where transformers' files lie: `0_CLIPModel/` of a CLIP, else the folder itself."""
    if (folder / "config.json").exists() or not (folder / MODULES_NAME).is_file():
        return folder
    first = read_modules(folder)[0]
    if first.kind != "CLIPModel":
        raise first.entry.error("path", "'': the model's files beside modules.json")
    return first.folder


def read_pooling(module: SentenceModule, width: int) -> tuple[str, ...]:
    """Return the poolings of a module, in the order in which they are joined.

    Args:
        module: Of the kind Pooling.
        width: Of the token embeddings.

    Raises:
        SourceError: If it has none, an unknown one, or another width.
    """
    config = read_fields(module.folder / "config.json")
    size = "word_embedding_dimension"
    size = size if size in config.values else "embedding_dimension"
    config.integer(size, width, width)
    named = config.values.get("pooling_mode")
    if named is None:
        # The library's default is the mean.
        found = [
            name
            for name, key in POOLINGS.items()
            if (config.flag(key) if key in config.values else name == "mean")
        ]
        if not found:
            raise config.error("pooling_mode_mean_tokens", "true, of this or of another pooling")
        return tuple(found)
    modes = [named] if isinstance(named, str) else named
    if not isinstance(modes, list) or not modes or any(mode not in POOLINGS for mode in modes):
        raise config.error("pooling_mode", f"one or more of {', '.join(POOLINGS)}")
    return tuple(name for name in POOLINGS if name in modes)


def read_text_settings(folder: Path) -> tuple[int | None, bool]:
    """Return the most tokens of a text, None where the file does not say, and lower-casing.

    Raises:
        SourceError: If the file passes arguments to transformers.
    """
    file = next((folder / name for name in _SETTINGS if (folder / name).is_file()), None)
    if file is None:
        return None, False
    settings = read_fields(file)
    for key in _ARGUMENTS:
        if settings.values.get(key):
            raise settings.error(key, "none: mmedge passes no arguments on")
    length = settings.values.get("max_seq_length")
    longest = None if length is None else settings.integer("max_seq_length", 1, 1 << 20)
    return longest, settings.flag("do_lower_case")


def check_similarity(folder: Path, *, normalised: bool) -> None:
    """Check that embeddings scaled to length 1 rank as the model's own do.

    Args:
        folder: Of the model.
        normalised: Whether its last module is Normalize, so that every similarity ranks alike.

    Raises:
        SourceError: If the model compares embeddings by their lengths too.
    """
    if normalised or not (folder / _PROMPTS_NAME).is_file():
        return
    config = read_fields(folder / _PROMPTS_NAME)
    if config.values.get("similarity_fn_name") not in (None, "cosine"):  # of any type
        raise config.error(
            "similarity_fn_name",
            "cosine, or Normalize as the last module",
            "mmedge scales embeddings to length 1, which would rank otherwise.",
        )


def prompts(folder: Path) -> Iterator[str]:
    """Yield the names of a model's prompts.

    Raises:
        SourceError: If one is put before every text.
    """
    if not (folder / _PROMPTS_NAME).is_file():
        return
    config = read_fields(folder / _PROMPTS_NAME)
    if config.values.get("default_prompt_name") is not None:
        raise config.error(
            "default_prompt_name", "null", "Set it to null, and put the prompt before each text."
        )
    section = config.section("prompts")
    for name in () if section is None else section.values:
        if section is not None and section.values[name]:
            yield name
