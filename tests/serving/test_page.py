"""The search page in a headless Chromium."""

from __future__ import annotations

import os
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from served import MemoryStore, app_of, unit

from mmedge.models import DualEncoder
from mmedge.retrieval.items import Item
from mmedge.serving.guard import Guard

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not BROWSER, reason="no Chromium on this machine"),
]
playwright = pytest.importorskip("playwright.sync_api")
PATIENCE_MS = 60_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        launched = started.chromium.launch(executable_path=BROWSER, args=sandbox)
        yield launched
        launched.close()


@contextmanager
def serving(app: Guard) -> Iterator[str]:
    """Serve an application in a thread; yield its address."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(app, lifespan="off", log_config=None, ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()


class Watched:
    """A page, with what it asked for and what went wrong in it."""

    def __init__(self, browser: Any, address: str, **context: Any) -> None:
        self.address = address
        self.page = browser.new_context(
            viewport={"width": 1280, "height": 900}, **context
        ).new_page()
        self.page.set_default_timeout(PATIENCE_MS)
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._console)

    def _console(self, message: Any) -> None:
        # Chromium prints a line for every refused request; those are what tests provoke.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.errors.append(message.text)

    def open(self, path: str = "") -> None:
        self.page.goto(self.address + path)
        # The stats are there, and what the address asks for is shown.
        playwright.expect(self.page.locator("#facts")).not_to_be_empty(timeout=PATIENCE_MS)
        self.settled()

    def settled(self) -> None:
        """No answer is waited for."""
        stale = self.page.locator("#results.stale")
        playwright.expect(stale).to_have_count(0, timeout=PATIENCE_MS)

    @property
    def titles(self) -> Any:
        return self.page.locator(".card .title")

    def shows(self, *titles: str) -> None:
        """These cards come to be shown, and no others."""
        playwright.expect(self.titles).to_have_text(list(titles), timeout=PATIENCE_MS)

    def begins(self, title: str) -> None:
        """The first card comes to be this one."""
        playwright.expect(self.titles.first).to_have_text(title, timeout=PATIENCE_MS)

    def status(self, text: str) -> None:
        playwright.expect(self.page.locator("#status")).to_contain_text(text, timeout=PATIENCE_MS)

    def problem(self, *texts: str) -> None:
        for text in texts:
            box = self.page.locator("#problem")
            playwright.expect(box).to_contain_text(text, timeout=PATIENCE_MS)

    def check(self) -> None:
        """No script failed, and nothing was asked of another server."""
        assert self.errors == []
        local = (self.address, f"blob:{self.address}")
        assert [each for each in self.requests if not each.startswith(local)] == []


@pytest.fixture
def watched(
    browser: Any, store: MemoryStore, model: DualEncoder, tmp_path: Path
) -> Iterator[Watched]:
    with serving(app_of(store, model, [tmp_path / "photos"])) as address:
        page = Watched(browser, address)
        yield page
        page.check()
        page.page.context.close()


def test_a_text_is_searched_for(
    watched: Watched, model: DualEncoder, photos: dict[str, Path]
) -> None:
    watched.open()
    watched.status("Items of the index")
    watched.shows("a red wall", "green.png", "blue.png")
    scores = model.similarity(list(photos.values()), "a blue square")[:, 0]
    names = {"red": "a red wall", "green": "green.png", "blue": "blue.png"}
    expected = [names[colour] for _, colour in sorted(zip(-scores, photos, strict=True))]
    watched.page.fill("#text", "a blue square")
    watched.page.press("#text", "Enter")
    watched.status("3 results in")
    watched.status("encoding")
    watched.shows(*expected)
    best = watched.page.locator(".card .score").first.inner_text()
    assert float(best) == pytest.approx(float(scores.max()), abs=0.001)
    image = watched.page.locator(".card img").first
    playwright.expect(image).to_have_js_property("naturalWidth", 64)
    # The address holds the search: reloading repeats it, and back returns.
    assert "q=a+blue+square" in watched.page.url
    watched.page.reload()
    watched.shows(*expected)
    playwright.expect(watched.page.locator("#text")).to_have_value("a blue square")
    watched.page.go_back()
    watched.shows("a red wall", "green.png", "blue.png")


def test_an_image_is_chosen_dropped_or_pasted(watched: Watched, photos: dict[str, Path]) -> None:
    watched.open()
    watched.page.set_input_files("#file", photos["green"])
    watched.begins("green.png")
    playwright.expect(watched.page.locator("#example-label")).to_have_text("green.png")
    for kind, colour, title in (("drop", "blue", "blue.png"), ("paste", "red", "a red wall")):
        given = {"kind": kind, "bytes": list(photos[colour].read_bytes()), "name": f"{colour}.png"}
        watched.page.evaluate(
            """({ kind, bytes, name }) => {
                const data = new DataTransfer();
                data.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
                const about = { bubbles: true, cancelable: true };
                document.body.dispatchEvent(kind === "drop"
                    ? new DragEvent("drop", { ...about, dataTransfer: data })
                    : new ClipboardEvent("paste", { ...about, clipboardData: data }));
            }""",
            given,
        )
        watched.begins(title)
    score = watched.page.locator(".card .score").first
    playwright.expect(score).to_have_text("1.000")
    watched.page.go_back()
    watched.begins("blue.png")  # the image of the step before
    watched.page.click("#example-clear")
    watched.status("Items of the index")


def test_a_file_that_is_no_image_is_refused_readably(watched: Watched, tmp_path: Path) -> None:
    watched.open()
    (tmp_path / "notes.txt").write_text("x")
    watched.page.set_input_files("#file", tmp_path / "notes.txt")
    watched.problem("Not an image", "notes.txt")
    (tmp_path / "fake.png").write_text("x")
    watched.page.set_input_files("#file", tmp_path / "fake.png")
    watched.problem("This search cannot be done", "not an image that can be read")
    (tmp_path / "big.png").write_bytes(bytes((20 << 20) + 1))
    watched.page.set_input_files("#file", tmp_path / "big.png")
    watched.problem("The image is too large", "20 MiB")
    watched.shows()


def test_a_late_response_does_not_replace_a_refusal(watched: Watched, tmp_path: Path) -> None:
    watched.open()
    held: list[Any] = []

    def hold(route: Any) -> None:
        held.append(route)

    watched.page.route("**/api/search?*", hold)
    watched.page.fill("#text", "a blue square")
    watched.page.press("#text", "Enter")
    watched.status("Searching")
    (tmp_path / "notes.txt").write_text("x")
    watched.page.set_input_files("#file", tmp_path / "notes.txt")
    watched.problem("Not an image", "notes.txt")
    watched.settled()
    held[0].fulfill(json={"results": [], "timing": {"search_ms": 1, "encode_ms": 1, "total_ms": 2}})
    watched.page.evaluate("fetch('/api/stats').then((answer) => answer.json())")
    watched.problem("Not an image", "notes.txt")


def test_more_like_an_item(watched: Watched) -> None:
    watched.open()
    watched.page.get_by_role("button", name="More like green.png").click()
    watched.status("2 results")
    assert "green.png" not in watched.titles.all_inner_texts()
    playwright.expect(watched.page.locator("#example-label")).to_have_text("like green.png")
    # A text typed beside the example narrows it.
    before = watched.page.locator(".card .score").all_inner_texts()
    watched.page.fill("#text", "a red square")
    watched.page.press("#text", "Enter")
    watched.status("encoding")
    assert watched.page.locator(".card .score").all_inner_texts() != before
    assert "like=" in watched.page.url
    assert "q=" in watched.page.url


def test_filters_narrow_and_their_errors_show_the_place(watched: Watched) -> None:
    watched.open("?q=red")
    watched.page.locator("summary").click()
    playwright.expect(watched.page.locator("#where-help")).to_contain_text("colour, tags, weight")
    watched.page.fill("#where", 'colour = "green"')
    watched.page.press("#where", "Enter")
    watched.status("1 result in")
    watched.shows("green.png")
    watched.page.fill("#where", "colour = ")
    watched.page.press("#where", "Enter")
    watched.problem("The filter cannot be used", "^")
    where = watched.page.locator("#where")
    playwright.expect(where).to_be_focused()
    playwright.expect(where).to_have_attribute("aria-invalid", "true")
    watched.page.fill("#where", "weight > 1000")
    watched.page.press("#where", "Enter")
    playwright.expect(watched.page.locator("#empty")).to_contain_text("Nothing found")
    playwright.expect(watched.page.locator("#problem")).to_be_empty()


def test_it_works_by_keyboard_alone(watched: Watched) -> None:
    watched.open("?q=red")
    watched.status("3 results")
    keys = watched.page.keyboard
    watched.page.locator("#results .open").nth(0).focus()
    keys.press("/")
    playwright.expect(watched.page.locator("#text")).to_be_focused()
    watched.page.locator("#results .open").nth(0).focus()
    for key, place in (("ArrowRight", 1), ("End", 2), ("ArrowLeft", 1), ("Home", 0)):
        keys.press(key)
        playwright.expect(watched.page.locator("#results .open").nth(place)).to_be_focused()
    keys.press("Enter")
    dialog = watched.page.get_by_role("dialog")
    playwright.expect(dialog).to_be_visible()
    playwright.expect(dialog).to_contain_text("photos/")
    keys.press("Escape")
    playwright.expect(dialog).to_be_hidden()
    playwright.expect(watched.page.locator("#results .open").nth(0)).to_be_focused()


def test_every_control_has_a_name(watched: Watched) -> None:
    watched.open("?q=red&like=photos/red.png")
    watched.page.locator("summary").click()
    watched.page.locator("#results .open").nth(0).click()
    watched.page.keyboard.press("Escape")
    names = watched.page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, a")]
            .filter((each) => each.checkVisibility())
            .map((each) => (each.getAttribute("aria-label") || each.textContent
                || each.labels?.[0]?.textContent || "").trim())"""
    )
    assert len(names) > 8
    assert all(names)
    for role, name in (("status", ""), ("search", "Search the index"), ("list", "Results")):
        assert watched.page.get_by_role(role, name=name or None).count() == 1


def luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(", ")]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_have_enough_contrast(
    browser: Any, store: MemoryStore, model: DualEncoder, tmp_path: Path, scheme: str
) -> None:
    """At least 4.5 to 1 for every text, as WCAG AA asks."""
    with serving(app_of(store, model, [tmp_path / "photos"])) as address:
        watched = Watched(browser, address, color_scheme=scheme)
        watched.open("?q=red&where=weight%20%3E")
        watched.problem("The filter cannot be used")
        pairs = watched.page.evaluate(SHOWN_COLOURS)
        watched.open("?q=red")
        watched.status("3 results")
        pairs += watched.page.evaluate(SHOWN_COLOURS)
        watched.page.context.close()
    assert len(pairs) > 20
    backgrounds = {background for _, background, _ in pairs}
    assert (min(map(luminance, backgrounds)) < 0.05) == (scheme == "dark")
    for ink, background, text in pairs:
        high, low = sorted((luminance(ink), luminance(background)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ink, background)


SHOWN_COLOURS = """() => {
    const isText = (node) => node.nodeType === Node.TEXT_NODE && node.data.trim();
    const own = (each) => [...each.childNodes].some(isText);
    const clear = (each) => getComputedStyle(each).backgroundColor === "rgba(0, 0, 0, 0)";
    const behind = (each) => clear(each) ? behind(each.parentElement) : each;
    return [...document.querySelectorAll("body *")]
        .filter((each) => each.checkVisibility() && own(each))
        .filter((each) => !each.closest("dialog, #drop, select, .skip"))
        .map((each) => [getComputedStyle(each).color,
            getComputedStyle(behind(each)).backgroundColor, each.textContent.trim()]);
}"""


def test_an_index_of_vectors_shows_metadata(browser: Any, tmp_path: Path) -> None:
    store = MemoryStore(2)
    hostile = "<img src=x onerror=\"document.title='caught'\"><script>alert(1)</script>"
    store.upsert(
        [
            Item(
                "<b>one</b>", unit(1, 0), text=hostile, metadata={"<i>": hostile, "tags": [hostile]}
            ),
            Item("../two", unit(1, 1), source="front camera", metadata={"speed": 1.25}),
            Item("gone", unit(0, 1), source=str(tmp_path / "gone.png"), metadata={"speed": 3}),
        ]
    )
    with serving(app_of(store, None, [tmp_path])) as address:
        watched = Watched(browser, address)
        watched.open()
        watched.shows(hostile, "front camera", "gone.png")
        playwright.expect(watched.page.locator("#text")).to_be_disabled()
        playwright.expect(watched.page.locator("#choose")).to_be_hidden()
        gone = watched.page.locator(".card").nth(2)
        playwright.expect(gone.locator("dd")).to_have_text("3")  # instead of the image
        playwright.expect(gone.locator("img")).to_have_count(0)
        watched.page.get_by_role("button", name="More like front camera").click()
        watched.status("2 results in")
        assert sorted(watched.titles.all_inner_texts()) == [hostile, "gone.png"]
        watched.page.locator("#results .open").first.click()
        playwright.expect(watched.page.get_by_role("dialog")).to_be_visible()
        assert "caught" not in watched.page.title()
        assert watched.page.locator(".card script, .card b, dialog img[src=x]").count() == 0
        watched.check()
        watched.page.context.close()


def test_an_empty_index_names_the_command_that_fills_it(browser: Any) -> None:
    with serving(app_of(MemoryStore(2), None, [])) as address:
        watched = Watched(browser, address)
        watched.open()
        playwright.expect(watched.page.locator("#empty")).to_contain_text("mmedge index add")
        watched.check()
        watched.page.context.close()


def test_further_items_are_shown(browser: Any) -> None:
    store = MemoryStore(2)
    store.upsert([Item(f"item {n}", unit(1, n)) for n in range(30)])
    with serving(app_of(store, None, [])) as address:
        watched = Watched(browser, address)
        watched.open()
        playwright.expect(watched.titles).to_have_count(24)
        watched.page.get_by_role("button", name="Show more").click()
        playwright.expect(watched.page.locator(".card")).to_have_count(30)
        playwright.expect(watched.page.locator(".card .open").nth(24)).to_be_focused()
        playwright.expect(watched.page.locator("#more")).to_have_count(0)
        watched.page.context.close()


def test_a_server_that_is_gone_is_named(watched: Watched) -> None:
    watched.open()
    watched.page.context.set_offline(True)
    watched.page.fill("#text", "red")
    watched.page.press("#text", "Enter")
    watched.problem("The server cannot be reached", "mmedge serve")
    watched.page.context.set_offline(False)
    watched.page.press("#text", "Enter")
    watched.status("3 results")
