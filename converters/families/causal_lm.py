"""GPT-2, OPT, GPT-NeoX, Falcon, LLaMA, Mistral, Qwen2, Qwen3, Gemma: causal language models.

They export alike. SmolLM is a LLaMA; Gemma 1 to 3 are taken, 3 without its image tower.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from mmedge.bundle.kinds import GeneratorKind
from mmedge.converters.families import MODEL_TYPES
from mmedge.converters.families.base import ModelSpec
from mmedge.converters.families.decoders import decoder_role
from mmedge.converters.families.loading import load_model, read_architecture
from mmedge.converters.sources.config import Fields, read_fields
from mmedge.converters.sources.source import Source
from mmedge.converters.sources.tokenizer import (
    CHAT_TEMPLATE,
    backend_json,
    chat_template,
    check_tokenizer,
    load_tokenizer,
    longest_text,
    template_tokens,
    tokenizer_fields,
)
from mmedge.preprocess.config import TextConfig
from mmedge.specs import Task

__all__ = ["FAMILY"]

_TASK = "text-generation"  # optimum's name
_GENERATION = "generation_config.json"


class CausalLM:
    """Decoders with a KV cache."""

    name = "causal_lm"

    def matches(self, source: Source) -> bool:
        """Return whether a source is one of the architectures."""
        return source.model_type in MODEL_TYPES[self.name]

    def load(self, source: Source) -> nn.Module:
        """Load the model in fp32.

        Raises:
            SourceError: If positions are ALiBi's, or the weights do not fit the architecture.
        """
        if source.fields.flag("alibi"):
            advice = "ALiBi is not supported: convert a Falcon with rotary positions."
            raise source.fields.error("alibi", "false", advice)
        return load_model(source, _TASK)

    def describe(self, source: Source, model: nn.Module | None) -> ModelSpec:
        """Describe the decoder and its tokenizer."""
        causal = cast(Any, model)
        config = Fields(source.fields.file, read_architecture(source).to_dict())
        rows = config.integer("vocab_size", 1, 1 << 24)
        length = int(causal.config.max_position_embeddings)
        tokenizer = load_tokenizer(source)
        check_tokenizer(source, tokenizer, rows)
        settings = tokenizer_fields(source, tokenizer)
        given = source.folder / _GENERATION
        generation = read_fields(given) if given.is_file() else config
        eos_ids = _ids(generation, "eos_token_id", rows) or _ids(config, "eos_token_id", rows)
        begin = _ids(config, "bos_token_id", rows)
        # Without a padding token any will do: padding is masked.
        pads = _ids(settings, "pad_token_id", rows) or _ids(config, "pad_token_id", rows) or eos_ids
        pad_id = (*pads, 0)[0]
        template = chat_template(source, tokenizer)
        return ModelSpec(
            kind=GeneratorKind(
                eos_ids=eos_ids,
                bos_id=begin[0] if begin else None,
                pad_id=pad_id,
                max_length=length,
                chat_template=None if template is None else CHAT_TEMPLATE,
                template_tokens={} if template is None else template_tokens(tokenizer),
            ),
            tasks=(Task.TEXT_GENERATION,),
            roles={"decoder": lambda: decoder_role(causal)},
            processors={
                "text": TextConfig(
                    attention_mask="attention_mask",
                    positions="logit_positions",
                    max_length=longest_text(source, tokenizer, length),
                    padding="longest",
                    pad_id=pad_id,
                )
            },
            files={
                "tokenizer.json": backend_json(source, tokenizer).encode(),
                **({} if template is None else {CHAT_TEMPLATE: template.encode()}),
            },
        )


def _ids(fields: Fields, key: str, rows: int) -> tuple[int, ...]:
    """Return the token ids of a setting, none where it is null or missing."""
    return () if fields.values.get(key) is None else fields.integers(key, 0, rows - 1)


FAMILY = CausalLM()
