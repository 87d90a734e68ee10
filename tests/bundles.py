"""A complete, tiny dual-encoder bundle, for every test that needs one.

The image encoder averages each colour channel, projects and normalises; the text encoder sums
token embeddings (the padding's is zero, so padding changes nothing) and normalises. Both are small
enough to be written down here a second time in numpy, which is where the golden outputs come from.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from mmedge.bundle import (
    Bundle,
    Golden,
    NodeTable,
    create_bundle,
    describe_files,
    open_bundle,
    save_golden,
    save_nodes,
    write_manifest,
)
from mmedge.bundle.kinds import ContrastiveHead, DualEncoderKind
from mmedge.bundle.manifest import FileEntry, Manifest, Provenance, Role, Variant
from mmedge.bundle.quality import Figure, Parity, Quality, Tolerance
from mmedge.bundle.tensors import AxisEntry, InputEntry, OutputEntry, ProcessorFeed
from mmedge.preprocess.config import ImageConfig, ProcessorConfig, TextConfig
from mmedge.preprocess.steps import Crop, Decode, Normalize, Rescale, Resize
from mmedge.specs import Array, Compare, Modality, Precision, Task

DIM = 4
IMAGE_SIZE = 8
OPSET = 20
WORDS = ("red", "green", "blue", "circle", "square", "a", "photo", "of")
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")
VOCABULARY = {word: index for index, word in enumerate((*SPECIALS, *WORDS))}

# Recipe by variant: the step to which weights are rounded, None for none.
VARIANTS: dict[str, tuple[Precision, float | None]] = {
    "fp32": (Precision.FP32, None),
    "int8-dynamic": (Precision.INT8, 1 / 64),
}


MODEL = "image_encoder/fp32.onnx"
VARIANT = ("roles", "image_encoder", "variants", 0)


PROCESSORS: dict[str, ProcessorConfig] = {
    "image": ImageConfig(
        steps=(
            Decode(),
            Resize(
                mode="shortest_edge",
                height=IMAGE_SIZE,
                width=IMAGE_SIZE,
                resample="bicubic",
            ),
            Crop(height=IMAGE_SIZE, width=IMAGE_SIZE),
            Rescale(factor=1 / 255),
            Normalize(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
        )
    ),
    "text": TextConfig(max_length=6, padding="longest", pad_id=VOCABULARY["<pad>"]),
}


def image_weights(step: float | None = None) -> Array:
    """(3, DIM) float32, rounded to multiples of `step`."""
    return _rounded(np.random.default_rng(1).standard_normal((3, DIM)), step)


def text_weights(step: float | None = None) -> Array:
    """(vocabulary, DIM) float32, rounded to multiples of `step`; the padding's row is zero."""
    weights = np.random.default_rng(2).standard_normal((len(VOCABULARY), DIM))
    weights[VOCABULARY["<pad>"]] = 0
    return _rounded(weights, step)


def _rounded(weights: Array, step: float | None) -> Array:
    return (weights if step is None else np.round(weights / step) * step).astype(np.float32)


def encode_image(pixel_values: Array, step: float | None = None) -> Array:
    """The image encoder: (B, 3, 8, 8) -> (B, DIM), L2-normalised."""
    return _normalised(pixel_values.mean(axis=(2, 3)) @ image_weights(step))


def encode_text(input_ids: Array, step: float | None = None) -> Array:
    """The text encoder: (B, T) -> (B, DIM), L2-normalised."""
    return _normalised(text_weights(step)[input_ids].sum(axis=1))


