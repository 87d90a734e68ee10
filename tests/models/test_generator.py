"""A converted decoder continues texts as transformers does."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
import torch
from tiny_models import GPT2_CONTEXT
from transformers import GPT2LMHeadModel

from mmedge.bundle import open_bundle, save_golden
from mmedge.errors import BundleError, InputError, TextError
from mmedge.generation import Constraint, Decoding, GenerationOptions, Prefix
from mmedge.models.generator import Generator
from mmedge.runtimes import backend
from mmedge.sessions.verification import verify_bundle
from mmedge.specs import Array

PROMPTS = ("a red circle", "hello", "some more words than the others")
NEW_TOKENS = 32
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


@pytest.fixture(scope="module")
def model(gpt2_bundle: Path) -> Iterator[Generator]:
    with Generator.load(gpt2_bundle, precision="fp32") as loaded:
        yield loaded


@pytest.mark.parametrize("name", BACKENDS)
def test_tokens_are_those_of_transformers(name: str, gpt2_bundle: Path, gpt2_folder: Path) -> None:
    with Generator.load(gpt2_bundle, backend=name, precision="fp32") as model:
        rows, end = tokens_of(model), model.settings.pad_id
        for prompts in ([rows[0]], rows):
            made = model.complete_all(prompts, max_new_tokens=NEW_TOKENS)
            got = [list(one.tokens) for one in made]
            assert got == expected(gpt2_folder, prompts, end)
            assert len({token for row in got for token in row}) > 5


def test_a_row_of_a_batch_equals_the_row_alone(model: Generator) -> None:
    together = model.complete_all(PROMPTS, max_new_tokens=8)
    assert together == [model.complete(text, max_new_tokens=8) for text in PROMPTS]
    assert all(one.text for one in together)
    for text, one in zip(PROMPTS, together, strict=True):
        assert one.prompt_tokens == len(text.encode())


def test_pieces_are_those_of_the_whole_text(model: Generator) -> None:
    for text in PROMPTS:
        with model.stream_complete(text, max_new_tokens=NEW_TOKENS) as stream:
            pieces = list(stream)
        assert stream.completion == model.complete(text, max_new_tokens=NEW_TOKENS)
        assert "".join(pieces) == stream.completion.text
        assert len(pieces) > 3


@pytest.mark.parametrize(
    "options",
    [GenerationOptions(beams=2), GenerationOptions(constraint=Constraint.regex("("))],
    ids=["beams", "constraint"],
)
def test_a_stream_that_cannot_begin_leaves_no_state_open(
    options: GenerationOptions, model: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[Decoding] = []

    class Watched(Decoding):
        def __init__(self, *args: Any, **named: Any) -> None:
            super().__init__(*args, **named)
            left.append(self)

        def close(self) -> None:
            left.remove(self)
            super().close()

    monkeypatch.setattr("mmedge.models.generator.Decoding", Watched)
    model.stream_complete(PROMPTS[0], max_new_tokens=1).read()
    with pytest.raises(InputError, match=r"cannot be streamed|no text can match"):
        model.stream_complete(PROMPTS[0], max_new_tokens=1, options=options)
    assert not left


def test_a_stream_that_is_closed_ends_the_generation(model: Generator) -> None:
    stream = model.stream_complete(PROMPTS[0], max_new_tokens=NEW_TOKENS)
    with pytest.raises(InputError, match="has not ended"):
        _ = stream.completion
    first = next(stream)
    stream.close()
    assert list(stream) == []
    made = stream.completion
    assert made.finish == "cancelled"
    assert made.text.startswith(first)
    assert len(made.tokens) < NEW_TOKENS


def test_a_stop_text_is_left_out(model: Generator) -> None:
    whole = model.complete(PROMPTS[0], max_new_tokens=NEW_TOKENS)
    stop = whole.text[3:6]
    made = model.complete(
        PROMPTS[0], max_new_tokens=NEW_TOKENS, options=GenerationOptions(stop=(stop,))
    )
    assert made.finish == "stop"
    assert made.text == whole.text[: whole.text.index(stop)]
    assert whole.tokens[: len(made.tokens)] == made.tokens


def test_log_probabilities_of_greedy_tokens(model: Generator, gpt2_folder: Path) -> None:
    options = GenerationOptions(log_probabilities=True, max_new_tokens=6)
    made = model.complete(PROMPTS[0], options=options)
    assert made.log_probabilities is not None
    reference = GPT2LMHeadModel.from_pretrained(gpt2_folder).eval()
    ids = [*model._tokenizer().prompt(PROMPTS[0]), *made.tokens]
    with torch.inference_mode():
        scores = torch.log_softmax(reference(torch.tensor([ids])).logits[0], -1)
    start = len(ids) - len(made.tokens) - 1
    wanted = [float(scores[start + at, token]) for at, token in enumerate(made.tokens)]
    np.testing.assert_allclose(made.log_probabilities, wanted, atol=1e-4)


@pytest.mark.parametrize("prompt", [*PROMPTS, "abc abc abc abc abc ab"])
def test_lookup_equals_plain_greedy(model: Generator, prompt: str) -> None:
    plain = model.complete(prompt, max_new_tokens=NEW_TOKENS)
    options = GenerationOptions(lookup=4, max_new_tokens=NEW_TOKENS)
    assert model.complete(prompt, options=options) == plain


def test_draws_and_beams_run_on_the_engine(model: Generator) -> None:
    drawn = GenerationOptions(temperature=1.0, top_p=0.9, seed=5, max_new_tokens=12)
    assert model.complete_all(PROMPTS, options=drawn) == model.complete_all(PROMPTS, options=drawn)
    greedy = model.complete_all(PROMPTS, max_new_tokens=12)
    assert model.complete_all(PROMPTS, options=drawn) != greedy
    searched = GenerationOptions(beams=3, max_new_tokens=12)
    alone = [model.complete(text, options=searched) for text in PROMPTS]
    assert model.complete_all(PROMPTS, options=searched) == alone
    assert [one.tokens for one in alone] != [one.tokens for one in greedy]
    with pytest.raises(InputError, match="cannot be streamed"):
        model.stream_complete("a", options=searched)


def test_a_prefix_is_computed_once(model: Generator, tmp_path: Path) -> None:
    prefix = model.prefix("the same beginning ")
    prompts = [f"the same beginning {text}" for text in PROMPTS]
    plain = model.complete_all(prompts, max_new_tokens=12)
    assert model.complete_all(prompts, max_new_tokens=12, prefix=prefix) == plain
    prefix.save(tmp_path / "prefix.npz")
    loaded = Prefix.load(tmp_path / "prefix.npz")
    assert loaded.tokens == prefix.tokens
    # A prompt that leaves it, one that is a part of it, and one that has nothing in common.
    for prompt in (prompts[0], "the same day", "the same", "x"):
        made = model.complete(prompt, max_new_tokens=12, prefix=loaded)
        assert made == model.complete(prompt, max_new_tokens=12)
    stream = model.stream_complete(prompts[0], max_new_tokens=12, prefix=prefix)
    assert stream.read() == plain[0]


def test_a_prefix_of_another_variant_is_refused(gpt2_bundle: Path, model: Generator) -> None:
    with (
        Generator.load(gpt2_bundle, precision="int8") as other,
        pytest.raises(InputError, match="another model or variant"),
    ):
        other.complete("hello", prefix=model.prefix("hel"))


@pytest.mark.parametrize("length", [None, 0, 3])
def test_a_prefix_whose_state_is_not_of_its_tokens_is_refused(
    model: Generator, length: int | None
) -> None:
    prefix = model.prefix("the same beginning ")
    name = next(iter(prefix.state))
    state = {key: array for key, array in prefix.state.items() if key != name}
    if length is not None:
        state = {key: array[:, :, :length] for key, array in prefix.state.items()}
    for prompt in ("the same beginning of", "the same"):
        with pytest.raises(InputError, match=r"expected one of [0-9]+ positions"):
            model.complete(prompt, prefix=replace(prefix, state=state), max_new_tokens=2)


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"tokens": np.ones(2, np.int64)},
        {"x": np.ones(1)},
        {"tokens": np.array([1.0, np.nan]), "model": np.array("m")},
        {"tokens": np.ones((1, 2), np.int64), "model": np.array("m")},
        {"tokens": np.ones(2, np.int64), "model": np.array(["m", "n"])},
    ],
)
def test_a_file_that_is_no_prefix(arrays: dict[str, Array], tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="not a prefix"):
        Prefix.load(tmp_path / "x.npz")


def test_a_token_that_ends_a_text_is_the_last_one(
    gpt2_bundle: Path, model: Generator, tmp_path: Path
) -> None:
    copy = shutil.copytree(gpt2_bundle, tmp_path / "copy.mmedge")
    whole = model.complete_all(PROMPTS, max_new_tokens=NEW_TOKENS)
    end = whole[0].tokens[3]
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["kind"]["eos_ids"].append(end)
    path.write_text(json.dumps(manifest), encoding="utf-8")
    with Generator.load(copy, precision="fp32") as other:
        got = other.complete_all(PROMPTS, max_new_tokens=NEW_TOKENS)
    for one, before in zip(got, whole, strict=True):
        tokens = before.tokens
        assert one.tokens == (tokens[: tokens.index(end) + 1] if end in tokens else tokens)
    assert len(got[0].tokens) <= 4
    assert got[0].finish == "end"


def test_a_chat_is_the_template_continued(model: Generator) -> None:
    messages = [{"role": "user", "content": "hi"}]
    made = model.chat(messages, max_new_tokens=8)
    assert made == model.complete("user: hi\nassistant:", max_new_tokens=8)
    assert model.stream_chat(messages, max_new_tokens=8).read() == made
    prefix = model.prefix([{"role": "system", "content": "be kind"}])
    longer = [{"role": "system", "content": "be kind"}, *messages]
    assert len(prefix.tokens) == len("system: be kind\n")
    assert model.chat(longer, max_new_tokens=8, prefix=prefix) == model.chat(
        longer, max_new_tokens=8
    )


@pytest.mark.parametrize("token", [-1, 10**6, 10**30, "a", 1.5, True, None, [1]])
def test_token_ids_that_the_model_lacks_are_refused(model: Generator, token: object) -> None:
    with pytest.raises(InputError, match="Prompt 1: got the token id"):
        model.complete_all(["a", cast("list[int]", [5, token])], max_new_tokens=2)


def test_a_template_that_is_no_text_is_refused(gpt2_bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(gpt2_bundle, tmp_path / "copy.mmedge")
    with Generator.load(copy, precision="fp32") as model:
        (copy / str(model.settings.chat_template)).write_bytes(b"\xff")
        with pytest.raises(BundleError, match=r"chat_template\.jinja: not UTF-8"):
            model.chat([{"role": "user", "content": "hi"}])


def test_without_a_template_there_is_no_chat(gpt2_bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(gpt2_bundle, tmp_path / "copy.mmedge")
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["kind"]["chat_template"] = None
    path.write_text(json.dumps(manifest), encoding="utf-8")
    with (
        Generator.load(copy, precision="fp32") as model,
        pytest.raises(InputError, match="has no chat template"),
    ):
        model.chat([{"role": "user", "content": "hi"}])


def test_a_mismatch_is_an_error(gpt2_bundle: Path) -> None:
    with Generator.load(gpt2_bundle, precision="int8") as model:
        with pytest.raises(InputError, match=f"the model has {GPT2_CONTEXT}"):
            model.complete("a text", max_new_tokens=GPT2_CONTEXT)
        with pytest.raises(InputError, match=rf"prompt of {GPT2_CONTEXT + 1} tokens"):
            model.complete("x" * (GPT2_CONTEXT + 1))
        made = model.complete("x" * (GPT2_CONTEXT - 5))
        assert len(made.tokens) <= 6  # what is left, where no number is given
        with pytest.raises(TextError, match="empty"):
            model.complete("")
        with pytest.raises(InputError, match="empty"):
            model.complete([])
        with pytest.raises(InputError, match="list of one or more"):
            model.complete_all("a text")
        with pytest.raises(InputError, match="expected one of"):
            model.chat([{"role": "robot", "content": "hi"}])


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
