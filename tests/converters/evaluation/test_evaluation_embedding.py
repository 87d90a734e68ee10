"""How much of fp32 is left: every figure by hand where it is small enough."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmedge.bundle.differences import cosines
from mmedge.bundle.quality import Figure, Quality
from mmedge.converters.evaluation import base
from mmedge.converters.evaluation.embedding import METRICS
from mmedge.converters.evaluation.embedding_figures import (
    Embeddings,
    Labels,
    evaluate_variant,
    interchangeable,
    mixed_indexes,
    recall_at_k,
    task_quality,
    top_k_overlap,
    zero_shot_accuracy,
)
from mmedge.errors import CalibrationError, ConversionError, ShapeError
from mmedge.specs import Array, Modality

NONE = np.zeros((0, 2), np.float32)


def drop(metric: str, quality: Quality) -> Figure:
    return base.drop(metric, quality, METRICS)


def unit(rows: Array) -> Array:
    vectors: Array = np.asarray(rows, np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def random_unit(count: int, dim: int, seed: int) -> Array:
    return unit(np.random.default_rng(seed).normal(size=(count, dim)))


def at_degrees(*angles: float) -> Array:
    radians = np.deg2rad(angles)
    return unit(np.stack([np.cos(radians), np.sin(radians)], 1))


def noisy(vectors: Array, amount: float, seed: int) -> Array:
    noise = np.random.default_rng(seed).normal(size=vectors.shape)
    return unit(vectors + amount * noise / np.sqrt(vectors.shape[1]))


def scene(count: int, seed: int = 0, amount: float = 0.6) -> tuple[Embeddings, Labels]:
    """Images and captions that find each other often, and four classes."""
    texts = random_unit(count, 16, seed)
    classes = random_unit(4, 16, seed + 1)
    embeddings = Embeddings(noisy(texts, amount, seed + 2), texts, classes)
    nearest = (embeddings.items @ classes.T).argmax(axis=1)
    known = Labels(
        captions=tuple(f"caption {row}" for row in range(count)),
        labels=tuple("abcd"[index] for index in nearest),
        classes=tuple("abcd"),
    )
    return embeddings, known


def test_cosines_by_hand() -> None:
    reference = unit([[1, 0], [1, 0], [1, 0], [1, 0]])
    candidate = np.array([[2, 0], [0, 1], [-1, 0], [1, 1]], np.float32)
    np.testing.assert_allclose(cosines(reference, candidate), [1, 0, -1, 2**-0.5], atol=1e-7)


def test_a_zero_or_nan_embedding_agrees_with_nothing() -> None:
    candidate = np.array([[0, 0], [np.nan, 1]], np.float32)
    assert cosines(unit([[1, 0], [0, 1]]), candidate).tolist() == [-1, -1]


def test_cosines_need_equal_shapes() -> None:
    with pytest.raises(ShapeError):
        cosines(np.ones((2, 3), np.float32), np.ones((3, 3), np.float32))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 7))
def test_overlap_is_one_for_itself_and_for_a_rotation(seed: int, k: int) -> None:
    vectors = random_unit(12, 6, seed)
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(6, 6)))[0]
    assert top_k_overlap(vectors, vectors, k) == 1
    assert top_k_overlap(vectors, (vectors @ rotation).astype(np.float32), k) == 1


def test_overlap_counts_shared_neighbours_and_not_oneself() -> None:
    reference, moved = at_degrees(0, 1, 10, 11, 100), at_degrees(0, 13, 10, 11, 100)
    # Nearest before: 1, 0, 3, 2, 3; after: 2, 3, 3, 2, 1.
    assert top_k_overlap(reference, moved, 1) == pytest.approx(2 / 5)
    with pytest.raises(ShapeError):
        top_k_overlap(reference, moved, 5)


def test_recall_by_hand() -> None:
    gallery = unit([[1, 0], [0, 1], [-1, 0]])
    queries = unit([[1, 0.1], [1, 0.2], [-1, 0.1]])
    own = np.arange(3)
    assert recall_at_k(queries, gallery, own, own, 1) == pytest.approx(2 / 3)
    assert recall_at_k(queries, gallery, own, own, 2) == 1


def test_zero_shot_by_hand() -> None:
    images = unit([[1, 0], [0.9, 0.1], [0, 1]])
    assert zero_shot_accuracy(images, unit([[1, 0], [0, 1]]), [0, 1, 1]) == pytest.approx(2 / 3)


def test_equal_captions_are_relevant_to_each_others_images() -> None:
    embeddings = Embeddings(unit([[1, 0], [0, 1], [-1, 0]]), unit([[0, 1], [0, 1], [-1, 0]]), NONE)
    one = Labels(captions=("a", "b", "c"))
    same = Labels(captions=("a", "a", "c"))
    apart = task_quality(embeddings, embeddings, one).figures
    # Image 0 is as near to nothing; its captions are both at a right angle: a tie of two.
    assert apart["text_to_image_recall@1"].value == pytest.approx(2 / 3)
    assert apart["image_to_text_recall@1"].value == pytest.approx((1 / 2 + 1 / 2 + 1) / 3)
    assert apart["recall@1"].value == pytest.approx((2 / 3 + 2 / 3) / 2)
    together = task_quality(embeddings, embeddings, same).figures
    assert together["text_to_image_recall@1"].value == 1
    assert set(apart) == {"text_to_image_recall@1", "image_to_text_recall@1", "recall@1"}


def test_images_without_a_label_do_not_count_for_zero_shot() -> None:
    images = unit([[1, 0], [0, 1], [0, 1]])
    embeddings = Embeddings(images, NONE, unit([[1, 0], [0, 1]]))
    known = Labels(labels=("x", None, "y"), classes=("x", "y"))
    assert set(task_quality(embeddings, embeddings, known).figures) == {"zero_shot_accuracy"}
    assert task_quality(embeddings, embeddings, known).figures["zero_shot_accuracy"].value == 1
    nothing = task_quality(embeddings, embeddings, Labels())
    assert (nothing.figures, nothing.drops) == ({}, {})


def test_every_metric_is_in_the_table_of_figures() -> None:
    about = (Path(__file__).parents[3] / "docs" / "bundle.md").read_text(encoding="utf-8")
    table = about[about.index("| figure | `--metric`") : about.index("## Reading one")]
    for name, metric in METRICS.items():
        if not name.startswith("recall@"):
            assert f"`{name}`" in table
            assert f"`{metric.figure}`" in table


@pytest.mark.parametrize("modality", [Modality.IMAGE, Modality.TEXT])
def test_fp32_itself_agrees_with_itself_and_loses_nothing(modality: Modality) -> None:
    fp32, known = scene(40)
    copied = Embeddings(fp32.items.copy(), fp32.texts.copy(), fp32.class_texts.copy())
    quality = evaluate_variant(fp32, copied, modality, known, data="here")
    assert (quality.settings["top_k"], quality.samples, quality.data) == (10, 40, "here")
    for name, metric in METRICS.items():
        if metric.agreement:
            assert quality.figures[metric.figure].value == pytest.approx(1), name
        lost = drop(name, quality)
        assert (lost.value, lost.low, lost.high) == pytest.approx((0, 0, 0), abs=1e-6), name


@pytest.mark.parametrize("modality", [Modality.IMAGE, Modality.TEXT])
def test_more_noise_is_worse_by_every_metric(modality: Modality) -> None:
    fp32, known = scene(60)
    qualities = []
    for amount in (0.05, 0.5, 3.0):
        worse = noisy(fp32.of(modality), amount, 7)
        texts = modality is Modality.TEXT
        candidate = replace(fp32, texts=worse) if texts else replace(fp32, items=worse)
        if texts:
            candidate = replace(candidate, class_texts=noisy(fp32.class_texts, amount, 8))
        qualities.append(evaluate_variant(fp32, candidate, modality, known, data=""))
    for name in METRICS:
        first, middle, last = (drop(name, quality) for quality in qualities)
        assert first.value <= middle.value + 1e-9, name
        assert middle.value < last.value, name
        assert last.low > 0, name


def test_a_rotated_space_agrees_alone_but_not_together() -> None:
    fp32, known = scene(60)
    rotation = np.linalg.qr(np.random.default_rng(3).normal(size=(16, 16)))[0]
    turned = (fp32.items @ rotation).astype(np.float32)
    quality = evaluate_variant(fp32, replace(fp32, items=turned), Modality.IMAGE, known, data="")
    assert quality.figures["top_k_overlap"].value == 1
    assert quality.figures["rank_correlation"].value == pytest.approx(1, abs=1e-4)
    # Ten of 59 by chance.
    assert quality.figures["interchangeability"].value < 0.3
    assert quality.figures["mixed_index"].value < 0.65
    assert not interchangeable(quality)


def test_a_shifted_space_can_be_searched_but_not_mixed() -> None:
    # Along an axis of its own: the order of distances stays, their size does not.
    fp32 = np.pad(random_unit(60, 16, 0), ((0, 0), (0, 1)))
    shifted = unit(fp32 + np.eye(17, dtype=np.float32)[16])
    pair = Embeddings(fp32, NONE, NONE)
    quality = evaluate_variant(
        pair, replace(pair, items=shifted), Modality.IMAGE, Labels(), data=""
    )
    assert quality.figures["interchangeability"].value == 1
    assert quality.figures["mixed_index"].high < 0.75
    assert not interchangeable(quality)


def test_whether_vectors_may_be_mixed_is_decided_by_searches() -> None:
    fp32, known = scene(300)

    def quality_of(images: Array) -> Quality:
        candidate = replace(fp32, items=images)
        return evaluate_variant(fp32, candidate, Modality.IMAGE, known, data="")

    close, far = quality_of(noisy(fp32.items, 0.01, 1)), quality_of(noisy(fp32.items, 0.5, 1))
    assert interchangeable(close)
    assert not interchangeable(far)
    without_captions = close.model_copy(update={"drops": {}})
    assert interchangeable(without_captions)
    lost = Figure(value=0.02, low=0, high=0.04)
    assert not interchangeable(close.model_copy(update={"drops": {"mixed_recall@1": lost}}))
    doubtful = Figure(value=0.92, low=0.89, high=0.95)
    for name in ("interchangeability", "mixed_index"):
        figures = {**close.figures, name: doubtful}
        assert not interchangeable(close.model_copy(update={"figures": figures}))


def test_the_same_cosine_is_harmless_or_not_by_how_densely_vectors_lie() -> None:
    spread, dense = random_unit(100, 16, 0), random_unit(100, 16, 0)
    dense = unit(0.02 * dense + np.eye(1, 16, dtype=np.float32))
    verdicts = []
    for images in (spread, dense):
        pair = Embeddings(images, NONE, NONE)
        candidate = replace(pair, items=noisy(images, 0.01, 3))
        quality = evaluate_variant(pair, candidate, Modality.IMAGE, Labels(), data="")
        assert quality.figures["cosine_p1"].value > 0.999
        verdicts.append(interchangeable(quality))
    assert verdicts == [True, False]


def test_interchangeability_by_hand() -> None:
    """Groups of eleven at one point, so that the ten nearest are the rest of the group."""
    reference = np.repeat(at_degrees(0, 90, 180), 11, axis=0)
    moved = reference.copy()
    moved[0] = reference[-1]
    pair = Embeddings(reference, NONE, NONE)
    quality = evaluate_variant(pair, replace(pair, items=moved), Modality.IMAGE, Labels(), data="")
    # fp32 in the other's vectors: the ten companions of 0 find 9, and one by chance of the eleven
    # at 90 degrees, 0 itself still finds all; the third group finds 10 of 11, one of them wrong.
    # The other in fp32's vectors: only 0 is wrong, and finds none.
    third = 11 * 10 * (10 / 11) / 10
    across = (1 + 10 * 9 / 10 + 11 + third) / 33
    back = 32 / 33
    assert quality.value("interchangeability") == pytest.approx((across + back) / 2)
    assert quality.value("cosine_mean") == pytest.approx((32 - 1) / 33)


def test_index_recall_by_hand() -> None:
    """Three texts; an image of each; one of the images moves to another text."""
    texts, images = at_degrees(0, 90, 180), at_degrees(1, 92, 176)
    fp32 = Embeddings(images, texts, NONE)
    moved = replace(fp32, items=at_degrees(178, 92, 176))
    quality = evaluate_variant(fp32, moved, Modality.IMAGE, Labels(), data="")
    assert quality.settings["top_k"] == 2
    before, after = images @ texts.T, moved.items @ texts.T
    for name, right, got in (
        ("index_recall_fp32_queries", before.T, after.T),
        ("index_recall_fp32_index", before, after),
    ):
        nearest = [[set(np.argsort(-row)[:2]) for row in rows] for rows in (right, got)]
        shared = [len(one & two) / 2 for one, two in zip(*nearest, strict=True)]
        assert quality.value(name) == pytest.approx(np.mean(shared)), name
        assert 0 < quality.value(name) < 1
    halves = ("index_recall_fp32_queries", "index_recall_fp32_index")
    mean = np.mean([quality.value(name) for name in halves])
    assert quality.value("index_recall") == pytest.approx(mean)


def test_index_recall_sees_what_one_encoder_by_itself_does_not() -> None:
    """Turned images are as near to each other as before, and to other texts than before."""
    fp32, known = scene(60)
    rotation = np.linalg.qr(np.random.default_rng(3).normal(size=(16, 16)))[0]
    for modality, field in ((Modality.IMAGE, "items"), (Modality.TEXT, "texts")):
        turned = replace(fp32, **{field: (fp32.of(modality) @ rotation).astype(np.float32)})
        quality = evaluate_variant(fp32, turned, modality, known, data="")
        assert quality.figures["top_k_overlap"].value == 1
        assert quality.figures["index_recall"].high < 0.4


def test_index_recall_needs_two_modalities() -> None:
    pair = Embeddings(random_unit(20, 16, 0), NONE, NONE)
    quality = evaluate_variant(pair, pair, Modality.IMAGE, Labels(), data="images alone")
    assert not any(name.startswith("index_recall") for name in quality.figures)
    with pytest.raises(CalibrationError, match="needs an encoder of texts and one of images"):
        drop("index-recall", quality)


def test_a_mixed_index_is_half_of_each_and_the_rest_the_other_way_round() -> None:
    fp32, other = np.zeros((9, 2), np.float32), np.ones((9, 2), np.float32)
    one, rest = mixed_indexes(fp32, other, seed=1)
    assert one[:, 0].sum() == 5
    np.testing.assert_array_equal(one + rest, np.ones((9, 2)))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000))
def test_the_order_of_the_samples_changes_nothing(seed: int) -> None:
    fp32, known = scene(25, seed)
    images = noisy(fp32.items, 0.3, seed + 5)
    images[3:6] = images[3]
    order = np.random.default_rng(seed).permutation(25)
    assert known.captions is not None
    assert known.labels is not None
    shuffled = Labels(
        tuple(known.captions[row] for row in order),
        tuple(known.labels[row] for row in order),
        known.classes,
    )
    turned = Embeddings(fp32.items[order], fp32.texts[order], fp32.class_texts)
    one = evaluate_variant(fp32, replace(fp32, items=images), Modality.IMAGE, known, data="")
    other = evaluate_variant(
        turned, replace(turned, items=images[order]), Modality.IMAGE, shuffled, data=""
    )
    for name, figure in one.figures.items():
        if not name.startswith("mixed"):  # which half is whose is drawn
            assert other.figures[name].value == pytest.approx(figure.value, abs=1e-6), name


def test_collapsed_embeddings_find_as_much_as_chance() -> None:
    fp32, known = scene(41)
    same = np.repeat(fp32.items[:1], 41, axis=0)
    quality = evaluate_variant(fp32, replace(fp32, items=same), Modality.IMAGE, known, data="")
    assert quality.value("top_k_overlap") == pytest.approx(10 / 40)
    assert quality.value("rank_correlation") == 0
    assert quality.value("text_to_image_recall@5") == pytest.approx(5 / 41)


def test_nan_embeddings_find_nothing() -> None:
    fp32, known = scene(30)
    broken = np.full_like(fp32.items, np.nan)
    quality = evaluate_variant(fp32, replace(fp32, items=broken), Modality.IMAGE, known, data="")
    assert quality.value("cosine_mean") == -1
    for name in ("top_k_overlap", "rank_correlation", "recall@1", "zero_shot_accuracy"):
        assert quality.value(name) == 0, name
    one = fp32.items.copy()
    one[0] = np.nan
    quality = evaluate_variant(fp32, replace(fp32, items=one), Modality.IMAGE, known, data="")
    assert quality.value("cosine_min") == -1
    assert 0.9 < quality.figures["top_k_overlap"].value < 1


def test_two_samples_are_enough_and_one_is_not() -> None:
    fp32, known = scene(2)
    quality = evaluate_variant(fp32, fp32, Modality.IMAGE, known, data="two")
    assert (quality.settings["top_k"], quality.samples) == (1, 2)
    assert "recall@5" not in quality.figures
    assert "recall@1" in quality.drops
    alone = Embeddings(fp32.items[:1], fp32.texts[:1], fp32.class_texts)
    with pytest.raises(ShapeError, match="got 1 samples, expected 2"):
        evaluate_variant(alone, alone, Modality.IMAGE, Labels(), data="one")


def test_the_interval_of_a_drop_is_that_of_paired_samples() -> None:
    fp32, known = scene(300, amount=1.0)
    candidate = replace(fp32, items=noisy(fp32.items, 0.1, 4))
    quality = evaluate_variant(fp32, candidate, Modality.IMAGE, known, data="")
    before = task_quality(fp32, fp32, known).figures["recall@1"]
    after, lost = quality.figures["recall@1"], drop("recall@1", quality)
    assert 0.2 < after.value < 0.9
    assert lost.value == pytest.approx(before.value - after.value)
    unpaired = np.hypot(before.high - before.low, after.high - after.low)
    assert lost.high - lost.low < unpaired / 2


def test_a_drop_of_agreement_is_one_minus_agreement() -> None:
    fp32, known = scene(40)
    candidate = replace(fp32, items=noisy(fp32.items, 0.2, 4))
    quality = evaluate_variant(fp32, candidate, Modality.IMAGE, known, data="")
    figure, lost = quality.figures["cosine_p1"], drop("cosine-p1", quality)
    assert isinstance(lost, Figure)
    expected = (1 - figure.value, 1 - figure.high, 1 - figure.low)
    assert (lost.value, lost.low, lost.high) == expected


def test_an_unavailable_metric_is_an_error_that_lists_the_others() -> None:
    fp32, known = scene(4)
    quality = evaluate_variant(fp32, fp32, Modality.IMAGE, known, data="four images")
    with pytest.raises(CalibrationError, match=r"'recall@5'.* four images.* recall@1, zero-shot"):
        drop("recall@5", quality)
    with pytest.raises(ConversionError, match=r"'recal@1'.*Did you mean recall@1"):
        drop("recal@1", quality)


def test_two_variants_are_judged_together_too() -> None:
    fp32, known = scene(80)
    images, texts = noisy(fp32.items, 0.5, 11), noisy(fp32.texts, 0.5, 12)
    one = task_quality(fp32, replace(fp32, items=images), known).drops["recall@1"]
    both = task_quality(fp32, replace(fp32, items=images, texts=texts), known).drops["recall@1"]
    assert both.value > one.value > 0


def test_the_same_seed_draws_the_same() -> None:
    fp32, known = scene(30)
    candidate = replace(fp32, items=noisy(fp32.items, 0.3, 1))
    same = [evaluate_variant(fp32, candidate, Modality.IMAGE, known, data="") for _ in range(2)]
    assert same[0] == same[1]
    other = evaluate_variant(fp32, candidate, Modality.IMAGE, known, data="", seed=1)
    assert other.figures["cosine_mean"].low != same[0].figures["cosine_mean"].low
