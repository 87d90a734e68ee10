"""What a model family says about itself, and how its model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import nn

from mmedge.bundle.manifest import ContrastiveHead
from mmedge.converters.sources.source import Source
from mmedge.errors import SourceError
from mmedge.preprocess.config import ImagePreprocessing, TextPreprocessing
from mmedge.specs import Modality, Task, TensorSpec

__all__ = ["DUAL_ENCODER_TASK", "ExportSpec", "Family", "load_model"]

# optimum's name for what dual encoders are loaded for.
DUAL_ENCODER_TASK = "zero-shot-image-classification"


@dataclass(frozen=True)
class ExportSpec:
    """One role: a module and what is needed to trace it and to prove it.

    Attributes:
        modality: What the role takes in.
        module: Takes the inputs in their order and returns the only output.
        inputs: Specs of the inputs; a str in a shape is a dynamic axis.
        outputs: Specs of the outputs.
        limits: Largest size of each dynamic axis that has one ("sequence").
        sample: Makes inputs of the given sizes of the dynamic axes from a seed.
        trace_sizes: Sizes to trace with; 2 or more, since 0 and 1 are specialised.
        proof_sizes: Further sizes at which the exported graph must agree with the module.
    """

    modality: Modality
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    sample: Callable[[Mapping[str, int], int], dict[str, torch.Tensor]]
    trace_sizes: Mapping[str, int]
    proof_sizes: tuple[Mapping[str, int], ...]
    limits: Mapping[str, int]


class Family(Protocol):
    """How one kind of model becomes the roles of a bundle."""

    @property
    def name(self) -> str:
        """The family's name in the manifest."""
        ...

    @property
    def tasks(self) -> tuple[Task, ...]:
        """What a bundle of this family can be used for."""
        ...

    def matches(self, source: Source) -> bool:
        """Say whether the source is of this family."""
        ...

    def load(self, source: Source) -> nn.Module:
        """Load the model in fp32, ready for inference.

        Raises:
            SourceError: If the weights do not fit the architecture.
        """
        ...

    def roles(self, model: nn.Module) -> Mapping[str, ExportSpec]:
        """Return what is to be exported, by role name."""
        ...

    def embedding_dim(self, model: nn.Module) -> int:
        """Return D of the shared embedding space."""
        ...

    def head(self, model: nn.Module) -> ContrastiveHead:
        """Return how similarities become scores."""
        ...

    def image_preprocessing(self, source: Source) -> ImagePreprocessing:
        """Return the frozen image preprocessing.

        Raises:
            SourceError: If it is missing or asks for a step that mmedge does not have.
        """
        ...

    def text_preprocessing(self, source: Source) -> TextPreprocessing:
        """Return the frozen text preprocessing.

        Raises:
            SourceError: If the tokenizer is missing or does not fit the model.
        """
        ...

    def tokenizer_json(self, source: Source) -> str:
        """Return the content of the bundle's `tokenizer.json`, without padding or truncation.

        Raises:
            SourceError: If the tokenizer is missing or cannot be converted.
        """
        ...


def load_model(source: Source, task: str = DUAL_ENCODER_TASK) -> nn.Module:
    """Load a model of transformers for a task, from safetensors and without remote code.

    The class comes from optimum's table of tasks, so that a family names what it does and not the
    class that does it.

    Raises:
        SourceError: If weights are missing or of another shape. transformers would fill them with
            random numbers and go on.
    """
    from optimum.exporters.tasks import TasksManager

    loader = TasksManager.get_model_class_for_task(
        task, model_type=source.model_type, library="transformers"
    )
    try:
        model, report = loader.from_pretrained(
            source.folder,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            attn_implementation="sdpa",
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SourceError(f"{source.name}: its weights cannot be loaded: {reason}") from error
    _check_complete(source, report)
    return cast(nn.Module, model.eval().requires_grad_(requires_grad=False))


def _check_complete(source: Source, report: Mapping[str, Any]) -> None:
    for key, what in (("missing_keys", "lacks"), ("mismatched_keys", "holds in another shape")):
        names = sorted(str(name) for name in report.get(key) or ())
        if names:
            listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise SourceError(
                f"{source.name}: the weights do not fit config.json: the checkpoint {what} "
                f"{len(names)} tensors ({listed}). Fetch weights and config.json of one revision."
            )