def _normalised(vectors: Array) -> Array:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def image_encoder_onnx(step: float | None = None) -> bytes:
    """The image encoder as an ONNX file."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["pixel_values"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["channels"], axis=1),
        helper.make_node("MatMul", ["channels", "weights"], ["projected"]),
        helper.make_node("LpNormalization", ["projected"], ["embedding"], axis=-1, p=2),
    ]
    shape = ["batch", 3, IMAGE_SIZE, IMAGE_SIZE]
    taken = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, shape)
    weights = numpy_helper.from_array(image_weights(step), "weights")
    return _onnx("image_encoder", nodes, taken, [weights])


def text_encoder_onnx(step: float | None = None) -> bytes:
    """The text encoder as an ONNX file."""
    nodes = [
        helper.make_node("Gather", ["weights", "input_ids"], ["tokens"], axis=0),
        helper.make_node("ReduceSum", ["tokens", "axes"], ["summed"], keepdims=0),
        helper.make_node("LpNormalization", ["summed"], ["embedding"], axis=-1, p=2),
    ]
    taken = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])
    constants = [
        numpy_helper.from_array(text_weights(step), "weights"),
        numpy_helper.from_array(np.array([1], np.int64), "axes"),
    ]
    return _onnx("text_encoder", nodes, taken, constants)


def _onnx(
    name: str,
    nodes: list[onnx.NodeProto],
    taken: onnx.ValueInfoProto,
    constants: list[onnx.TensorProto],
) -> bytes:
    given = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", DIM])
    graph = helper.make_graph(nodes, name, [taken], [given], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def tokenizer_json() -> str:
    """A word-level tokenizer: `<s> words </s>`, unknown words to `<unk>`."""
    tokenizer = Tokenizer(WordLevel(VOCABULARY, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[("<s>", VOCABULARY["<s>"]), ("</s>", VOCABULARY["</s>"])],
    )
    text: str = tokenizer.to_str(pretty=True)
    return text


def golden_vectors() -> Golden:
    """Two inputs for each role, the second text padded, and every variant's outputs."""
    rng = np.random.default_rng(3)
    pixel_values = rng.standard_normal((2, 3, IMAGE_SIZE, IMAGE_SIZE)).astype(np.float32)
    input_ids = np.array([[1, 5, 8, 2], [1, 7, 2, 0]], np.int64)
    steps = {name: step for name, (_, step) in VARIANTS.items()}
    return Golden(
        inputs={
            "image_encoder": {"pixel_values": pixel_values},
            "text_encoder": {"input_ids": input_ids},
        },
        outputs={
            "image_encoder": {
                name: {"embedding": encode_image(pixel_values, step)}
                for name, step in steps.items()
            },
            "text_encoder": {
                name: {"embedding": encode_text(input_ids, step)} for name, step in steps.items()
            },
        },
    )


def tiny_manifest(files: dict[str, FileEntry]) -> Manifest:
    """The manifest of the bundle that consists of `files`."""
    embedding = OutputEntry(
        name="embedding", dtype="float32", shape=("batch", DIM), compare=Compare.ROWS
    )
    return Manifest(
        name="tiny",
        family="clip",
        tasks=(Task.RETRIEVAL, Task.ZERO_SHOT_CLASSIFICATION),
        kind=DualEncoderKind(
            encoders={Modality.IMAGE: "image_encoder", Modality.TEXT: "text_encoder"},
            embedding_dim=DIM,
            contrastive_head=ContrastiveHead(activation="softmax", logit_scale=20.0),
            label_banks={"colours": ("red", "green", "blue")},
        ),
        roles={
            "image_encoder": Role(
                inputs=(
                    InputEntry(
                        name="pixel_values",
                        dtype="float32",
                        shape=("batch", 3, IMAGE_SIZE, IMAGE_SIZE),
                        feed=ProcessorFeed(processor="image"),
                    ),
                ),
                outputs=(embedding,),
                axes={"batch": AxisEntry(min=1, opt=1, max=8)},
                variants=tuple(_variant("image_encoder", name, files) for name in VARIANTS),
                default="fp32",
            ),
            "text_encoder": Role(
                inputs=(
                    InputEntry(
                        name="input_ids",
                        dtype="int64",
                        shape=("batch", "sequence"),
                        feed=ProcessorFeed(processor="text"),
                    ),
                ),
                outputs=(embedding,),
                axes={
                    "batch": AxisEntry(min=1, opt=1, max=32),
                    "sequence": AxisEntry(min=1, opt=6, max=6),
                },
                variants=tuple(_variant("text_encoder", name, files) for name in VARIANTS),
                default="fp32",
            ),
        },
        processors=PROCESSORS,
        golden="golden.npz",
        files=files,
        provenance=Provenance(
            source="tests/bundles.py",
            revision=None,
            weights_sha256="0" * 64,
            tools={"mmedge": "0.1.0"},
            command="mmedge convert tiny -o tiny.mmedge",
            created="2026-01-01T00:00:00+00:00",
        ),
    )


