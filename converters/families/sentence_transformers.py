"""Text encoders of sentence-transformers: a transformer, its pooling, and layers above it.

The modules are read from `modules.json`, without that library. The embedding is L2-normalised,
with or without a Normalize module: searches compare cosines.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from mmedge.bundle.kinds import EncoderKind
from mmedge.converters.families.base import ModelSpec
from mmedge.converters.families.loading import load_model, read_part
from mmedge.converters.families.towers import text_role
from mmedge.converters.sources.config import foreign_errors, read_fields
from mmedge.converters.sources.sentence_modules import (
    MODULES_NAME,
    POOLINGS,
    SentenceModule,
    check_similarity,
    prompts,
    read_modules,
    read_pooling,
    read_text_settings,
)
from mmedge.converters.sources.source import Source
from mmedge.converters.sources.tokenizer import (
    backend_json,
    check_tokenizer,
    load_tokenizer,
    longest_text,
    tokenizer_fields,
)
from mmedge.errors import SourceError
from mmedge.preprocess.config import TextConfig
from mmedge.specs import Modality, Task

__all__ = ["FAMILY"]

_ROLE, _MAX_WIDTH = "text_encoder", 1 << 17
_NO_POOLER: Mapping[str, Any] = {"add_pooling_layer": False}  # of transformers, never used here
# transformers' class and its arguments, by model_type.
_CLASSES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "bert": ("BertModel", _NO_POOLER),
    "camembert": ("CamembertModel", _NO_POOLER),
    "distilbert": ("DistilBertModel", {}),
    "modernbert": ("ModernBertModel", {}),
    "mpnet": ("MPNetModel", _NO_POOLER),
    "roberta": ("RobertaModel", _NO_POOLER),
    "xlm-roberta": ("XLMRobertaModel", _NO_POOLER),
}
# Their positions begin behind the row of the padding token.
_OFFSET = {"camembert", "mpnet", "roberta", "xlm-roberta"}
_ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "GELU": nn.GELU,
    "Identity": nn.Identity,
    "ReLU": nn.ReLU,
    "Sigmoid": nn.Sigmoid,
    "Tanh": nn.Tanh,
}


class _Pooling(nn.Module):
    """Token embeddings (B, T, W) and their mask (B, T) -> (B, W * poolings)."""

    modes: torch.Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        # A tensor, so that the fingerprint of the embedding space has it.
        indexes = torch.tensor([list(POOLINGS).index(name) for name in names])
        self.register_buffer("modes", indexes)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        weights = mask.unsqueeze(-1).to(tokens.dtype)
        total, count = (tokens * weights).sum(dim=1), weights.sum(dim=1).clamp(min=1e-9)
        joined = []
        for name in self.names:
            if name == "cls":
                joined.append(tokens[:, 0])
            elif name == "max":
                joined.append(tokens.masked_fill(weights == 0, -1e9).amax(dim=1))
            elif name == "mean":
                joined.append(total / count)
            elif name == "mean_sqrt_len_tokens":
                joined.append(total / count.sqrt())
            elif name == "weightedmean":
                places = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
                rising = weights * places.to(tokens.dtype).view(1, -1, 1)
                joined.append((tokens * rising).sum(dim=1) / rising.sum(dim=1).clamp(min=1e-9))
            else:
                last = (mask.sum(dim=1) - 1).clamp(min=0).view(-1, 1, 1)
                joined.append(tokens.gather(1, last.expand(-1, 1, tokens.shape[2])).squeeze(1))
        return torch.cat(joined, dim=1)


class _Normalize(nn.Module):
    """Scale rows to length 1."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(rows, dim=-1)


class _SentenceEncoder(nn.Module):
    """input_ids and attention_mask (B, T) int64 -> embedding (B, D) float32, L2-normalised."""

    def __init__(self, transformer: Any, pooling: _Pooling, layers: nn.Sequential) -> None:  # noqa: ANN401
        super().__init__()
        self.transformer = transformer
        self.pooling = pooling
        self.layers = layers
        self.config = transformer.config
        self.takes_types = "token_type_ids" in inspect.signature(transformer.forward).parameters

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        typed = self.takes_types and token_type_ids is not None
        given = {"token_type_ids": token_type_ids} if typed else {}
        tokens = self.transformer(input_ids, attention_mask=attention_mask, **given)
        pooled = self.pooling(tokens.last_hidden_state, attention_mask)
        return nn.functional.normalize(self.layers(pooled), dim=-1)


