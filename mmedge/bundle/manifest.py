"""Bundle manifest: one JSON document that describes a bundle.

A minor version may only add optional fields whose absence means what it meant before. A reader
refuses another major outright, and a newer minor where it meets something that it does not know.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from mmedge.bundle.kinds import Kind
from mmedge.bundle.paths import MANIFEST_NAME, BundlePath
from mmedge.bundle.quality import Parity, Quality, Tolerance
from mmedge.bundle.tensors import (
    AxisEntry,
    AxisName,
    InputEntry,
    OutputEntry,
    ProcessorFeed,
    RoleFeed,
    RoleName,
    StateEntry,
    StateFeed,
    TensorName,
)
from mmedge.bundle.tuning import SearchRecord
from mmedge.preprocess.config import ProcessorConfig
from mmedge.specs import Compare, Modality, Precision, Task

__all__ = [
    "FORMAT_VERSION",
    "FileEntry",
    "Layout",
    "Manifest",
    "Provenance",
    "Role",
    "Variant",
]

FORMAT_VERSION = "2.0"

Layout: TypeAlias = Literal["portable", "onnxruntime"]

_FROZEN = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _check_unique(kind: str, names: Iterable[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{kind} {twice[0]!r} appears more than once")


class FileEntry(BaseModel):
    """Size and hash of one file of the bundle."""

    model_config = _FROZEN
    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Variant(BaseModel):
    """One precision of one role.

    Attributes:
        name: Unique within the role and usable as a file name: "fp32", "int8-dynamic", ...
        precision: The number format that a caller asks for.
        recipe: The method and its settings, as the converter used them.
        models: ONNX file by layout. "portable" holds standard ONNX operators only and is what
            engines are built from; "onnxruntime" is the same graph in the operators that ONNX
            Runtime runs fastest. Layouts may share external data. At least one is there.
        files: Every file that the variant needs, the models included.
        size_bytes: Sum over files.
        opset: Opset of the default ONNX domain.
        space: Embedding-space fingerprint; variants that share it may be mixed. None where no
            output is an embedding.
        taps: Fingerprint of each tap that heads read, by output: the embedding space, the tap's
            name and the blocks before it.
        parity: Against the PyTorch original.
        quality: Against the fp32 variant; None for fp32 itself where no task was measured.
        tolerance: For the golden vectors.
        nodes: Its node table (see nodes.py), which explains the variant and is not needed to run
            it: it is not among `files`.
    """

    model_config = _FROZEN
    name: str = Field(pattern="^[a-z0-9][a-z0-9._-]*$")
    precision: Precision
    recipe: dict[str, JsonValue] = Field(default_factory=dict)
    models: dict[Layout, BundlePath] = Field(min_length=1)
    files: tuple[BundlePath, ...]
    size_bytes: int = Field(ge=0)
    opset: int = Field(ge=1, le=1000)
    space: str | None = None
    taps: dict[TensorName, str] = Field(default_factory=dict)
    parity: Parity | None = None
    quality: Quality | None = None
    tolerance: Tolerance
    nodes: BundlePath | None = None

    @model_validator(mode="after")
    def _check_files(self) -> Variant:
        _check_unique("file", self.files)
        for layout, model in self.models.items():
            if model not in self.files:
                raise ValueError(
                    f"model {model!r} of layout {layout!r} is not in the variant's files"
                )
        return self


class Role(BaseModel):
    """One graph of the model and its variants, highest fidelity first.

    Attributes:
        inputs: Its inputs, and where each comes from.
        outputs: Its outputs, and how each is compared with the reference's.
        axes: Bounds of the inputs' dynamic axes, by name.
        state: What its calls hand to each other, None where they share nothing.
        variants: Highest fidelity first.
        default: Name of the variant that is loaded where none is requested.
        search: What a search tried.
    """

    model_config = _FROZEN
    inputs: tuple[InputEntry, ...] = Field(min_length=1)
    outputs: tuple[OutputEntry, ...] = Field(min_length=1)
    axes: dict[AxisName, AxisEntry] = Field(default_factory=dict)
    state: StateEntry | None = None
    variants: tuple[Variant, ...] = Field(min_length=1)
    default: str
    search: SearchRecord | None = None

    @property
    def verified(self) -> tuple[OutputEntry, ...]:
        """Outputs that have golden vectors: all whose rows have an order."""
        return tuple(each for each in self.outputs if each.compare is not Compare.UNORDERED)

    @model_validator(mode="after")
    def _check_names(self) -> Role:
        names = {variant.name for variant in self.variants}
        if self.default not in names:
            raise ValueError(f"default {self.default!r} is not among the variants {sorted(names)}")
        _check_unique("variant", (variant.name for variant in self.variants))
        _check_unique("input", (entry.name for entry in self.inputs))
        _check_unique("output", (entry.name for entry in self.outputs))
        return self

    @model_validator(mode="after")
    def _check_state(self) -> Role:
        fed = {entry.name for entry in self.inputs if isinstance(entry.feed, StateFeed)}
        tensors = () if self.state is None else self.state.tensors
        if fed != {tensor.input for tensor in tensors}:
            raise ValueError(f"inputs fed by the state are {sorted(fed)}, unlike state.tensors")
        outputs = {entry.name for entry in self.outputs}
        for tensor in tensors:
            if tensor.output is not None and tensor.output not in outputs:
                raise ValueError(f"state {tensor.input!r}: no output {tensor.output!r}")
        length = None if self.state is None else self.state.length
        if length is not None and length not in self.axes:
            raise ValueError(f"state.length {length!r} is not among the axes")
        return self


class Provenance(BaseModel):
    """Origin of the bundle and conversion settings.

    Attributes:
        source: Folder or hub id, without local paths.
        revision: Of a hub repository.
        weights_sha256: Hash of the source's tensors.
        calibration_sha256: Hash of the calibration data; None without any.
        calibration_samples: How many were used.
        jpeg_draft: fp32 with JPEG files decoded at a fraction of their size, compared with fp32 on
            whole files; None where this was not chosen.
        tools: Version by package.
        command: What makes the bundle again, with file names for paths.
        created: Time, ISO 8601.
    """

    model_config = _FROZEN
    source: str
    revision: str | None
    weights_sha256: str
    calibration_sha256: str | None = None
    calibration_samples: int = Field(default=0, ge=0)
    jpeg_draft: Quality | None = None
    tools: dict[str, str]
    command: str
    created: str


class Manifest(BaseModel):
    """A bundle's `manifest.json`.

    Attributes:
        format_version: "major.minor" of this document; a reader refuses a newer major.
        name: For people.
        family: Model family ("clip", "siglip", ...).
        tasks: What the bundle can be used for.
        kind: The kind of model, with what only that kind has.
        roles: By role name ("image_encoder", "text_encoder", ...).
        processors: Frozen preprocessing by name; inputs name the processor that makes them.
        golden: Path of the golden vectors.
        files: Every file of the bundle except the manifest itself, by its POSIX path relative to
            the bundle.
        provenance: Source, tools and command.
    """

    model_config = _FROZEN
    format_version: str = Field(default=FORMAT_VERSION, pattern="^[0-9]+\\.[0-9]+$")
    name: str
    family: str
    tasks: tuple[Task, ...]
    kind: Kind
    roles: dict[RoleName, Role] = Field(min_length=1)
    processors: dict[str, ProcessorConfig] = Field(default_factory=dict)
    golden: BundlePath
    files: dict[BundlePath, FileEntry]
    provenance: Provenance

    def __repr__(self) -> str:
        roles = ", ".join(self.roles)
        return f"<Manifest {self.format_version} of {self.kind.type} {self.name}: {roles}>"

    @model_validator(mode="after")
    def _check_files(self) -> Manifest:
        if MANIFEST_NAME in self.files:
            raise ValueError(f"files lists {MANIFEST_NAME!r}, which cannot hold its own hash")
        for what, path in self._references():
            if path not in self.files:
                raise ValueError(f"{what} {path!r} is not listed in files")
        for role_name, role in self.roles.items():
            for variant in role.variants:
                total_bytes = sum(self.files[path].size_bytes for path in variant.files)
                if variant.size_bytes != total_bytes:
                    raise ValueError(
                        f"variant {role_name}/{variant.name}: size_bytes is {variant.size_bytes}, "
                        f"its files sum to {total_bytes}"
                    )
        return self

    def _references(self) -> Iterator[tuple[str, str]]:
        yield "golden", self.golden
        for path in self.kind.files():
            yield "file of the kind", path
        for name, config in self.processors.items():
            for path in config.files:
                yield f"file of processor {name!r}", path
        for role_name, role in self.roles.items():
            for variant in role.variants:
                for path in variant.files:
                    yield f"file of variant {role_name}/{variant.name}", path
                if variant.nodes is not None:
                    yield f"node table of variant {role_name}/{variant.name}", variant.nodes

    @model_validator(mode="after")
    def _check_feeds(self) -> Manifest:
        for role_name, role in self.roles.items():
            for entry in role.inputs:
                fault = self._feed_fault(entry)
                if fault:
                    raise ValueError(f"{role_name}: input {entry.name!r} {fault}")
        return self

    def _feed_fault(self, entry: InputEntry) -> str | None:
        feed = entry.feed
        if isinstance(feed, ProcessorFeed):
            config = self.processors.get(feed.processor)
            if config is None:
                return f"names the processor {feed.processor!r}, which does not exist"
            made = config.inputs
            if entry.name not in made:
                return f"is fed by {feed.processor!r}, which makes {sorted(made)}"
        if isinstance(feed, RoleFeed):
            role = self.roles.get(feed.role)
            if role is None or feed.output not in {output.name for output in role.outputs}:
                return f"names the output {feed.role}/{feed.output}, which does not exist"
        return None

    @model_validator(mode="after")
    def _check_kind(self) -> Manifest:
        used = set(self.kind.role_names())
        if missing := sorted(used - self.roles.keys()):
            raise ValueError(f"kind {self.kind.type!r} names the role {missing[0]!r}, not in roles")
        if unused := sorted(self.roles.keys() - used):
            raise ValueError(
                f"role {unused[0]!r} is not one that kind {self.kind.type!r} uses: {sorted(used)}"
            )
        self.kind.check(self)
        return self

    def processor_of(self, role: str) -> str | None:
        """Return the name of the first processor that feeds a role, None if there is none."""
        return next(iter(self.processors_of(role)), None)

    def processors_of(self, role: str) -> tuple[str, ...]:
        """Return the names of the processors that feed a role, each once."""
        feeds = (entry.feed for entry in self.roles[role].inputs)
        names = (feed.processor for feed in feeds if isinstance(feed, ProcessorFeed))
        return tuple(dict.fromkeys(names))

    def modality(self, role: str) -> Modality | None:
        """Return the modality of a role's processor, None if it has none."""
        name = self.processor_of(role)
        return None if name is None else Modality(self.processors[name].type)