def _variant(role: str, name: str, files: dict[str, FileEntry]) -> Variant:
    precision, step = VARIANTS[name]
    model = f"{role}/{name}.onnx"
    figures = {
        "cosine_mean": Figure(value=0.9999, low=0.9998, high=1),
        "cosine_p1": Figure(value=0.9998, low=0.9997, high=0.9999),
        "cosine_min": Figure(value=0.9997, low=0.9997, high=0.9998),
        "top_k_overlap": Figure(value=0.98, low=0.97, high=0.99),
        "text_to_image_recall@1": Figure(value=0.75, low=0.7, high=0.8),
        "recall@1": Figure(value=0.76, low=0.71, high=0.81),
    }
    drops = {
        "text_to_image_recall@1": Figure(value=0.01, low=-0.005, high=0.02),
        "recall@1": Figure(value=0.02, low=0.005, high=0.03),
    }
    quality = Quality(
        figures=figures,
        drops=drops,
        samples=100,
        data="drawn at random",
        settings={"top_k": 10},
    )
    return Variant(
        name=name,
        precision=precision,
        recipe={} if step is None else {"method": "rounded", "step": step},
        models={"portable": model},
        files=(model,),
        size_bytes=files[model].size_bytes,
        opset=OPSET,
        space="tiny-0001",
        parity=Parity(max_abs_error=1e-7, cosine_mean=1.0, cosine_min=1.0, samples=16),
        quality=None if step is None else quality,
        tolerance=Tolerance(cosine_min=0.9999, max_abs_error=1e-3),
    )


def write_tiny_bundle(path: Path) -> Bundle:
    """Create the bundle at `path`, whose name ends in ".mmedge", and open it."""
    with create_bundle(path) as folder:
        for role, encoder in (
            ("image_encoder", image_encoder_onnx),
            ("text_encoder", text_encoder_onnx),
        ):
            (folder / role).mkdir()
            for name, (_, step) in VARIANTS.items():
                (folder / role / f"{name}.onnx").write_bytes(encoder(step))
        (folder / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
        save_golden(folder / "golden.npz", golden_vectors())
        write_manifest(folder, tiny_manifest(describe_files(folder)))
    return open_bundle(path)


def add_nodes(bundle: Bundle, table: NodeTable | bytes) -> Bundle:
    """Give image_encoder/int8-dynamic a node table, or the bytes of what should be one."""
    relative = "image_encoder/int8-dynamic.nodes.json"
    path = bundle.path / relative
    if isinstance(table, NodeTable):
        save_nodes(path, table)
    else:
        path.write_bytes(table)
    files = bundle.manifest.model_dump(mode="json")["files"]
    files |= {relative: describe_files(bundle.path)[relative].model_dump(mode="json")}
    edit_manifest(bundle.path, "files", value=files)
    steps = ("roles", "image_encoder", "variants", 1, "nodes")
    edit_manifest(bundle.path, *steps, value=relative)
    return open_bundle(bundle.path)


def edit_manifest(path: Path, *steps: str | int, value: object) -> None:
    """Set what lies at `steps` in the manifest of the bundle at `path`, without any check."""
    manifest = path / "manifest.json"
    document = json.loads(manifest.read_text(encoding="utf-8"))
    place = document
    for step in steps[:-1]:
        place = place[step]
    place[steps[-1]] = value
    manifest.write_text(json.dumps(document, indent=2), encoding="utf-8")


def replace_model(bundle: Bundle, data: bytes, *others: str) -> Bundle:
    """Put another model into a bundle, with a manifest that agrees."""
    (bundle.path / MODEL).write_bytes(data)
    files = describe_files(bundle.path)
    documents = {path: entry.model_dump() for path, entry in files.items()}
    edit_manifest(bundle.path, "files", value=documents)
    paths = [MODEL, *others]
    edit_manifest(bundle.path, *VARIANT, "files", value=paths)
    size_bytes = sum(files[path].size_bytes for path in paths)
    edit_manifest(bundle.path, *VARIANT, "size_bytes", value=size_bytes)
    return open_bundle(bundle.path)
