"""Decoder language models: tokens and logits are those of transformers' generate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from models.tiny_decoders import DECODERS, PROMPTS, write_decoder
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmedge.converters.families import family_of
from mmedge.converters.families.base import RoleSpec
from mmedge.converters.graphs.export import export_role
from mmedge.converters.quiet import quiet_libraries
from mmedge.converters.sources.source import open_source
from mmedge.converters.variants.builder import lay_out
from mmedge.errors import SourceError
from mmedge.runtimes import SessionOptions, open_session
from mmedge.specs import Array

NEW_TOKENS = 32
# Exported by default: multi-query in a parallel block; sliding windows. `-m slow` exports all.
EXPORTED = ("falcon", "gemma2")


@pytest.fixture(params=DECODERS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def role_of(folder: Path) -> RoleSpec:
    source = open_source(str(folder))
    with quiet_libraries():
        family = family_of(source)
        return family.describe(source, family.load(source)).roles["decoder"]()


def prompts_of(folder: Path, count: int) -> tuple[Array, Array]:
    """Token ids and mask of some PROMPTS, padded on the left."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [tokenizer(text).input_ids for text in PROMPTS[:count]]
    longest = max(map(len, rows))
    ids = [[tokenizer.eos_token_id] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return np.array(ids), np.array(mask)


def expected(folder: Path, ids: Array, mask: Array) -> tuple[Array, Array]:
    """Tokens (B, N) and logits (B, N, V) of transformers' generate."""
    with quiet_libraries():
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    made = model.generate(
        input_ids=torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=model.config.eos_token_id,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return made.sequences[:, ids.shape[1] :].numpy(), torch.stack(made.logits, 1).numpy()


class ModuleRun:
    """Steps of a module with its past."""

    def __init__(self, spec: RoleSpec, batch: int) -> None:
        self.spec = spec
        empty = {item.name: item.shape for item in spec.inputs[3:]}
        self.past = {
            name: torch.zeros(batch, shape[1], 0, shape[3])  # type: ignore[arg-type]
            for name, shape in empty.items()
        }

    def step(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        assert self.spec.module is not None
        with torch.inference_mode():
            logits, *present = self.spec.module(
                torch.tensor(feed["input_ids"]),
                torch.tensor(feed["attention_mask"]),
                torch.tensor(feed["logit_positions"]),
                *self.past.values(),
            )
        self.past = dict(zip(self.past, present, strict=True))
        return {"logits": logits.numpy()}


def check(folder: Path, spec: RoleSpec, model: Path | None) -> None:
    """Decode greedily, alone and in a padded batch, and compare with transformers."""
    for count in (1, 3):
        ids, mask = prompts_of(folder, count)
        tokens, logits = expected(folder, ids, mask)
        assert min(len(set(row)) for row in tokens.tolist()) >= 10
        session = None
        if model is not None:
            assert spec.state is not None
            session = open_session(model, options=SessionOptions(axes=spec.axes))
        run = ModuleRun(spec, count) if session is None else session.start(spec.state, batch=count)
        last = np.zeros((count, 1), np.int64)
        feed = {"input_ids": ids, "attention_mask": mask, "logit_positions": last}
        for at in range(NEW_TOKENS):
            got = run.step(feed)["logits"]
            assert got.shape[1] == 1
            got = got[:, 0]
            np.testing.assert_allclose(got, logits[:, at], atol=1e-4, rtol=1e-5)
            assert got.argmax(-1).tolist() == tokens[:, at].tolist()
            mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
            feed = {**feed, "input_ids": tokens[:, at : at + 1], "attention_mask": mask}
        if session is not None:
            session.close()


def test_the_module_equals_generate(name: str, tmp_path: Path) -> None:
    folder = write_decoder(name, tmp_path / name)
    check(folder, role_of(folder), None)


@pytest.mark.parametrize(
    "name",
    [each if each in EXPORTED else pytest.param(each, marks=pytest.mark.slow) for each in DECODERS],
)
def test_the_graph_equals_generate(name: str, tmp_path: Path) -> None:
    folder = write_decoder(name, tmp_path / name)
    spec = role_of(folder)
    with quiet_libraries():
        export_role("decoder", spec, tmp_path / "fp32.onnx")
    for layout in lay_out(tmp_path / "fp32.onnx").values():
        check(folder, spec, layout)


def test_alibi_is_refused(tmp_path: Path) -> None:
    folder = write_decoder("falcon", tmp_path / "falcon")
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"alibi": false', '"alibi": true'))
    source = open_source(str(folder))
    with pytest.raises(SourceError, match=r"alibi.*rotary"):
        family_of(source).load(source)
