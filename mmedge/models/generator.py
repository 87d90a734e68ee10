"""Generator: text generation with a decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

from mmedge.bundle.kinds import GeneratorKind
from mmedge.errors import InputError
from mmedge.generation import LogitsHook, generate, pad_left
from mmedge.models.base import Model
from mmedge.models.running import Given, Made, Run, Settings
from mmedge.preprocess.text import TextProcessor

__all__ = ["Generator"]

_PROFILED_TOKENS = 16


class Generator(Model):
    """A causal language model.

    with mmedge.load("gpt2.mmedge") as gpt2:
        gpt2.generate(["Once upon a time"], max_new_tokens=20)
    """

    kind = "generator"

    @property
    def settings(self) -> GeneratorKind:
        """The manifest's section: ids of special tokens, largest length."""
        return cast(GeneratorKind, self.manifest.kind)

    def generate(
        self, prompts: Sequence[str], *, max_new_tokens: int = 32, hook: LogitsHook | None = None
    ) -> list[str]:
        """Continue texts with their most likely tokens.

        Args:
            prompts: At least one text.
            max_new_tokens: Largest number of tokens to add.
            hook: Changes the logits before each choice.

        Returns:
            What was added to each prompt, special tokens left out.

        Raises:
            TextError: If a prompt cannot be tokenized.
            InputError: If prompt and new tokens exceed the model's length.
            BackendError: If the engine fails, or the model is closed.
        """
        tokenizer = self._tokenizer()
        made = self.generate_ids(
            tokenizer.tokenize(prompts), max_new_tokens=max_new_tokens, hook=hook
        )
        return tokenizer.decode(made)

    def generate_ids(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 32,
        hook: LogitsHook | None = None,
    ) -> list[list[int]]:
        """Continue token ids with the most likely ones.

        Args:
            prompts: At least one prompt of at least one token.
            max_new_tokens: Largest number of tokens to add.
            hook: Changes the logits before each choice.

        Returns:
            The new tokens of each prompt, up to and with the one that ends it.

        Raises:
            InputError: If a prompt is empty, or prompt and new tokens exceed the model's length.
            BackendError: If the engine fails, or the model is closed.
        """
        kind = self.settings
        session, state = self._session(kind.decoder), self._bundle.state_of(kind.decoder)
        assert state is not None  # noqa: S101, checked by the kind
        ids, mask = pad_left(prompts, kind.pad_id)
        rows = generate(
            session,
            state,
            ids,
            mask,
            max_new_tokens=max_new_tokens,
            eos_ids=kind.eos_ids,
            pad_id=kind.pad_id,
            hook=hook,
        )
        return [_ended(row.tolist(), kind.eos_ids) for row in rows]

    @property
    def runs(self) -> Mapping[str, Run]:
        """Continue texts."""
        texts = frozenset({"texts"})
        return {"generate": Run(self._run_generate, texts, texts)}

    def _run_generate(self, given: Given, settings: Settings) -> Made:
        made = self.generate(given.texts, max_new_tokens=settings.max_new_tokens)
        pairs = zip(given.texts, made, strict=True)
        return Made([{"input": text, "continuation": new} for text, new in pairs])

    def call(self, role: str, sample: object) -> Callable[[], object] | None:
        """Return a call that continues a text, or its beginning, by up to 16 tokens."""
        if role != self.settings.decoder or not isinstance(sample, str):
            return None
        new = min(_PROFILED_TOKENS, self.settings.max_length // 2 + 1)

        def continued() -> list[str]:
            tokenizer = self._tokenizer()
            (ids,) = tokenizer.tokenize([sample])
            made = self.generate_ids(
                [ids[: self.settings.max_length + 1 - new]], max_new_tokens=new
            )
            return tokenizer.decode(made)

        return continued

    def _tokenizer(self) -> TextProcessor:
        processor = self._processor(self.settings.decoder)
        if not isinstance(processor, TextProcessor):
            raise InputError(f"{self._bundle.path} has no tokenizer. Use generate_ids.")
        return processor


def _ended(row: list[int], eos_ids: Sequence[int]) -> list[int]:
    """Truncate a row after its first end token."""
    ends = [at for at, token in enumerate(row) if token in eos_ids]
    return row[: ends[0] + 1] if ends else row
