"""Generators: a decoder that continues token ids."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from mmedge.bundle.kinds.base import KindBase
from mmedge.bundle.paths import BundlePath
from mmedge.bundle.tensors import RoleName
from mmedge.specs import Compare

if TYPE_CHECKING:
    from mmedge.bundle.manifest import Manifest

__all__ = ["GeneratorKind"]

_Word = Annotated[str, Field(max_length=1000)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]


class GeneratorKind(KindBase):
    """The section of a generator.

    Attributes:
        decoder: Its role, with inputs `input_ids` and `attention_mask` and output `logits`.
        eos_ids: Tokens that end a text.
        bos_id: Token that begins one without a prompt; None where there is none.
        pad_id: Token that fills rows of a batch.
        max_length: Largest number of tokens, prompt included.
        chat_template: File of the Jinja2 template that makes a prompt of messages; None where the
            model has none.
        template_tokens: Special tokens that the template uses, by name ("bos_token").
    """

    type: Literal["generator"] = "generator"
    decoder: RoleName = "decoder"
    eos_ids: tuple[TokenId, ...] = ()
    bos_id: TokenId | None = None
    pad_id: TokenId
    max_length: int = Field(ge=1, le=1 << 24)
    chat_template: BundlePath | None = None
    template_tokens: dict[_Word, _Word] = Field(default={}, max_length=100)

    def role_names(self) -> tuple[str, ...]:
        """Return the decoder's role."""
        return (self.decoder,)

    def facts(self) -> Iterator[tuple[str, str]]:
        """Yield the length and the tokens that end a text."""
        yield "length", f"{self.max_length} tokens"
        if self.eos_ids:
            yield "ends with", ", ".join(map(str, self.eos_ids))

    def check(self, manifest: Manifest) -> None:
        """Check the decoder's inputs, logits and state, and the token ids.

        Raises:
            ValueError: If they contradict each other.
        """
        if self.chat_template is not None and self.chat_template not in manifest.files:
            raise ValueError(f"chat template {self.chat_template!r} is not listed in files")
        role = manifest.roles[self.decoder]
        names = {entry.name for entry in role.inputs}
        if missing := sorted({"input_ids", "attention_mask"} - names):
            raise ValueError(f"{self.decoder}: has no input {missing[0]!r}")
        logits = next((entry for entry in role.outputs if entry.name == "logits"), None)
        if logits is None or logits.compare is not Compare.TOKENS or len(logits.shape) != 3:
            raise ValueError(
                f"{self.decoder}: expected an output logits (batch, positions, vocabulary) "
                "compared by tokens"
            )
        vocabulary = logits.shape[2]
        ids = [*self.eos_ids, self.pad_id, *(() if self.bos_id is None else (self.bos_id,))]
        if not isinstance(vocabulary, int) or max(ids) >= vocabulary:
            raise ValueError(f"token {max(ids)} lies outside a vocabulary of {vocabulary}")
        capacity = None if role.state is None else role.state.capacity
        if capacity is None or self.max_length > capacity:
            raise ValueError(f"max_length {self.max_length} exceeds the state's {capacity}")
