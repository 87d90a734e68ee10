"""A hostile `tokenizer.json` is refused, or its work is bounded; nothing but MmedgeErrors comes."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from bundles import tokenizer_json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from mmedge.errors import BundleError, IntegrityError, MmedgeError, TextError
from mmedge.preprocess.config import TextConfig
from mmedge.preprocess.text import MAX_TEXT_BYTES, TextProcessor
from mmedge.preprocess.tokenizer import BoundedTokenizer

WORDS: dict[str, Any] = {"type": "WordLevel", "vocab": {"<unk>": 0, "a": 1}, "unk_token": "<unk>"}
PIECES = {**WORDS, "type": "WordPiece", "continuing_subword_prefix": "##"}
PAIRS = {"type": "BPE", "vocab": {"a": 0, "aa": 1}, "merges": [["a", "a"]]}
SAMPLES = ("a", "a a", "a" * 200, "a" * 200 + "!", "ÄÖ 東京 \U0001f5fc", " \n a")
SPECIAL = {"SpecialToken": {"id": "s", "type_id": 0}}
SEQUENCE = {"Sequence": {"id": "A", "type_id": 0}}


def replace(pattern: Mapping[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": dict(pattern), "content": content}


def split(pattern: str) -> dict[str, Any]:
    regex = {"Regex": pattern}
    return {"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False}


def table(replacement: bytes) -> dict[str, Any]:
    data = (1024).to_bytes(4, "little") + bytes(1024) + replacement + b"\0"  # finds nothing
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


def template(single: list[Any], ids: int = 1) -> dict[str, Any]:
    special = {"s": {"id": "s", "ids": [0] * ids, "tokens": ["a"] * ids}}
    pair = [SEQUENCE, {"Sequence": {"id": "B", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": pair,
        "special_tokens": special,
    }


def sequence(key: str, steps: list[Any]) -> dict[str, Any]:
    return {"type": "Sequence", key: steps}


def nested(levels: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"type": "NFC"}
    for _ in range(levels):
        inner = sequence("normalizers", [inner])
    return inner


def document(**parts: object) -> dict[str, Any]:
    made: dict[str, Any] = {"version": "1.0", "added_tokens": [], "model": WORDS}
    for part in ("truncation", "padding", "normalizer", "post_processor", "decoder"):
        made[part] = None
    return made | {"pre_tokenizer": {"type": "Whitespace"}} | parts


def written(folder: Path, content: object) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


TEN = replace({"String": "a"}, "a" * 10)
REFUSED: dict[str, dict[str, Any]] = {
    "a text multiplied": {"normalizer": sequence("normalizers", [TEN] * 4)},
    "one large replacement": {"normalizer": replace({"String": "a"}, "a" * 100_000)},
    "inserted before every character": {"normalizer": replace({"Regex": ""}, "a" * 9_000)},
    "inserted at nothing": {"normalizer": replace({"String": ""}, "a" * 9_000)},
    "prepended": {"normalizer": {"type": "Prepend", "prepend": "a" * 9_000}},
    "a large table": {"normalizer": table(b"a" * 9_000)},
    "a table cut off": {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="},
    },
    "no base64": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "%"}},
    "many steps": {"normalizer": sequence("normalizers", [{"type": "NFC"}] * 65)},
    "deep steps": {"normalizer": nested(20)},
    "unknown normalizer": {"normalizer": {"type": "Python"}},
    "no type": {"normalizer": {}},
    "no object": {"normalizer": 1},
    "catastrophic normalizer": {"normalizer": replace({"Regex": "(a|a|aa)+$"}, "x")},
    "catastrophic pre-tokenizer": {"pre_tokenizer": split("(a+)+$")},
    "catastrophic in a sequence": {
        "pre_tokenizer": sequence("pretokenizers", [{"type": "Digits"}, split("(a+)+$")])
    },
    "unknown pre-tokenizer": {"pre_tokenizer": {"type": "Python"}},
    "catastrophic decoder": {"decoder": replace({"Regex": "(a+)+$"}, "x")},
    "unknown decoder": {"decoder": {"type": "Python"}},
    "a token multiplied": {"decoder": sequence("decoders", [TEN, TEN])},
    "a long word": {"model": {**WORDS, "vocab": {"<unk>": 0, "a" * 9999: 1}}},
    "a long added token": {"added_tokens": [{"id": 9, "content": "a" * 9999}]},
    "text repeated": {"post_processor": template([SEQUENCE, SEQUENCE])},
    "no text": {"post_processor": template([SPECIAL])},
    "many special tokens": {"post_processor": template([SPECIAL] * 1000 + [SEQUENCE])},
    "a long special token": {"post_processor": template([SPECIAL, SEQUENCE], 1000)},
    "unknown post-processor": {"post_processor": {"type": "Python"}},
    "empty words": {"model": {**WORDS, "vocab": {}}},
    "empty pieces": {"model": {**PIECES, "vocab": {}, "max_input_chars_per_word": 100}},
    "empty pairs": {"model": {**PAIRS, "vocab": {}, "merges": []}},
    "empty unigram": {"model": {"type": "Unigram", "vocab": [], "unk_id": None}},
    "no unknown token": {"model": {**WORDS, "unk_token": "<none>"}},
    "unigram without unknown": {
        "model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": None}
    },
    "unknown beyond": {"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 7}},
    "long pieces": {"model": {"type": "Unigram", "vocab": [["a" * 9999, 0.0]], "unk_id": 0}},
    "long words": {"model": {**PIECES, "max_input_chars_per_word": 1 << 40}},
    "dropout": {"model": {**PAIRS, "dropout": 0.5}},
    "long affix": {"model": {**PAIRS, "end_of_word_suffix": "a" * 100_000}},
    "unknown model": {"model": {"type": "Python", "vocab": {"a": 0}}},
    "no model": {"model": None},
}


@pytest.mark.parametrize("parts", REFUSED.values(), ids=list(REFUSED))
def test_unbounded_axes_are_refused(tmp_path: Path, parts: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match=r"tokenizer\.json: .*onvert the model again"):
        BoundedTokenizer(written(tmp_path, document(**parts)), 16)


@pytest.mark.parametrize("content", [[], 1, None, "text", {}, {"model": []}, {"model": {}}])
def test_other_files_are_no_tokenizer(tmp_path: Path, content: object) -> None:
    with pytest.raises(BundleError, match="tokenizer"):
        BoundedTokenizer(written(tmp_path, content), 16)


@pytest.mark.parametrize(
    "model",
    [
        WORDS,
        PAIRS,
        {**PIECES, "max_input_chars_per_word": 100},
        {"vocab": [["a", 0.0]], "unk_id": 0},
    ],
)
def test_a_model_from_before_kinds_were_named_is_opened(
    tmp_path: Path, model: dict[str, Any]
) -> None:
    untyped = {key: value for key, value in model.items() if key != "type"}
    tokenizer = BoundedTokenizer(written(tmp_path, document(model=untyped)), 16)
    assert tokenizer.encode(["a"]) == [[tokenizer.vocabulary()["a"]]]
    with pytest.raises(BundleError, match="empty vocabulary"):
        BoundedTokenizer(written(tmp_path, document(model={**untyped, "vocab": {}})), 16)


SPACES = replace({"Regex": " {2,}"}, "▁")
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
LLAMA_DECODER = sequence(
    "decoders",
    [
        replace({"String": "▁"}, " "),
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
)
UNIGRAM = {"type": "Unigram", "vocab": [["<unk>", 0.0], ["▁a", -1.0]], "unk_id": 0}
IN_USE: dict[str, dict[str, Any]] = {
    "bert": {
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                       "strip_accents": None, "lowercase": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": template([SPECIAL, SEQUENCE, SPECIAL]),
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {**PIECES, "max_input_chars_per_word": 100},
    },
    "t5": {
        "normalizer": sequence(
            "normalizers",
            [table(b"a" * 33), {"type": "Strip", "strip_left": False, "strip_right": True}, SPACES],
        ),
        "pre_tokenizer": METASPACE,
        "decoder": METASPACE,
        "model": UNIGRAM,
    },
    "albert": {
        "normalizer": sequence(
            "normalizers",
            [
                replace({"String": "``"}, '"'),
                replace({"String": "''"}, '"'),
                {"type": "NFKD"},
                {"type": "StripAccents"},
                {"type": "Lowercase"},
                table(b"a" * 33),
                replace({"Regex": " {2,}"}, " "),
            ],
        ),
        "pre_tokenizer": METASPACE,
        "decoder": METASPACE,
        "model": UNIGRAM,
    },
    "llama": {
        "normalizer": sequence(
            "normalizers",
            [{"type": "Prepend", "prepend": "▁"}, replace({"String": " "}, "▁")],
        ),
        "pre_tokenizer": None,
        "decoder": LLAMA_DECODER,
        "model": {**PAIRS, "byte_fallback": False, "fuse_unk": True},
    },
    "qwen": {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": sequence("pretokenizers", [split(r"\p{L}+|\s+(?!\S)|\s+"), BYTES]),
        "post_processor": BYTES,
        "decoder": BYTES,
        "model": PAIRS,
    },
    "whisper": {
        "pre_tokenizer": BYTES,
        "post_processor": template([SPECIAL, SPECIAL, SPECIAL, SEQUENCE, SPECIAL]),
        "decoder": BYTES,
        "model": PAIRS,
    },
    "gemma": {
        "normalizer": replace({"String": " "}, "▁"),
        "pre_tokenizer": {"type": "Split", "pattern": {"String": " "},
                          "behavior": "MergedWithPrevious", "invert": False},
        "decoder": LLAMA_DECODER,
        "model": PAIRS,
    },
}  # fmt: skip


@pytest.mark.parametrize("parts", IN_USE.values(), ids=list(IN_USE))
def test_tokenizers_in_use_are_opened(tmp_path: Path, parts: dict[str, Any]) -> None:
    tokenizer = BoundedTokenizer(written(tmp_path, document(**parts)), 512)
    assert tokenizer.max_text_bytes > 4096
    ids = tokenizer.encode(["a  a", "a"])
    assert all(ids)
    assert len(tokenizer.decode(ids)) == 2


def test_there_is_one_opener() -> None:
    """transformers opens a source's, checked before; see converters/sources/clean.py."""
    root = Path(__file__).parents[2]
    opens = {
        file.relative_to(root).as_posix()
        for tree in ("mmedge", "converters", "runtimes")
        for file in (root / tree).rglob("*.py")
        if "Tokenizer.from_" in file.read_text("utf-8")
    }
    assert opens == {"mmedge/preprocess/tokenizer.py", "converters/sources/tokenizer.py"}


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="none"):
        BoundedTokenizer(tmp_path / "none", 16)


