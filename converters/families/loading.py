"""Loading a model of transformers from a checked source: no code, no pickle, nothing filled in."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from mmedge.converters.sources.adapter import merge_adapter
from mmedge.converters.sources.config import Fields, foreign_errors
from mmedge.converters.sources.source import Source
from mmedge.errors import SourceError

__all__ = [
    "DUAL_ENCODER_TASK",
    "check_tensors",
    "load_model",
    "read_architecture",
    "read_part",
    "read_tensors",
]

# optimum's name for what dual encoders are loaded for.
DUAL_ENCODER_TASK = "zero-shot-image-classification"
# Configurations that early releases of transformers 5 do not list.
_UNLISTED = {"siglip_text_model": "SiglipTextConfig"}
# Keys that every configuration takes and that change what a module returns, not what it computes.
_CALL_OPTIONS = {"dtype", "output_attentions", "output_hidden_states", "return_dict", "torch_dtype"}
# Tied weights are stored once, and what is missing is reported after loading; beyond this factor
# config.json is of another model.
_LARGER = 4
_LISTED = 8
_COUNTED = ("embeddings.position_ids", ".num_batches_tracked")


def read_architecture(source: Source) -> Any:  # noqa: ANN401, transformers is untyped
    """Return the configuration of a source as transformers understands it, defaults resolved.

    Only keys that the architecture's own class declares are passed on: no code (`auto_map`), no
    attention kernel, no file name.

    Raises:
        SourceError: If transformers rejects it.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    name = source.model_type
    with foreign_errors(f"{source.fields.file}: transformers rejects it", "Correct the file."):
        listed = name in CONFIG_MAPPING
        kind = CONFIG_MAPPING[name] if listed else getattr(transformers, _UNLISTED[name])
        return _build_config(kind, source.config, CONFIG_MAPPING)


def read_part(source: Source, part: str) -> Fields:
    """Return one part of the architecture, "text_config" say, defaults resolved, to be read.

    A source that is one part alone, such as `clip_text_model`, has it at the top.
    """
    config = read_architecture(source)
    if part in config.sub_configs:
        return Fields(source.fields.file, getattr(config, part).to_dict(), f"{part}.")
    return Fields(source.fields.file, config.to_dict())


def _build_config(kind: Any, values: Mapping[str, Any], known: Any) -> Any:  # noqa: ANN401
    declared = {*inspect.signature(kind).parameters, *kind.attribute_map} - _CALL_OPTIONS
    declared |= {key for key in ("out_features", "out_indices") if hasattr(kind, key)}  # backbones
    kept = {key: value for key, value in values.items() if key in declared}
    for key, inner in kind.sub_configs.items():
        if isinstance(part := kept.get(key), Mapping):
            typed = known[part["model_type"]] if inner.__name__ == "AutoConfig" else inner
            kept[key] = _build_config(typed, part, known)
    return kind(**kept)


def load_model(
    source: Source,
    task: str = DUAL_ENCODER_TASK,
    *,
    model_class: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Load a model of transformers for a task, in fp32, from the source's own tensors.

    A LoRA adapter of the source is merged. The class comes from optimum's table of tasks, so that
    a family names what it does and not the class that does it.

    Args:
        source: The source.
        task: optimum's name of a task.
        model_class: A class of transformers by name, where the table of tasks has none.
        options: Arguments of that class beside the configuration.

    Raises:
        SourceError: If weights are missing, of another shape or quantized. transformers would fill
            them with random numbers and go on.
    """
    import transformers
    from optimum.exporters.tasks import TasksManager

    config = read_architecture(source)
    place = f"{source.name}: its weights cannot be loaded"
    with foreign_errors(place, "Fetch weights and config.json of one revision."):
        with torch.device("meta"):
            if model_class is not None:
                outline = getattr(transformers, model_class)(config, **(options or {}))
            else:
                outline = TasksManager.get_model_class_for_task(
                    task, model_type=source.model_type, library="transformers"
                ).from_config(config, attn_implementation="eager")
        weights = _stored(source)
        _check_outline(source, outline, weights)
        model, report = type(outline).from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=torch.float32,
            output_loading_info=True,
            attn_implementation=_attention(outline),
            **(options or {}),
        )
    _check_complete(source, report)
    if source.adapter is not None:
        merge_adapter(model, source.adapter)
    return cast(nn.Module, model.eval().requires_grad_(requires_grad=False))


def _stored(source: Source) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    weights: dict[str, torch.Tensor] = {}
    for path in source.weight_files:
        weights.update(load_file(path))
    return weights


def _attention(outline: Any) -> str:  # noqa: ANN401, transformers is untyped
    """Return transformers' name of the attention that a model and its backbone, if any, have."""
    parts = [part for part in outline.modules() if type(part).__name__.endswith("Backbone")]
    fused = all(getattr(part, "_supports_sdpa", False) for part in (outline, *parts))
    return "sdpa" if fused else "eager"


def _check_outline(source: Source, outline: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Check the weights against the model before memory is taken for it."""
    expected = outline.state_dict()
    claimed = sum(tensor.numel() for tensor in expected.values())
    held = sum(tensor.numel() for tensor in weights.values())
    if claimed > _LARGER * held:
        raise SourceError(
            f"{source.fields.file} describes a model of {claimed} values, the checkpoint holds "
            f"{held}. Fetch weights and config.json of one revision."
        )
    for name in sorted(weights.keys() & expected.keys()):
        got, wanted = weights[name], expected[name]
        if got.shape != wanted.shape:
            raise SourceError(
                f"{source.name}: the weights do not fit config.json: {name} is {tuple(got.shape)}, "
                f"expected {tuple(wanted.shape)}. Fetch weights and config.json of one revision."
            )
        if wanted.is_floating_point() > got.is_floating_point():
            raise SourceError(
                f"{source.name}: {name} is {got.dtype}, expected fp32, fp16 or bf16. The weights "
                "are quantized: pass the model that they were made from."
            )


def _check_complete(source: Source, report: Mapping[str, Any]) -> None:
    names = sorted(str(name) for name in report["missing_keys"])
    if names:
        listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise SourceError(
            f"{source.name}: the weights do not fit config.json: the checkpoint lacks {len(names)} "
            f"tensors ({listed}). Fetch weights and config.json of one revision."
        )


def read_tensors(source: Source) -> dict[str, torch.Tensor]:
    """Return a checkpoint's tensors by name, as they are; for modules of mmedge.

    Left out are position ids of old releases, which are counted, and the batches that a batch norm
    has seen.

    Raises:
        SourceError: If a file cannot be read, or a tensor is quantized.
    """
    with foreign_errors(f"{source.name}: its weights cannot be loaded", "Download them again."):
        weights = _stored(source)
    weights = {name: one for name, one in weights.items() if not name.endswith(_COUNTED)}
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            raise SourceError(
                f"{source.name}: {name} is {tensor.dtype}, expected fp32, fp16 or bf16. The "
                "weights are quantized: pass the model that they were made from."
            )
    return weights


def check_tensors(source: Source, model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Check that a checkpoint holds the model's tensors, in their shapes, and no others.

    Raises:
        SourceError: If not; the first are named.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = [f"{name} is missing" for name in expected if name not in weights]
    found += [f"{name} is not in the model" for name in weights if name not in expected]
    found += [
        f"{name} is {tuple(weights[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    if found:
        more = f"; and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
        raise SourceError(
            f"{source.name}: the weights do not fit {source.config_file}: "
            f"{'; '.join(found[:_LISTED])}{more}. Fetch both files of one revision."
        )
