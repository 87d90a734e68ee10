"""A chat whose state is kept from turn to turn."""

from __future__ import annotations

import collections.abc
from collections.abc import Sequence

from mmedge.closing import Closing
from mmedge.errors import MmedgeError
from mmedge.generation import Completion, Decoding, GenerationOptions
from mmedge.generation.prefix import common_length
from mmedge.models.generator import Generator
from mmedge.preprocess.chat import Message

__all__ = ["Conversation"]


class Conversation(Closing):
    """A chat with a generator. Each turn runs only the tokens that are new. One thread at a time.

    with Conversation(qwen2, system="Answer briefly.") as chat:
        chat.say("What is an edge device?").text

    Args:
        model: A generator with a chat template; it stays open.
        system: The system message; None for none.
        options: Settings of each turn.

    Attributes:
        messages: The chat so far.
        last: The assistant's latest message.
    """

    def __init__(
        self,
        model: Generator,
        *,
        system: str | None = None,
        options: GenerationOptions | None = None,
    ) -> None:
        self.messages: list[Message] = []
        self.last: Completion | None = None
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        self._model = model
        self._options = options or GenerationOptions()
        self._decoding: Decoding | None = None
        self._tokens: list[int] = []  # whose positions the state holds, in order

    def say(self, text: str) -> Completion:
        """Add a user's message and return the assistant's.

        Raises:
            TextError, InputError, BackendError: See Generator.chat; the message is taken back.
        """
        for _ in self.stream(text):
            pass
        assert self.last is not None  # noqa: S101, set by the stream
        return self.last

    def stream(self, text: str) -> collections.abc.Generator[str, None, None]:
        """Add a user's message and yield the pieces of the assistant's.

        Where the caller stops reading, what there is by then becomes the message.

        Raises:
            TextError, InputError, BackendError: See Generator.chat; the message is taken back.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            prompt = self._model.chat_tokens(self.messages)
            options = self._model.settle(prompt, None, self._options)
            decoding = self._rewound(prompt)
            pieces = self._model.stream(prompt, options, decoding)
        except (MmedgeError, KeyboardInterrupt):
            self.messages.pop()
            raise
        try:
            yield from pieces
        except MmedgeError:
            self.messages.pop()
            self.close()
            raise
        finally:
            pieces.close()
            self.last = pieces.completion
            if self._decoding is not None:
                self._tokens = [*prompt, *self.last.tokens][: decoding.length]
                self.messages.append({"role": "assistant", "content": self.last.text or " "})

    def _rewound(self, prompt: Sequence[int]) -> Decoding:
        """Return the state, cut to what it has in common with a prompt."""
        if self._decoding is None:
            self._decoding, self._tokens = self._model.start(), []
        held = min(common_length(self._tokens, prompt), len(prompt) - 1)
        self._decoding.truncate(held)
        self._tokens = self._tokens[:held]
        return self._decoding

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages = [one for one in self.messages if one["role"] == "system"]

    def close(self) -> None:
        """Free the state. Closing twice is allowed."""
        if self._decoding is not None:
            self._decoding.close()
        self._decoding, self._tokens = None, []
