"""The search API on an index in memory."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from served import COLOURS, MemoryStore, client_of, unit
from starlette.testclient import TestClient

from mmedge.errors import BackendError, IndexCorruptedError, RetrievalError, StorageError
from mmedge.models import DualEncoder
from mmedge.retrieval.items import Item
from mmedge.specs import Modality


def ids(response: Any) -> list[str]:
    assert response.status_code == 200, response.text
    return [hit["id"] for hit in response.json()["results"]]


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), COLOURS[colour]).save(buffer, "PNG")
    return buffer.getvalue()


def problem(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    found: dict[str, Any] = response.json()
    assert found["status"] == status
    return found


def test_a_search_by_text_ranks_as_the_model_does(
    client: TestClient, model: DualEncoder, photos: dict[str, Path]
) -> None:
    scores = model.similarity(list(photos.values()), "a blue square")[:, 0]
    expected = [f"photos/{name}.png" for _, name in sorted(zip(-scores, photos, strict=True))]
    by_get = client.get("/api/search", params={"q": "a blue square"})
    by_post = client.post("/api/search", json={"text": "a blue square"})
    assert ids(by_get) == ids(by_post) == expected
    best = by_get.json()["results"][0]
    assert best["score"] == pytest.approx(float(scores.max()), abs=1e-5)
    timing = by_get.json()["timing"]
    assert 0 < timing["encode_ms"] + timing["search_ms"] <= timing["total_ms"]


def test_k_bounds_the_results(client: TestClient) -> None:
    assert len(ids(client.get("/api/search", params={"q": "red", "k": 1}))) == 1


@pytest.mark.parametrize("colour", COLOURS)
def test_a_search_by_image_finds_the_same_image(client: TestClient, colour: str) -> None:
    headers = {"content-type": "image/png"}
    found = client.post("/api/search/image?k=2", content=png(colour), headers=headers)
    assert ids(found)[0] == f"photos/{colour}.png"
    assert found.json()["results"][0]["score"] == pytest.approx(1, abs=1e-4)


def test_a_search_by_vector_ignores_its_length(client: TestClient, store: MemoryStore) -> None:
    vector = (37 * store.stored["photos/green.png"].vectors[0]).tolist()
    found = client.post("/api/search", json={"vector": vector, "k": 1})
    assert ids(found) == ["photos/green.png"]
    assert found.json()["timing"]["encode_ms"] is None


@pytest.mark.parametrize("scale", [1e308, 1e-300])
def test_a_vector_of_extreme_numbers_has_a_direction(client: TestClient, scale: float) -> None:
    plain = client.post("/api/search", json={"vector": [1, 1, -1, 1]}).json()["results"]
    vector = [scale, scale, -scale, scale]
    found = client.post("/api/search", json={"vector": vector}).json()["results"]
    assert [hit["score"] for hit in found] == pytest.approx([hit["score"] for hit in plain])


def test_similar_items_leave_the_item_out(client: TestClient) -> None:
    found = client.get("/api/similar/photos%2Fred.png", params={"k": 2})
    assert set(ids(found)) == {"photos/green.png", "photos/blue.png"}


def test_a_part_of_an_item_is_searched_by(tmp_path: Path) -> None:
    store = MemoryStore(2)
    both = Item("video", vectors=unit(1, 0).repeat(2, axis=0))
    both.vectors[1] = (0, 1)
    store.upsert([both, Item("x", unit(1, 0.1)), Item("y", unit(0.1, 1))])
    client = client_of(store, None, [tmp_path])
    assert ids(client.get("/api/similar/video?part=0"))[0] == "x"
    assert ids(client.get("/api/similar/video?part=1"))[0] == "y"
    problem(client.get("/api/similar/video?part=2"), 404)
    assert client.get("/api/similar/x").json()["results"][0]["part"] == 0


def test_a_filter_is_applied(client: TestClient) -> None:
    where = 'colour in ("red", "blue") and weight < 2'
    found = client.get("/api/search", params={"q": "green", "where": where})
    assert ids(found) == ["photos/red.png"]


def test_a_text_joins_an_image_or_an_item(client: TestClient, model: DualEncoder) -> None:
    item = client.get("/api/items/photos%2Fred.png")
    assert item.status_code == 200
    image = model.encode_image(png("red"))[0]
    text = model.encode_text("a green square")[0]
    both = (image + text) / np.linalg.norm(image + text)
    expected = {f"photos/{c}.png": float(model.encode_image(png(c))[0] @ both) for c in COLOURS}
    by_image = client.post("/api/search/image?q=a green square", content=png("red")).json()
    found = {hit["id"]: hit["score"] for hit in by_image["results"]}
    assert found == pytest.approx(expected, abs=1e-4)
    by_item = client.get("/api/similar/photos%2Fred.png?q=a green square").json()
    left = {name: score for name, score in expected.items() if name != "photos/red.png"}
    assert {hit["id"]: hit["score"] for hit in by_item["results"]} == pytest.approx(left, abs=1e-4)
    several = {"text": "a green square", "like": ["photos/red.png"]}
    assert client.post("/api/search", json=several).json()["results"] == by_item["results"]


def test_unwanted_items_rank_lower(client: TestClient, store: MemoryStore) -> None:
    vector = [1.0, 1.0, 1.0, 1.0]
    plain = client.post("/api/search", json={"vector": vector}).json()["results"]
    worst = ids(client.post("/api/search", json={"vector": vector, "unlike": [plain[0]["id"]]}))
    assert worst[0] != plain[0]["id"]
    without = client.get("/api/search", params={"q": "a red square", "without": "a photo"})
    assert len(ids(without)) == 3
    scores = [hit["score"] for hit in without.json()["results"]]
    usual = client.get("/api/search", params={"q": "a red square"}).json()["results"]
    assert scores != [hit["score"] for hit in usual]


def test_further_options_reach_the_index(client: TestClient, store: MemoryStore) -> None:
    client.get("/api/search?q=red")
    assert store.asked == {"recall": 0.95, "distinct": None, "words": None}
    client.get("/api/similar/photos%2Fred.png?recall=1&distinct=0.9&words=wall")
    assert store.asked == {"recall": 1, "distinct": 0.9, "words": "wall"}


def test_the_index_gets_what_a_query_was_encoded_from(
    client: TestClient, store: MemoryStore
) -> None:
    client.get("/api/search?q=red")
    assert store.modality is Modality.TEXT
    for path in ("/api/similar/photos%2Fred.png", "/api/search?q=red&without=blue"):
        client.get(path)
        assert store.modality is None


def test_items_of_a_query_must_be_there(client: TestClient) -> None:
    problem(client.post("/api/search", json={"like": ["absent"]}), 404)
    problem(client.post("/api/search", json={"text": "red", "unlike": ["absent"]}), 404)


@pytest.mark.parametrize("where", ["colour = ", 'colour = "red" or', "(((", "x; DROP TABLE items"])
def test_a_malformed_filter_shows_the_place(client: TestClient, where: str) -> None:
    found = problem(client.get("/api/search", params={"q": "red", "where": where}), 400)
    assert found["errors"][0]["field"] == "where"
    assert "expected" in found["detail"]


def test_an_unknown_field_of_a_filter_names_the_nearest(client: TestClient) -> None:
    found = problem(client.get("/api/search", params={"q": "red", "where": "color = 1"}), 400)
    assert "colour" in found["detail"]


def test_an_item_is_returned_without_vectors_and_folders(
    client: TestClient, tmp_path: Path
) -> None:
    found = client.get("/api/items/photos%2Fred.png").json()
    assert found == {
        "id": "photos/red.png",
        "time": 1_767_225_600.0,
        "source": "red.png",
        "text": "a red wall",
        "metadata": {"colour": "red", "tags": ["wall", "red"], "weight": 0.0},
        "thumbnail": "/api/thumbnails/photos%2Fred.png",
    }


def test_items_are_listed_page_by_page(client: TestClient) -> None:
    first = client.get("/api/items", params={"k": 2}).json()
    rest = client.get("/api/items", params={"k": 2, "after": first["next"]}).json()
    names = [item["id"] for item in first["items"] + rest["items"]]
    assert names == ["photos/red.png", "photos/green.png", "photos/blue.png"]
    assert rest["next"] is None


def test_listed_items_pass_the_filter(client: TestClient) -> None:
    found = client.get("/api/items", params={"k": 1, "where": "weight > 2"}).json()
    assert [item["id"] for item in found["items"]] == ["photos/blue.png"]


def test_a_page_of_items_ends_where_a_filter_passes_little(tmp_path: Path) -> None:
    store = MemoryStore(2)
    store.upsert([Item(f"{n}", unit(1, n), metadata={"n": n}) for n in range(2500)])
    client = client_of(store, None, [])
    asked = {"k": 200, "where": "n = 2400"}
    first = client.get("/api/items", params=asked).json()
    assert first["items"] == []
    rest = client.get("/api/items", params={**asked, "after": first["next"]}).json()
    assert [item["id"] for item in rest["items"]] == ["2400"]
    assert rest["next"] is None


def test_the_statistics_name_the_search_methods(client: TestClient, model: DualEncoder) -> None:
    found = client.get("/api/stats").json()
    assert found == {
        "name": "photos.index",
        "items": 3,
        "dim": model.embedding_dim,
        "space": model.space,
        "searchable_by": ["text", "image"],
        "fields": ["time", "source", "id", "colour", "tags", "weight"],
        "images": True,
        "max_image_bytes": 20 << 20,
    }


def test_an_index_without_a_model_is_searched_by_items(store: MemoryStore) -> None:
    client = client_of(store, None, [])
    assert client.get("/api/stats").json()["searchable_by"] == []
    assert len(ids(client.get("/api/similar/photos%2Fred.png"))) == 2
    found = problem(client.get("/api/search?q=red"), 409)
    assert "--bundle" in found["detail"]
    problem(client.post("/api/search/image", content=png("red")), 409)


def test_thumbnails_are_scaled_down_and_encoded_anew(client: TestClient) -> None:
    found = client.get("/api/thumbnails/photos%2Fred.png", params={"side": 32})
    assert found.headers["content-type"] == "image/jpeg"
    with Image.open(io.BytesIO(found.content)) as image:
        assert image.size == (32, 24)
        assert image.format == "JPEG"
        assert all(
            abs(a - b) < 12 for a, b in zip(image.getpixel((5, 5)), COLOURS["red"], strict=True)
        )


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/api/search", "q"),
        ("/api/search?q=", "q"),
        (f"/api/search?q={'x' * 2001}", "q"),
        ("/api/search?q=red&k=0", "k"),
        ("/api/search?q=red&k=201", "k"),
        ("/api/search?q=red&k=many", "k"),
        ("/api/search?q=red&recall=2", "recall"),
        ("/api/search?q=red&recall=nan", "recall"),
        ("/api/search?q=red&were=x", "were"),
        ("/api/search?q=red&distinct=0", "distinct"),
        ("/api/search?q=red&words=", "words"),
        (f"/api/search?q=red&where={'x' * 4001}", "where"),
        ("/api/thumbnails/photos%2Fred.png?side=100000", "side"),
        ("/api/similar/photos%2Fred.png?part=-1", "part"),
        ("/api/items?k=1000", "k"),
    ],
)
def test_values_out_of_bounds_are_named(client: TestClient, path: str, field: str) -> None:
    found = problem(client.get(path), 422)
    assert found["errors"][0]["field"] == field
    assert field in found["detail"]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"unlike": ["photos/red.png"]},
        {"text": "red", "like": [""]},
        {"like": ["photos/red.png"] * 33},
        {"text": "red", "colour": 1},
        {"vector": []},
        {"vector": ["x"]},
        {"text": 3},
        [],
    ],
)
def test_bodies_that_are_no_search_are_refused(client: TestClient, body: object) -> None:
    problem(client.post("/api/search", json=body), 422)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"vector": [NaN, 0, 0, 0]}', "\xff"])
def test_bodies_that_are_no_json_are_refused(client: TestClient, text: str) -> None:
    headers = {"content-type": "application/json"}
    found = client.post("/api/search", content=text.encode("latin-1"), headers=headers)
    assert found.status_code in (400, 422), found.text
    problem(found, found.status_code)


@pytest.mark.parametrize("vector", [[1, 2], [0, 0, 0, 0], [1] * 65_536])
def test_vectors_that_cannot_be_compared_are_refused(
    client: TestClient, vector: list[float]
) -> None:
    found = problem(client.post("/api/search", json={"vector": vector}), 400)
    assert "expected 4 numbers" in found["detail"]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/api/items/absent", 404),
        ("/api/similar/absent", 404),
        ("/api/thumbnails/absent", 404),
        ("/api/absent", 404),
        ("/docs", 404),
        ("/redoc", 404),
    ],
)
def test_a_missing_item_is_a_problem(client: TestClient, path: str, status: int) -> None:
    problem(client.get(path), status)


def test_other_methods_are_refused(client: TestClient) -> None:
    found = client.delete("/api/items/photos%2Fred.png")
    problem(found, 405)
    assert "GET" in found.headers["allow"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RetrievalError("{path}: the index is closed."), 400),
        (StorageError("Cannot read {path}: the disk fails."), 500),
        (IndexCorruptedError("{path}/record.sqlite is damaged."), 500),
        (BackendError("/opt/secret/engine.plan failed."), 500),
        (ValueError("{path}"), 500),
    ],
)
def test_errors_show_no_path_and_no_traceback(
    store: MemoryStore, tmp_path: Path, error: Exception, status: int
) -> None:
    index = tmp_path / "photos.index"
    filled = type(error)(str(error).replace("{path}", str(index)))

    def fail() -> None:
        raise filled

    store.before_search = fail
    client = client_of(store, None, [], hidden=[index])
    response = client.get("/api/similar/photos%2Fred.png")
    problem(response, status)
    for secret in (str(tmp_path), "/opt", "Traceback", ".py"):
        assert secret not in response.text


def test_the_openapi_document_describes_what_is_sent(client: TestClient) -> None:
    document = client.get("/api/openapi.json").json()
    assert {path: sorted(operations) for path, operations in document["paths"].items()} == {
        "/api/search": ["get", "post"],
        "/api/search/image": ["post"],
        "/api/similar/{id}": ["get"],
        "/api/items": ["get"],
        "/api/items/{id}": ["get"],
        "/api/thumbnails/{id}": ["get"],
        "/api/stats": ["get"],
    }
    for operations in document["paths"].values():
        for operation in operations.values():
            assert set(operation["responses"]) == {"200", "4XX", "5XX"}
            assert list(operation["responses"]["4XX"]["content"]) == ["application/problem+json"]
    thumbnail = document["paths"]["/api/thumbnails/{id}"]["get"]["responses"]["200"]
    assert list(thumbnail["content"]) == ["image/jpeg"]
    hit = document["components"]["schemas"]["Hit"]
    found = client.get("/api/search?q=red").json()["results"][0]
    assert set(hit["properties"]) == set(hit["required"]) == set(found)
    body = document["paths"]["/api/search/image"]["post"]["requestBody"]["content"]
    assert "image/*" in body
