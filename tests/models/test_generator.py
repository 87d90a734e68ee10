"""A converted decoder continues texts as transformers does."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from tiny_models import GPT2_CONTEXT
from transformers import GPT2LMHeadModel

import mmedge
from mmedge.bundle import open_bundle, save_golden
from mmedge.errors import InputError, TextError
from mmedge.models.generator import Generator
from mmedge.runtimes import backend
from mmedge.sessions.verification import verify_bundle
from mmedge.specs import Array

PROMPTS = ("a red circle", "hello", "some more words than the others")
NEW_TOKENS = 14
BACKENDS = [
    name for name in ("onnxruntime", "openvino") if backend(name).engine_version() is not None
]


def expected(folder: Path, rows: list[list[int]], pad_id: int) -> list[list[int]]:
    """What transformers' generate adds to each row, padded on the left."""
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    longest = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    made = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=pad_id,
    )
    added: list[list[int]] = made[:, longest:].tolist()
    return [row[: row.index(pad_id) + 1] if pad_id in row else row for row in added]


def tokens_of(model: Generator) -> list[list[int]]:
    tokenizer = model._tokenizer()
    return tokenizer.tokenize(PROMPTS)


@pytest.mark.parametrize("name", BACKENDS)
def test_tokens_are_those_of_transformers(name: str, gpt2_bundle: Path, gpt2_folder: Path) -> None:
    with Generator.load(gpt2_bundle, backend=name, precision="fp32") as model:
        rows, end = tokens_of(model), model.settings.pad_id
        for prompts in ([rows[0]], rows):
            got = model.generate_ids(prompts, max_new_tokens=NEW_TOKENS)
            assert got == expected(gpt2_folder, prompts, end)
            assert len({token for row in got for token in row}) > 5


def test_a_row_of_a_batch_equals_the_row_alone(gpt2_bundle: Path) -> None:
    with mmedge.load(gpt2_bundle, precision="fp32") as model:
        assert isinstance(model, Generator)
        together = model.generate(PROMPTS, max_new_tokens=8)
        assert together == [model.generate([text], max_new_tokens=8)[0] for text in PROMPTS]
        assert all(together)


def test_a_token_that_ends_a_text_is_the_last_one(gpt2_bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(gpt2_bundle, tmp_path / "copy.mmedge")
    with Generator.load(gpt2_bundle, precision="fp32") as model:
        rows = tokens_of(model)
        whole = model.generate_ids(rows, max_new_tokens=NEW_TOKENS)
    end = whole[0][3]
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["kind"]["eos_ids"].append(end)
    path.write_text(json.dumps(manifest), encoding="utf-8")
    with Generator.load(copy, precision="fp32") as model:
        got = model.generate_ids(rows, max_new_tokens=NEW_TOKENS)
    for row, other in zip(got, whole, strict=True):
        assert row == (other[: other.index(end) + 1] if end in other else other)
    assert len(got[0]) <= 4


def test_a_mismatch_is_an_error(gpt2_bundle: Path) -> None:
    with Generator.load(gpt2_bundle, precision="int8") as model:
        with pytest.raises(InputError, match=f"the model has {GPT2_CONTEXT}"):
            model.generate(["a text"], max_new_tokens=GPT2_CONTEXT)
        with pytest.raises(TextError, match="empty"):
            model.generate([""])
        with pytest.raises(InputError, match="empty"):
            model.generate_ids([[]])


def test_int8_reaches_the_head_and_attention_joins_its_past(gpt2_bundle: Path) -> None:
    bundle = open_bundle(gpt2_bundle)
    variant = bundle.variant("decoder", "int8-dynamic")
    table = bundle.nodes(variant)
    assert table is not None
    heads = [node for node in table.nodes if node.name == "model.lm_head"]
    assert [(node.op_type, node.precision) for node in heads] == [("MatMul", "int8")]
    assert {node.precision for node in table.nodes} == {"int8"}
    for name in ("fp32", "int8-dynamic"):
        model = bundle.variant("decoder", name).models["onnxruntime"]
        graph = onnx.load(gpt2_bundle / model, load_external_data=False).graph
        counted = Counter(node.op_type for node in graph.node)
        assert counted["Attention"] == 2
        assert counted["Softmax"] == 0
        joined = [out for node in graph.node if node.op_type == "Attention" for out in node.output]
        assert {"present.0.key", "present.1.value"} <= set(joined)


def test_quality_is_of_the_held_out_texts(gpt2_bundle: Path) -> None:
    quality = open_bundle(gpt2_bundle).variant("decoder", "int8-dynamic").quality
    assert quality is not None
    assert set(quality.figures) == {"token_agreement", "log_likelihood"}
    assert 0.8 < quality.figures["token_agreement"].value <= 1
    assert quality.figures["log_likelihood"].value < 0
    assert abs(quality.drops["log_likelihood"].value) < 0.2
    assert quality.samples > 100


@pytest.mark.parametrize("name", BACKENDS)
def test_verify_replays_the_prefill_and_two_steps(
    name: str, gpt2_bundle: Path, tmp_path: Path
) -> None:
    bundle = open_bundle(gpt2_bundle)
    assert all(result.passed for result in verify_bundle(bundle, backend=name))
    golden = bundle.golden()
    whole = golden.outputs["decoder"]["fp32"]["logits"]
    assert set(golden.steps["decoder"]["fp32"]) == {"logits"}
    steps = golden.steps["decoder"]["fp32"]["logits"]
    np.testing.assert_allclose(steps, whole, atol=1e-4)

    # What differs in the steps alone is found.
    copy = shutil.copytree(gpt2_bundle, tmp_path / "copy.mmedge")
    wrong: Array = steps.copy()
    wrong[:, -1] *= -1
    changed = {**golden.steps["decoder"], "fp32": {"logits": wrong}}
    save_golden(copy / bundle.manifest.golden, replace(golden, steps={"decoder": changed}))
    results = verify_bundle(open_bundle(copy), backend=name, precision="fp32")
    assert [result.passed for result in results] == [False]