def test_the_tokenizer_of_a_bundle_may_take_the_longest_texts(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    assert BoundedTokenizer(tmp_path / "tokenizer.json", 16).max_text_bytes >= MAX_TEXT_BYTES


def test_a_text_may_be_shorter_where_steps_make_it_longer(tmp_path: Path) -> None:
    path = written(tmp_path, document(normalizer=sequence("normalizers", [TEN] * 2)))
    tokenizer = BoundedTokenizer(path, 16)
    assert tokenizer.max_text_bytes == (16 << 20) // 100
    config = TextConfig(max_length=16, padding="longest", pad_id=0)
    with pytest.raises(TextError, match=rf"more than the {tokenizer.max_text_bytes} allowed"):
        TextProcessor(config, path).tokenize(["a" * (tokenizer.max_text_bytes + 1)])


def test_a_text_without_a_known_token_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, document(model=PAIRS))
    config = TextConfig(max_length=16, padding="longest", pad_id=0)
    with pytest.raises(TextError, match="Text 1: the tokenizer knows no part of it"):
        TextProcessor(config, path)(["a", "東"])


def test_a_panic_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pattern that Oniguruma gives up on, past the check."""
    monkeypatch.setattr("mmedge.preprocess.tokenizer.check_pattern", lambda _: None)
    tokenizer = BoundedTokenizer(written(tmp_path, document(pre_tokenizer=split("(a+)+$"))), 16)
    with pytest.raises(BundleError, match="failed on a text"):
        tokenizer.encode(["a" * 60 + "!"])


def test_a_table_that_leads_out_of_itself_is_an_error(tmp_path: Path) -> None:
    """Its trie has one node: the library looks for others behind it, and panics."""
    data = base64.b64encode((4).to_bytes(4, "little") + bytes(4) + b"a\0").decode()
    normalizer = {"type": "Precompiled", "precompiled_charsmap": data}
    tokenizer = BoundedTokenizer(written(tmp_path, document(normalizer=normalizer)), 16)
    with pytest.raises(BundleError, match="failed on a text"):
        tokenizer.encode(["a"])


def test_interrupts_are_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = BoundedTokenizer(written(tmp_path, document()), 16)

    class Interrupted:
        def encode_batch_fast(self, _: object, **__: object) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer, "_tokenizer", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode(["a"])


STEPS = st.sampled_from(
    [
        TEN,
        replace({"Regex": ""}, "x"),
        replace({"String": ""}, "x"),
        replace({"Regex": r"\s+"}, " "),
        table(b"xy"),
        *({"type": kind} for kind in ("NFC", "NFKD", "Lowercase", "StripAccents", "Nmt")),
        {"type": "Prepend", "prepend": "a"},
        {"type": "Strip", "strip_left": True, "strip_right": True},
        {"type": "ByteLevel"},
        {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
         "strip_accents": None, "lowercase": True},
    ]
)  # fmt: skip
PRE_STEPS = st.sampled_from(
    [
        split(""),
        split("a|b"),
        {"type": "Split", "pattern": {"String": ""}, "behavior": "Removed", "invert": True},
        *({"type": kind} for kind in ("Whitespace", "WhitespaceSplit", "BertPreTokenizer")),
        {"type": "Digits", "individual_digits": True},
        {"type": "Punctuation", "behavior": "MergedWithNext"},
        {"type": "FixedLength", "length": 0},
        {"type": "FixedLength", "length": 3},
        {"type": "CharDelimiterSplit", "delimiter": "a"},
        {"type": "UnicodeScripts"},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    ]
)
MODELS = st.sampled_from(
    [
        WORDS,
        PAIRS,
        {**PIECES, "max_input_chars_per_word": 100},
        {"type": "Unigram", "vocab": [["<unk>", 0.0], ["a", -1.0]], "unk_id": 0},
        {"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": None, "byte_fallback": True},
        {**WORDS, "vocab": {"<unk>": 1 << 31}},
        {**WORDS, "vocab": {"<unk>": -1}},
        {**PAIRS, "merges": [["a", "b"]]},
        {**PAIRS, "unk_token": "none", "fuse_unk": True},
    ]
)


@given(
    normalizers=st.lists(STEPS, max_size=3),
    pre_tokenizers=st.lists(PRE_STEPS, max_size=3),
    model=MODELS,
    post=st.sampled_from([None, template([SPECIAL, SEQUENCE]), template([SEQUENCE, SPECIAL], 3)]),
    text=st.sampled_from(SAMPLES),
)
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_samples_stay_within_their_bounds(
    tmp_path: Path,
    normalizers: list[Any],
    pre_tokenizers: list[Any],
    model: dict[str, Any],
    post: dict[str, Any] | None,
    text: str,
) -> None:
    content = document(
        normalizer=sequence("normalizers", normalizers),
        pre_tokenizer=sequence("pretokenizers", pre_tokenizers),
        model=model,
        post_processor=post,
    )
    path = written(tmp_path, content)
    try:
        tokenizer = BoundedTokenizer(path, 16)
        (ids,) = tokenizer.encode([text])
    except MmedgeError:
        return
    assert len(ids) <= 16
    growth = (16 << 20) / tokenizer.max_text_bytes
    library = Tokenizer.from_str(path.read_text("utf-8"))
    if library.normalizer is not None:
        assert len(library.normalizer.normalize_str(text).encode()) <= growth * len(text.encode())


@given(data=st.data())
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_damaged_file_is_an_mmedge_error(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(Tokenizer.to_str(Tokenizer(models.BPE({"a": 0}, []))).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    path = tmp_path / "tokenizer.json"
    path.write_bytes(bytes(content))
    with suppress(MmedgeError):
        BoundedTokenizer(path, 16).encode(["a", "b a"])
