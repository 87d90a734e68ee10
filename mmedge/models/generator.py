"""Generator: text generation with a decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import cast

import numpy as np

from mmedge.bundle.kinds import GeneratorKind
from mmedge.errors import BundleError, InputError, IntegrityError
from mmedge.files.json_file import read_file
from mmedge.generation import Completion, Decoding, GenerationOptions, Prefix
from mmedge.generation.beam import beam_search
from mmedge.generation.constraint import Matcher, Vocabulary
from mmedge.generation.decoding import LOGITS
from mmedge.generation.loop import check_length, generate, prefill
from mmedge.generation.options import DEFAULT_NEW_TOKENS
from mmedge.generation.prefix import common_length
from mmedge.generation.rows import Row
from mmedge.generation.streaming import TextStream
from mmedge.models.base import Model
from mmedge.models.running import Given, Made, Run, Settings
from mmedge.preprocess.chat import ChatTemplate, Message, flattened
from mmedge.preprocess.text import TextProcessor
from mmedge.runtimes.session import Session
from mmedge.specs import State

__all__ = ["Generator"]

_GREEDY = GenerationOptions()
_PROFILED_TOKENS = 16
_TEMPLATE_BYTES = 1 << 20


class Generator(Model):
    """A causal language model.

    with mmedge.load("qwen2.mmedge") as qwen2:
        qwen2.complete("Once upon a time", max_new_tokens=20).text
        for piece in qwen2.stream_chat([{"role": "user", "content": "Hello"}]):
            print(piece, end="", flush=True)
    """

    kind = "generator"
    _vocabulary: Vocabulary | None = None
    _template: ChatTemplate | None = None

    @property
    def settings(self) -> GeneratorKind:
        """The manifest's section: ids of special tokens, largest length, chat template."""
        return cast(GeneratorKind, self.manifest.kind)

    def complete(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int | None = None,
        options: GenerationOptions = _GREEDY,
        prefix: Prefix | None = None,
    ) -> Completion:
        """Continue a text, greedily unless the options say otherwise.

        Args:
            prompt: A text, or its token ids.
            max_new_tokens: Largest number of new tokens; None for that of the options.
            options: Settings.
            prefix: What the prompt begins with, already computed; what does not fit is not used.

        Raises:
            TextError: If the prompt is empty or cannot be tokenized.
            InputError: If a token id is unknown, prompt and new tokens exceed the model's length,
                or the prefix is of another model.
            BackendError: If the engine fails, or the model is closed.
        """
        return self.complete_all(
            [prompt], max_new_tokens=max_new_tokens, options=options, prefix=prefix
        )[0]

    def complete_all(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_new_tokens: int | None = None,
        options: GenerationOptions = _GREEDY,
        prefix: Prefix | None = None,
    ) -> list[Completion]:
        """Continue several texts in one batch.

        Args:
            prompts: Texts, or their token ids.
            max_new_tokens: See complete.
            options: See complete.
            prefix: What all prompts begin with, already computed.

        Raises:
            TextError, InputError, BackendError: See complete.
        """
        rows = self._prompts(prompts)
        settled = self._settle(rows, max_new_tokens, options)
        with self._decoding(rows, prefix) as decoding:
            if settled.beams > 1:
                return self._search(decoding, rows, settled)
            made = [self._row(row, settled, at) for at, row in enumerate(rows)]
            for _ in generate(decoding, made, settled, pad_id=self.settings.pad_id):
                pass
        return [row.completion() for row in made]

    def stream_complete(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int | None = None,
        options: GenerationOptions = _GREEDY,
        prefix: Prefix | None = None,
    ) -> TextStream:
        """Continue a text and return its pieces as they come.

        Args:
            prompt: See complete.
            max_new_tokens: See complete.
            options: See complete; beam search has no pieces.
            prefix: See complete.

        Raises:
            TextError, InputError, BackendError: See complete.
        """
        rows = self._prompts([prompt])
        settled = self._settle(rows, max_new_tokens, options)
        row = self._streamed(rows[0], settled)
        decoding = self._decoding(rows, prefix)
        steps = generate(decoding, [row], settled, pad_id=self.settings.pad_id)
        return TextStream(row, steps, decoding)

    def stream(
        self, prompt: Sequence[int], options: GenerationOptions, decoding: Decoding
    ) -> TextStream:
        """Return the pieces of a prompt's continuation on a decoding of the caller's.

        Args:
            prompt: Token ids, which begin with those that the decoding holds.
            options: Settings.
            decoding: One sequence; it stays open after the stream.

        Raises:
            InputError: If the options ask for beam search, which has no pieces.
        """
        row = self._streamed(prompt, options)
        steps = generate(decoding, [row], options, pad_id=self.settings.pad_id)
        return TextStream(row, steps, None)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        max_new_tokens: int | None = None,
        options: GenerationOptions = _GREEDY,
        prefix: Prefix | None = None,
    ) -> Completion:
        """Return the assistant's next message.

        Args:
            messages: Such as [{"role": "user", "content": "Hello"}].
            max_new_tokens: See complete.
            options: See complete.
            prefix: See complete; of a system message, see `prefix`.

        Raises:
            TextError: If the chat template refuses the messages.
            InputError: If the model has no chat template, a message has an unknown role, or the
                chat exceeds the model's length.
            BackendError: If the engine fails, or the model is closed.
        """
        prompt = self.chat_tokens(messages)
        return self.complete(prompt, max_new_tokens=max_new_tokens, options=options, prefix=prefix)

    def stream_chat(
        self,
        messages: Sequence[Message],
        *,
        max_new_tokens: int | None = None,
        options: GenerationOptions = _GREEDY,
        prefix: Prefix | None = None,
    ) -> TextStream:
        """Return the pieces of the assistant's next message as they come; see chat."""
        prompt = self.chat_tokens(messages)
        return self.stream_complete(
            prompt, max_new_tokens=max_new_tokens, options=options, prefix=prefix
        )

    def chat_tokens(self, messages: Sequence[Message], *, answer: bool = True) -> list[int]:
        """Return the token ids of a chat.

        Args:
            messages: See chat.
            answer: Whether they end where the assistant begins to speak.

        Raises:
            TextError, InputError: See chat.
        """
        text = self._chat_template().render(flattened(messages), answer=answer)
        return self._tokenizer().prompt(text, special=False)

    def prefix(self, beginning: str | Sequence[int] | Sequence[Message]) -> Prefix:
        """Compute the state of a beginning that many prompts share, such as a system message.

        Args:
            beginning: A text, token ids, or messages.

        Raises:
            TextError, InputError, BackendError: See complete and chat.
        """
        if not isinstance(beginning, str) and beginning and isinstance(beginning[0], Mapping):
            messages = cast("Sequence[Message]", beginning)
            rows = [self.chat_tokens(messages, answer=False)]
        else:
            rows = self._prompts([cast("str | Sequence[int]", beginning)])
        check_length(len(rows[0]), replace(_GREEDY, max_new_tokens=1), self._largest())
        with self._decoding(rows, None) as decoding:
            prefill(decoding, rows, self.settings.pad_id)
            return Prefix(tuple(rows[0]), decoding.save(), self._identity())

    @property
    def runs(self) -> Mapping[str, Run]:
        """Continue texts."""
        texts = frozenset({"texts"})
        return {"complete": Run(self._run_complete, texts, texts, self._run_stream)}

    def _run_complete(self, given: Given, settings: Settings) -> Made:
        made = self.complete_all(given.texts, max_new_tokens=settings.max_new_tokens)
        rows = zip(given.texts, made, strict=True)
        return Made(
            [
                {"input": text, "text": one.text, "finish": one.finish, "tokens": list(one.tokens)}
                for text, one in rows
            ]
        )

    def _run_stream(self, given: Given, settings: Settings) -> Iterator[str]:
        for text in given.texts:
            yield text
            yield from self.stream_complete(text, max_new_tokens=settings.max_new_tokens)
            yield "\n"

    def call(self, role: str, sample: object) -> Callable[[], object] | None:
        """Return a call that continues a text, or its beginning, by up to 16 tokens."""
        if role != self.settings.decoder or not isinstance(sample, str):
            return None
        new = min(_PROFILED_TOKENS, self.settings.max_length // 2 + 1)

        def continued() -> str:
            ids = self._tokenizer().prompt(sample)
            prompt = ids[: self.settings.max_length + 1 - new]
            return self.complete(prompt, max_new_tokens=new).text

        return continued

    def close(self) -> None:
        """Free the engines' memory. Closing twice is allowed."""
        if self._template is not None:
            self._template.close()
        super().close()

    def settle(
        self, prompt: Sequence[int], max_new_tokens: int | None, options: GenerationOptions
    ) -> GenerationOptions:
        """Return options with a largest number of new tokens that fits the prompt.

        Raises:
            InputError: If prompt and new tokens exceed the model's length.
        """
        return self._settle([prompt], max_new_tokens, options)

    def _settle(
        self,
        rows: Sequence[Sequence[int]],
        max_new_tokens: int | None,
        options: GenerationOptions,
    ) -> GenerationOptions:
        longest = max(map(len, rows))
        wanted = options.max_new_tokens if max_new_tokens is None else max_new_tokens
        if wanted is None:
            wanted = max(1, min(DEFAULT_NEW_TOKENS, self._largest() + 1 - longest))
        settled = replace(options, max_new_tokens=wanted)
        check_length(longest, settled, self._largest())
        return settled

    def _largest(self) -> int:
        capacity = self._state().capacity
        return min(self.settings.max_length, capacity or self.settings.max_length)

    def _prompts(self, prompts: Sequence[str | Sequence[int]]) -> list[list[int]]:
        if isinstance(prompts, str) or not prompts:
            raise InputError(f"Prompts: got {prompts!r}, expected a list of one or more.")
        return [
            self._tokenizer().prompt(one) if isinstance(one, str) else self._ids(one, at)
            for at, one in enumerate(prompts)
        ]

    def _ids(self, prompt: Sequence[int], at: int) -> list[int]:
        """Check token ids: a graph may take negative ones as counted from the end."""
        size = self._vocabulary_size()
        for id_ in prompt:
            if (
                isinstance(id_, bool)
                or not isinstance(id_, int | np.integer)
                or not 0 <= id_ < size
            ):
                raise InputError(
                    f"Prompt {at}: got the token id {id_!r}, expected integers from 0 to "
                    f"{size - 1}."
                )
        return [int(id_) for id_ in prompt]

    def _vocabulary_size(self) -> int:
        outputs = self._decoder().outputs
        return next(int(spec.shape[-1]) for spec in outputs if spec.name == LOGITS)

    def _search(
        self, decoding: Decoding, rows: Sequence[Sequence[int]], options: GenerationOptions
    ) -> list[Completion]:
        kind = self.settings
        found = beam_search(decoding, rows, options, eos_ids=kind.eos_ids, pad_id=kind.pad_id)
        made = []
        for at, (prompt, tokens) in enumerate(zip(rows, found, strict=True)):
            row = self._row(prompt, options, at)
            for token in tokens:
                row.add(token)
            made.append(row.completion())
        return made

    def _streamed(self, prompt: Sequence[int], options: GenerationOptions) -> Row:
        if options.beams > 1:
            raise InputError("beams: a text of beam search cannot be streamed. Use complete.")
        return self._row(prompt, options, 0)

    def _row(self, prompt: Sequence[int], options: GenerationOptions, position: int) -> Row:
        processor = self._text_processor()
        if processor is None and (options.stop or options.constraint):
            raise InputError(f"{self._bundle.path} has no tokenizer: no stop text, no constraint.")
        return Row(
            prompt,
            options,
            self.settings.eos_ids,
            position=position,
            decode=None if processor is None else lambda ids: processor.decode([ids])[0],
            matcher=self._matcher(options),
        )

    def _matcher(self, options: GenerationOptions) -> Matcher | None:
        if options.constraint is None:
            return None
        if self._vocabulary is None:
            file = self._bundle.path / self._tokenizer().config.tokenizer_file
            self._vocabulary = Vocabulary(file, self._vocabulary_size(), self.settings.eos_ids)
        return self._vocabulary.matcher(options.constraint)

    def _decoding(self, rows: Sequence[Sequence[int]], prefix: Prefix | None) -> Decoding:
        """Start a batch, with as much of the prefix as all prompts begin with."""
        session, state = self._decoder(), self._state()
        if not all(rows):
            raise InputError("Prompts: got an empty one, expected a token in each.")
        if prefix is None:
            return Decoding(session, state, batch=len(rows))
        if prefix.model != self._identity():
            raise InputError(
                "prefix: another model or variant made it. Make it again with this one's prefix()."
            )
        # A call needs a token, so the last one of a prompt is always run.
        held = min(min(common_length(prefix.tokens, row), len(row) - 1) for row in rows)
        if held == 0:
            return Decoding(session, state, batch=len(rows))
        return Decoding(session, state, batch=len(rows), held=held, given=prefix.cut(held, state))

    def start(self) -> Decoding:
        """Return an empty sequence, for a conversation."""
        return Decoding(self._decoder(), self._state())

    def _decoder(self) -> Session:
        return self._session(self.settings.decoder)

    def _state(self) -> State:
        state = self._bundle.state_of(self.settings.decoder)
        assert state is not None  # noqa: S101, checked by the kind
        return state

    def _identity(self) -> str:
        variant = self._variants[self.settings.decoder].name
        return f"{self.manifest.provenance.weights_sha256}:{variant}"

    def _text_processor(self) -> TextProcessor | None:
        processor = self._processor(self.settings.decoder)
        return processor if isinstance(processor, TextProcessor) else None

    def _tokenizer(self) -> TextProcessor:
        processor = self._text_processor()
        if processor is None:
            raise InputError(f"{self._bundle.path} has no tokenizer. Pass token ids.")
        return processor

    def _chat_template(self) -> ChatTemplate:
        name = self.settings.chat_template
        if name is None:
            raise InputError(
                f"{self._bundle.path} has no chat template. Use complete with a prompt of your own."
            )
        if self._template is None:
            path = self._bundle.path / name
            data = read_file(path, max_bytes=_TEMPLATE_BYTES, error=IntegrityError)
            try:
                source = data.decode("utf-8")
            except UnicodeDecodeError as error:
                raise BundleError(
                    f"{path}: not UTF-8 ({error}). Convert the model again."
                ) from error
            self._template = ChatTemplate(source, self.settings.template_tokens)
        return self._template
