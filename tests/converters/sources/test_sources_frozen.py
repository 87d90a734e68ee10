"""The fingerprint of an embedding space: what a processor sets, and nothing that it leaves out."""

from __future__ import annotations

from mmedge.converters.sources.frozen import embedding_space
from mmedge.preprocess.config import ImageConfig, ProcessorConfig, TextConfig
from mmedge.preprocess.steps import Decode, Rescale, Resize

IMAGE = ImageConfig(
    steps=(
        Decode(),
        Resize(mode="exact", height=8, width=8, resample="bicubic"),
        Rescale(factor=1 / 255),
    )
)
TEXT = TextConfig(max_length=8, padding="longest", pad_id=0)


class Newer(TextConfig):
    """A configuration of a later version, with one more field."""

    later: bool = False


def space(*configs: ProcessorConfig) -> str:
    return embedding_space("clip", "ab", {}, {one.type: one for one in configs}, {})


def test_a_new_field_with_a_default_changes_no_fingerprint() -> None:
    fields = TEXT.model_dump()
    assert space(IMAGE, TEXT) == space(IMAGE, Newer(**fields))
    assert space(IMAGE, TEXT) != space(IMAGE, Newer(**fields, later=True))


def test_whatever_is_set_changes_it() -> None:
    other = ImageConfig(steps=(*IMAGE.steps[:2], Rescale(factor=1 / 127)))
    shorter = ImageConfig(steps=IMAGE.steps[:2])
    longest = TEXT.model_copy(update={"max_length": 9})
    given = [(IMAGE, TEXT), (other, TEXT), (shorter, TEXT), (IMAGE, longest), (IMAGE,)]
    assert len({space(*each) for each in given}) == len(given)
