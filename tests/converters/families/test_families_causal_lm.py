"""Causal language models: one wrapper for heads that are shared, and positions that turn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from mmedge.converters.families import family_of
from mmedge.converters.families.decoders import decoder_role
from mmedge.converters.graphs.export import export_role
from mmedge.converters.graphs.parity import measure_parity, probe_role, require_parity
from mmedge.converters.graphs.worker import Worker
from mmedge.converters.quiet import quiet_libraries
from mmedge.converters.sources.source import open_source
from mmedge.converters.variants.builder import lay_out
from mmedge.errors import SourceError

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 60,
    "max_position_embeddings": 40,
}


def test_shared_heads_and_turned_positions(tmp_path: Path) -> None:
    """Qwen2 is LLaMA with biases."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval()
    spec = decoder_role(model)
    with quiet_libraries():
        export_role("decoder", spec, tmp_path / "fp32.onnx")
    probes = probe_role(spec)
    layouts = lay_out(tmp_path / "fp32.onnx")
    with Worker() as worker:
        for path in layouts.values():
            with worker.open(path, path.name) as graph:
                require_parity(path.name, measure_parity(path.name, graph, spec, probes))
    fused = ir.load(layouts["onnxruntime"])
    attention = [node for node in fused.graph if node.op_type == "Attention"]
    assert [len(node.outputs) for node in attention] == [3]
    kinds = [node.op_type for node in fused.graph]
    assert not {"Softmax", "Expand", "Reciprocal"} & set(kinds)
    assert kinds.count("RMSNormalization") == 3


def test_settings_come_from_the_generation_config(gpt2_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(gpt2_folder, tmp_path / "copy")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    source = open_source(str(folder))
    family = family_of(source)
    with quiet_libraries():
        spec = family.describe(source, family.load(source))
    assert spec.kind.model_dump()["eos_ids"] == (3, 5)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 999}))
    with quiet_libraries(), pytest.raises(SourceError, match="eos_token_id"):
        family.describe(source, family.load(source))
