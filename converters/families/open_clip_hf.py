"""Text towers of transformers within open_clip's checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from mmedge.converters.families.loading import read_architecture
from mmedge.converters.families.open_clip_config import TextConfig
from mmedge.converters.sources.config import check_architecture, foreign_errors, read_fields
from mmedge.converters.sources.source import Source
from mmedge.errors import SourceError

__all__ = ["HuggingFaceTextTower", "read_text_architecture"]

_CONFIG = "config.json"
_PREFIX = "text.transformer."
# By model_type: rows of the table of positions that no token takes.
_BERTS = {"bert": 0, "roberta": 1, "xlm-roberta": 1}
_POOLERS = ("mean_pooler", "cls_pooler", "cls_last_hidden_state_pooler")


def read_text_architecture(source: Source, text: TextConfig) -> Any:  # noqa: ANN401, untyped
    """Return transformers' configuration of the text tower, from the folder's `config.json`.

    Raises:
        SourceError: If the file is missing, or of a tower that mmedge does not convert.
    """
    path = source.folder / _CONFIG
    if not path.is_file():
        raise SourceError(
            f"{source.name}: its text tower is '{text.hf_model}' of transformers, whose {_CONFIG} "
            f"is missing. Put that model's {_CONFIG} into the folder."
        )
    fields = read_fields(path)
    fields.choice("model_type", {name: name for name in (*_BERTS, "mt5")})
    shapes = {
        name.removeprefix(_PREFIX): shape
        for name, shape in source.shapes.items()
        if name.startswith(_PREFIX)
    }
    check_architecture(fields, shapes)
    architecture = read_architecture(replace(source, config=fields.values, config_file=_CONFIG))
    longest = _longest(architecture)
    section = source.fields.file
    if text.context > longest:
        raise SourceError(
            f"{section}: text_cfg.context_length is {text.context}, but {_CONFIG} has positions "
            f"for {longest:g} tokens. Correct the file."
        )
    if text.tokenizer is None:
        raise SourceError(
            f"{section}: text_cfg names no hf_tokenizer_name, but its text tower is "
            f"'{text.hf_model}'. Name its tokenizer, whose files lie in the folder."
        )
    if text.hf_pooler is not None and text.hf_pooler not in _POOLERS:
        raise SourceError(
            f"{section}: text_cfg.hf_pooler_type is '{text.hf_pooler}', expected one of "
            f"{', '.join(_POOLERS)}. Correct the file."
        )
    return architecture


def _longest(architecture: Any) -> float:  # noqa: ANN401, untyped
    if architecture.model_type == "mt5":
        return math.inf
    unused = _BERTS[architecture.model_type]
    rows = int(architecture.max_position_embeddings)
    return rows - unused * (int(architecture.pad_token_id) + 1)


class HuggingFaceTextTower(nn.Module):
    """input_ids (B, T) int64 -> embedding (B, dim), not normalised; padding is masked by its id.

    Args:
        config: The tower.
        architecture: As `read_text_architecture` returns it.
        dim: Of the embedding.

    Raises:
        SourceError: If there is no projection and the widths differ.
    """

    def __init__(self, config: TextConfig, architecture: Any, dim: int) -> None:  # noqa: ANN401
        super().__init__()
        self.config, self.architecture = config, architecture
        self.transformer: nn.Module = self._inner(self._class()(architecture, **self._settings()))
        width = int(architecture.hidden_size)
        if config.hf_projection == "linear":
            self.proj: nn.Module = nn.Linear(width, dim, bias=False)
        elif config.hf_projection == "mlp":
            middle = (width + dim) // 2
            self.proj = nn.Sequential(
                nn.Linear(width, middle, bias=False), nn.GELU(), nn.Linear(middle, dim, bias=False)
            )
        elif width == dim:
            self.proj = nn.Identity()
        else:
            raise SourceError(
                f"text_cfg.hf_proj_type is null, but the tower's width {width} is not embed_dim "
                f"{dim}. Correct the file."
            )

    def load_transformer(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Load the inner model, whose buffers no checkpoint holds.

        Args:
            weights: By their names within `transformer`.

        Raises:
            SourceError: If transformers rejects them.
        """
        given = dict(weights)
        if self.architecture.model_type == "mt5":
            given = {f"encoder.{name}": tensor for name, tensor in weights.items()}
            given["shared.weight"] = weights["embed_tokens.weight"]
        with foreign_errors("The text tower cannot be loaded", "Fetch all files of one revision."):
            loaded = self._class().from_pretrained(
                None,
                config=self.architecture,
                state_dict=given,
                dtype=torch.float32,
                attn_implementation="eager" if self.architecture.model_type == "mt5" else "sdpa",
                **self._settings(),
            )
        self.transformer = self._inner(loaded)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Encode texts."""
        mask = (input_ids != self.architecture.pad_token_id).long()
        output = self.transformer(input_ids=input_ids, attention_mask=mask)
        hidden = output.last_hidden_state
        if self._pooler() == "mean_pooler":
            pooled = (hidden * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=-1, keepdim=True)
        elif self._settings().get("add_pooling_layer"):
            pooled = output.pooler_output
        else:
            pooled = hidden[:, 0]
        return cast(torch.Tensor, self.proj(pooled))

    def _class(self) -> Any:  # noqa: ANN401, transformers is untyped
        import transformers

        names = {
            "bert": "BertModel",
            "roberta": "RobertaModel",
            "xlm-roberta": "XLMRobertaModel",
            "mt5": "MT5EncoderModel",
        }
        return getattr(transformers, names[self.architecture.model_type])

    def _inner(self, model: Any) -> nn.Module:  # noqa: ANN401, transformers is untyped
        return cast(nn.Module, model.encoder if self.architecture.model_type == "mt5" else model)

    def _pooler(self) -> str:
        default = "cls_pooler" if self.architecture.model_type == "bert" else "mean_pooler"
        return self.config.hf_pooler or default

    def _settings(self) -> dict[str, bool]:
        """Return the arguments of the class; transformers' pooler is added where it is named."""
        if self.architecture.model_type == "mt5":
            return {}
        return {"add_pooling_layer": self.config.hf_pooler == "cls_pooler"}