class SentenceTransformers:
    """Folders with `modules.json`: Transformer, Pooling, then Dense, Normalize and Dropout."""

    name = "sentence_transformers"

    def matches(self, source: Source) -> bool:
        """Return whether a source is a text encoder with the modules of sentence-transformers."""
        return source.model_type in _CLASSES and (source.folder / MODULES_NAME).is_file()

    def load(self, source: Source) -> nn.Module:
        """Load the transformer, its pooling and the layers above in fp32."""
        tuple(prompts(source.folder))
        text_config(source, load_tokenizer(source))
        _, pool, *above = _checked_modules(source)
        normalised = bool(above) and above[-1].kind == "Normalize"
        check_similarity(source.folder, normalised=normalised)
        text = read_part(source, "text_config")
        width = text.integer("dim" if "dim" in text.values else "hidden_size", 1, _MAX_WIDTH)
        poolings = read_pooling(pool, width)
        layers = nn.Sequential(*_layers(above, width * len(poolings)))
        name, options = _CLASSES[source.model_type]
        transformer = load_model(source, model_class=name, options=options)
        encoder = _SentenceEncoder(transformer, _Pooling(poolings), layers)
        return encoder.eval().requires_grad_(requires_grad=False)

    def describe(self, source: Source, model: nn.Module | None) -> ModelSpec:
        """Describe the text encoder, pooling and normalisation inside."""
        encoder = cast(_SentenceEncoder, model)
        tokenizer = load_tokenizer(source)
        processor = text_config(source, tokenizer)
        width = int(encoder.config.hidden_size) * len(encoder.pooling.names)
        linears = [layer for layer in encoder.layers if isinstance(layer, nn.Linear)]
        dim = linears[-1].out_features if linears else width
        config = copy.copy(encoder.config)
        config.max_position_embeddings = processor.max_length
        return ModelSpec(
            kind=EncoderKind(encoders={Modality.TEXT: _ROLE}, embedding_dim=dim),
            tasks=(Task.RETRIEVAL,),
            roles={
                _ROLE: lambda: text_role(encoder, config, dim, dynamic_sequence=True, masked=True)
            },
            processors={"text": processor},
            files={"tokenizer.json": backend_json(source, tokenizer).encode()},
            references={_ROLE: encoder.forward},
        )


def text_config(source: Source, tokenizer: Any) -> TextConfig:  # noqa: ANN401
    """Return truncation to the folder's own length and padding to the longest text of a call."""
    text = read_part(source, "text_config")
    rows = text.integer("vocab_size", 1, 1 << 24)
    check_tokenizer(source, tokenizer, rows)
    context = text.integer("max_position_embeddings", 3, 1 << 20)
    if source.model_type in _OFFSET:
        context -= text.integer("pad_token_id", 0, context - 2) + 1
    asked, lower = read_text_settings(source.folder)
    return TextConfig(
        max_length=min(asked, context) if asked else longest_text(source, tokenizer, context),
        padding="longest",
        attention_mask="attention_mask",
        pad_id=tokenizer_fields(source, tokenizer).integer("pad_token_id", 0, rows - 1),
        cleaning="strip_lower" if lower else "strip",
    )


def _checked_modules(source: Source) -> tuple[SentenceModule, ...]:
    """Return the modules: a Transformer beside modules.json, a Pooling, and what is above it."""
    modules = read_modules(source.folder)
    for index, kind in enumerate(("Transformer", "Pooling")):
        if index >= len(modules):
            raise SourceError(f"{source.folder / MODULES_NAME}: expected a {kind} as {index}.")
        if modules[index].kind != kind:
            raise modules[index].entry.error("type", f"a {kind} as module {index}")
    if modules[0].folder.resolve() != source.folder.resolve():
        raise modules[0].entry.error("path", "'': the model's files beside modules.json")
    return modules


def _layers(modules: Sequence[SentenceModule], width: int) -> Iterator[nn.Module]:
    """Yield the layers above the pooling."""
    for module in modules:
        if module.kind == "Normalize":
            yield _Normalize()
        elif module.kind == "Dense":
            linear, activation = _dense(module, width)
            width = linear.out_features
            yield linear
            yield activation
        elif module.kind != "Dropout":  # without effect after training
            raise module.entry.error("type", "Dense, Normalize or Dropout above the Pooling")


def _dense(module: SentenceModule, width: int) -> tuple[nn.Linear, nn.Module]:
    from safetensors.torch import load_file

    config = read_fields(module.folder / "config.json")
    config.integer("in_features", width, width)
    size = config.integer("out_features", 1, _MAX_WIDTH)
    name = config.text("activation_function").rsplit(".", 1)[-1]
    if name not in _ACTIVATIONS:
        raise config.error("activation_function", f"one of {', '.join(_ACTIVATIONS)}")
    file = module.folder / "model.safetensors"
    if not file.is_file():
        raise SourceError(
            f"{module.folder} holds no model.safetensors; a pickle is not opened. Save the model "
            "again with SentenceTransformer(...).save_pretrained(FOLDER)."
        )
    with foreign_errors(f"{file} cannot be read", "Download it again."):
        weights = load_file(file)
    bias = config.values.get("bias", True) is not False
    expected = {"linear.weight": (size, width), **({"linear.bias": (size,)} if bias else {})}
    found = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    if found != expected:
        raise SourceError(f"{file} holds {found}, expected {expected} by {config.file.name}.")
    linear = nn.Linear(width, size, bias=bias, device="meta")
    tensors = {key.removeprefix("linear."): value.float() for key, value in weights.items()}
    linear.load_state_dict(tensors, assign=True)
    return linear, _ACTIVATIONS[name]()


FAMILY = SentenceTransformers()
