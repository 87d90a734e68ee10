"""TextProcessor against transformers' tokenizers, id for id."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import CLIPTokenizer
from transformers.models.siglip.tokenization_siglip import SiglipTokenizer

from mmedge.errors import BundleError, IntegrityError, TextError
from mmedge.preprocess import MAX_TEXT_BYTES, TextConfig, TextProcessor

LENGTH = 16
START, END = "<|startoftext|>", "<|endoftext|>"


def clip_tokenizer() -> Any:
    """A CLIP tokenizer over all bytes, with a few merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e</w>"), ("c", "a"), ("ca", "t</w>"), ("r", "e"), ("re", "d</w>")]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += [*("".join(pair) for pair in merges), START, END]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        model_max_length=LENGTH,
    )


@pytest.fixture(scope="module")
def reference() -> Any:
    return clip_tokenizer()


@pytest.fixture(scope="module")
def tokenizer_file(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    reference.save_pretrained(folder)
    return folder / "tokenizer.json"


def config(**changes: object) -> TextConfig:
    settled: dict[str, object] = {"max_length": LENGTH, "padding": "longest", "pad_id": 0}
    return TextConfig.model_validate(settled | changes)


TEXTS = st.lists(st.text(min_size=1, max_size=60).filter(str.strip), min_size=1, max_size=4)


@pytest.mark.parametrize("padding", ["longest", "max_length"])
def test_ids_and_mask_equal_transformers(
    padding: str, reference: Any, tokenizer_file: Path
) -> None:
    pad_id = reference.pad_token_id
    processor = TextProcessor(
        config(padding=padding, pad_id=pad_id, attention_mask="attention_mask"), tokenizer_file
    )

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(texts=TEXTS)
    def check(texts: list[str]) -> None:
        expected = reference(
            texts,
            padding=padding,
            truncation=True,
            max_length=LENGTH,
            return_tensors="np",
        )
        got = processor(texts)
        assert got.keys() == {"input_ids", "attention_mask"}
        for name, array in got.items():
            assert array.dtype == np.int64
            np.testing.assert_array_equal(array, expected[name])

    check()


def test_truncation_keeps_the_closing_token(reference: Any, tokenizer_file: Path) -> None:
    processor = TextProcessor(config(), tokenizer_file)
    (ids,) = processor.tokenize(["the red cat " * 50])
    assert len(ids) == LENGTH
    assert ids[0] == reference.bos_token_id
    assert ids[-1] == reference.eos_token_id


def test_padding_follows_the_longest_text_of_the_call(tokenizer_file: Path) -> None:
    processor = TextProcessor(config(pad_id=7), tokenizer_file)
    ids = processor(["the", "the red cat"])["input_ids"]
    assert ids.shape == (2, 5)
    np.testing.assert_array_equal(ids[0, 3:], [7, 7])
    assert processor(["the"])["input_ids"].shape == (1, 3)


def test_only_the_inputs_of_the_graph_are_made(tokenizer_file: Path) -> None:
    processor = TextProcessor(config(input="tokens"), tokenizer_file)
    assert processor(["the cat"]).keys() == {"tokens"}


def test_padding_and_truncation_of_the_file_are_overridden(
    tokenizer_file: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.enable_padding(length=64, pad_id=3)
    tokenizer.enable_truncation(4)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    texts = ["the red cat sees the red cat"]
    np.testing.assert_array_equal(
        TextProcessor(config(), path)(texts)["input_ids"],
        TextProcessor(config(), tokenizer_file)(texts)["input_ids"],
    )


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=st.text(max_size=60) | st.text(" \t\u2581\u00a0aB!?.\u0130", max_size=20))
def test_canonical_text_equals_siglip(text: str) -> None:
    # The processor's effect is seen through a tokenizer that keeps each canonical text whole.
    spaces_restored = text.replace("\u2581", " ")  # SiglipTokenizer.tokenize does this first
    siglip = SimpleNamespace(
        do_lower_case=True,
        remove_punctuation=lambda part: SiglipTokenizer.remove_punctuation(None, part),
    )
    expected = SiglipTokenizer.canonicalize_text(siglip, spaces_restored)
    processor = TextProcessor.__new__(TextProcessor)
    processor.config = config(cleaning="siglip")
    if expected:
        assert processor.check(text, 0) == expected
    else:
        with pytest.raises(TextError, match=r"empty|nothing is left"):
            processor.check(text, 0)


def test_canonicalization_is_applied_before_tokenization(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "</s>": 1, "red": 2, "cat": 3}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    text = "  RED,\n\n cat! "
    assert TextProcessor(config(cleaning="siglip"), path).tokenize([text]) == [[2, 3, 1]]
    assert TextProcessor(config(), path).tokenize([text]) == [[0, 0, 1]]
    with pytest.raises(TextError, match="Text 1: nothing is left once it is cleaned"):
        TextProcessor(config(cleaning="siglip"), path).tokenize(["red", "?!"])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "Texts: got none"),
        ("red", r"Pass \[text\]"),
        (b"red", r"got bytes, expected str. Decode it"),
        (3, "Texts: got int, expected several str"),
        (iter([]), "Texts: got none"),
        (["red", ""], "Text 1: empty"),
        ([" \n\t\u00a0", "red"], "Text 0: empty"),
        (["red", 3], "Text 1: got int, expected str"),
        (["red", None], "Text 1: got NoneType, expected str"),
        ([b"red"], r"Text 0: got bytes. Decode it with text.decode\('utf-8'\)"),
        ([b"r\xffd"], r"Text 0: got bytes. They are not UTF-8 either \(byte 1\)"),
        (["red \ud800"], "Text 0: not valid Unicode, a lone surrogate stands at character 4"),
        (["x" * (MAX_TEXT_BYTES + 1)], "Text 0: 1000001 bytes, more than the 1000000 allowed"),
    ],
)
def test_bad_text_is_named(texts: Any, message: str, tokenizer_file: Path) -> None:
    with pytest.raises(TextError, match=message):
        TextProcessor(config(), tokenizer_file)(texts)


def test_long_text_below_the_limit_is_truncated(tokenizer_file: Path) -> None:
    (ids,) = TextProcessor(config(), tokenizer_file).tokenize(["the cat " * 10_000])
    assert len(ids) == LENGTH


def test_tokenizer_file_that_cannot_be_used(tokenizer_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(IntegrityError, match=r"Cannot read .*tokenizer\.json"):
        TextProcessor(config(), path)
    for content in (b"", b"{", b"{}", json.dumps({"model": {"type": "?"}}).encode()):
        path.write_bytes(content)
        with pytest.raises(BundleError, match="not a tokenizer"):
            TextProcessor(config(), path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(BundleError, match="not UTF-8"):
        TextProcessor(config(), path)
    with pytest.raises(BundleError, match="leaves no room"):
        TextProcessor(config(max_length=2), tokenizer_file)


def test_threads_share_a_processor(tokenizer_file: Path) -> None:
    processor = TextProcessor(config(), tokenizer_file)
    texts = [f"the red cat {n}" for n in range(200)]
    alone = [processor.tokenize([text])[0] for text in texts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda text: processor.tokenize([text])[0], texts))
    assert together == alone
    assert processor.tokenize(texts) == alone


def test_positions_are_counted_back_from_the_last(tokenizer_file: Path) -> None:
    processor = TextProcessor(config(positions="kept"), tokenizer_file)
    feed = processor(["a red circle", "a"])
    length = feed["input_ids"].shape[1]
    assert feed["kept"].tolist() == [list(range(length))[::-1]] * 2
    assert set(processor.config.inputs) == feed.keys()
