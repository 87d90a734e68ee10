"""A small tokenizer in CLIP's own format: lower case, byte-level BPE, words ended by ``</w>``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizerFast

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_TOKENS = 48
"""Context length: the longest caption of the world takes 46 tokens, start and end included."""


def build_tokenizer(texts: Iterable[str], merge_count: int = 1024) -> CLIPTokenizerFast:
    """Learn merges from texts and return a tokenizer laid out as CLIP's.

    Ids run as in OpenAI's vocabulary: the 256 bytes, the 256 bytes that end a word, the merges in
    the order learnt, then start and end. Any text can be encoded; the end token has the highest id
    (so the legacy pooling by ``argmax`` finds it too) and also serves as padding.

    Args:
        texts: The corpus. Sentences are split as CLIP splits them.
        merge_count: At most this many merges; a small corpus runs out sooner.
    """
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    reference = CLIPTokenizerFast().backend_tokenizer
    learner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    learner.pre_tokenizer = reference.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + merge_count,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    learnt = cast("list[list[str]]", _merges(learner))
    merges = [(left, right) for left, right in learnt]
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet)]
    tokens += dict.fromkeys(left + right for left, right in merges)
    vocab = {token: index for index, token in enumerate(dict.fromkeys([*tokens, START, END]))}
    return CLIPTokenizerFast(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def _merges(tokenizer: Tokenizer) -> object:
    """Read the merges back; the library offers them through its JSON form alone."""
    import json

    return json.loads(tokenizer.to_str())["model"]["merges"]
