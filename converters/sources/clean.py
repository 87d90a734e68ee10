"""Tokenizer and processor files of a source, copied without settings that name code or files.

transformers lets a checkpoint's JSON files name classes, modules (`auto_map`), attention kernels of
the hub and paths. What it loads of a source is therefore a copy: vocabularies as they are, and of
the settings only the keys listed here.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from mmedge.converters.sources.config import Fields, read_fields
from mmedge.errors import SourceError
from mmedge.files.json_file import read_file
from mmedge.preprocess.tokenizer import check_tokenizer

__all__ = ["clean_copy", "unread_keys"]

_TOKENIZER_JSON = "tokenizer.json"
_MAX_BYTES = 64 << 20
_VOCABULARIES = (
    "added_tokens.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
    _TOKENIZER_JSON,
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)
_TOKENS = {
    "additional_special_tokens", "audio_token", "bos_token", "boi_token", "cls_token", "eoi_token",
    "eos_token", "extra_special_tokens", "image_token", "mask_token", "pad_token", "sep_token",
    "unk_token", "video_token",
}  # fmt: skip
_TOKENIZER = _TOKENS | {
    "add_bos_token", "add_eos_token", "add_prefix_space", "added_tokens_decoder", "chat_template",
    "clean_up_tokenization_spaces", "do_basic_tokenize", "do_lower_case", "do_normalize", "errors",
    "extra_ids", "legacy", "max_length", "model_input_names", "model_max_length", "never_split",
    "pad_token_id", "padding_side", "spaces_between_special_tokens", "split_special_tokens",
    "strip_accents", "tokenize_chinese_chars", "tokenizer_class", "trim_offsets",
    "truncation_side",
}  # fmt: skip
_PROCESSOR = {
    "crop_size", "data_format", "do_center_crop", "do_convert_rgb", "do_normalize", "do_pad",
    "do_rescale", "do_resize", "feature_extractor_type", "image_mean", "image_processor_type",
    "image_std", "input_data_format", "model_input_names", "pad_size", "resample",
    "rescale_factor", "size", "crop_pct", "include_top", "rescale_offset", "max_num_patches",
    "patch_size",
    # Audio.
    "chunk_length", "chunk_length_s", "dither", "feature_size", "fft_window_size",
    "frequency_max", "frequency_min",
    "hop_length", "max_length_s", "n_fft", "n_samples", "nb_frequency_bins", "nb_max_frames",
    "nb_max_samples", "padding", "padding_side", "padding_value", "return_attention_mask",
    "sampling_rate", "top_db", "truncation",
}  # fmt: skip
_SETTINGS: Mapping[str, set[str]] = {
    "config.json": {"model_type", "tokenizer_class"},
    "preprocessor_config.json": _PROCESSOR,
    "processor_config.json": {"image_processor", "feature_extractor"},
    "special_tokens_map.json": _TOKENS,
    "tokenizer_config.json": _TOKENIZER,
}
_PARTLY = ("config.json", "processor_config.json")  # what else they hold is others' business
# A class is looked up by name among all that transformers has, models included.
_CLASSES = {
    "feature_extractor_type": r"\w+(FeatureExtractor|ImageProcessor(Fast|Pil)?)",
    "image_processor_type": r"\w+ImageProcessor(Fast|Pil)?",
    "tokenizer_class": r"\w+Tokenizer(Fast)?|TokenizersBackend",
}
# Written by transformers for people and for itself; without effect on what is computed.
_INERT = re.compile(
    r"_.*|.*_file|backend|is_local|local_files_only|name_or_path|processor_class|"
    r"transformers_version|use_fast"
)


@contextmanager
def clean_copy(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder with what tokenizers and processors are loaded from.

    Args:
        folder: The source's folder.

    Raises:
        SourceError: If a file of settings is no JSON object, a class is no tokenizer or processor,
            or tokenizer.json has steps whose work has no bound.
    """
    with tempfile.TemporaryDirectory(prefix="mmedge-source-") as made:
        copy = Path(made)
        for name in _VOCABULARIES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, copy / name)
        if (copy / _TOKENIZER_JSON).is_file():
            data = read_file(copy / _TOKENIZER_JSON, max_bytes=_MAX_BYTES, error=SourceError)
            check_tokenizer(data, folder / _TOKENIZER_JSON, error=_reject)
        for name, keys in _SETTINGS.items():
            if (folder / name).is_file():
                kept = _kept(read_fields(folder / name), keys)
                # One tower has the tokenizer of the whole model; timm's file has no model_type.
                if name == "config.json" and "model_type" in kept:
                    kept["model_type"] = re.sub(
                        "_(text|vision)_model$", "", str(kept["model_type"])
                    )
                (copy / name).write_text(json.dumps(kept), encoding="utf-8")
        yield copy


def _reject(reason: str) -> SourceError:
    return SourceError(f"{reason} Save the tokenizer with ordinary steps.")


def unread_keys(folder: Path) -> dict[str, list[str]]:
    """Return the keys that clean_copy leaves out, by file, for the user to know of.

    Keys that have no effect on what is computed are not among them.

    Raises:
        SourceError: If a file of settings is no JSON object.
    """
    unread: dict[str, list[str]] = {}
    for name, keys in _SETTINGS.items():
        if name not in _PARTLY and (folder / name).is_file():
            found = sorted(set(read_fields(folder / name).values) - keys)
            unread[name] = [key for key in found if not _INERT.fullmatch(key)]
    return {name: keys for name, keys in unread.items() if keys}


def _kept(fields: Fields, keys: set[str]) -> dict[str, object]:
    kept: dict[str, object] = {}
    for key in fields.values.keys() & keys:
        value = fields.values[key]
        part = key in {"image_processor", "feature_extractor"}
        section = fields.section(key) if part else None
        if section is not None:
            value = _kept(section, _PROCESSOR)
        elif value is not None and not re.fullmatch(_CLASSES.get(key, ".*"), str(value), re.DOTALL):
            raise fields.error(key, "a tokenizer's or processor's class in transformers")
        kept[key] = value
    return kept
