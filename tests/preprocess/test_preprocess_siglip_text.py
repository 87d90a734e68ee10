"""SigLIP's texts: a converted tokenizer behind TextProcessor against SiglipTokenizer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models.tiny_models import train_unigram
from transformers.models.siglip.tokenization_siglip import SiglipTokenizer

from mmedge.converters.sources.sentencepiece import unigram_json
from mmedge.preprocess import TextConfig, TextProcessor

LENGTH = 12
WORDS = ("red", "green", "circle", "square", "left", "of", "naïve", "日本", "É", "3")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("siglip") / "spiece.model"
    pairs = [f"a {one} {two}" for one in WORDS for two in WORDS]
    path.write_bytes(train_unigram(pairs, 80))
    return SiglipTokenizer(str(path), model_max_length=LENGTH)


@pytest.fixture(scope="module")
def processor(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> TextProcessor:
    path = tmp_path_factory.mktemp("converted") / "tokenizer.json"
    source: Any = SimpleNamespace(name="siglip", folder=Path(reference.vocab_file).parent)
    path.write_text(unigram_json(source, reference), encoding="utf-8")
    config = TextConfig(
        max_length=LENGTH,
        padding="max_length",
        pad_id=reference.pad_token_id,
        cleaning="siglip",
    )
    return TextProcessor(config, path)


def has_content(text: str) -> bool:
    """Whether anything is left for the model, and nothing that only the reference reads specially.

    A special token written out in a text ("</s>") is a special token to transformers and plain
    letters to mmedge: what a stranger types must not end the sequence.
    """
    canonical = SiglipTokenizer.canonicalize_text(
        SimpleNamespace(  # what the method takes of a tokenizer
            do_lower_case=True,
            remove_punctuation=lambda part: SiglipTokenizer.remove_punctuation(None, part),
        ),
        text.replace("\u2581", " "),
    )
    return bool(canonical) and not any(token in text for token in ("</s>", "<unk>", "<pad>"))


ODD = st.text("\x1b\u200b\u00ad\t aÉ\ufb01", max_size=5)  # dropped or changed on the way
PHRASES = st.lists(st.sampled_from(WORDS) | st.text(max_size=6) | ODD, min_size=1, max_size=9)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(text=PHRASES.map(" ".join).filter(has_content))
def test_ids_equal_transformers(text: str, reference: Any, processor: TextProcessor) -> None:
    expected = reference(
        [text], padding="max_length", truncation=True, max_length=LENGTH, return_tensors="np"
    )
    np.testing.assert_array_equal(processor([text])["input_ids"], expected["input_ids"])
