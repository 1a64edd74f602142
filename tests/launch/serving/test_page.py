"""The web page in a real browser, at the widths of a desk and of a phone."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.launch.serving.served import Client, serving
from tests.marks import CHROMIUM
from training.trained import M6
from training.writing import Style

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page

pytestmark = CHROMIUM

DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
TABS = ("caption", "ask", "write", "draw", "edit", "search")
EVIL = "<img src=x onerror=document.title='taken'><script>document.title='taken'</script>"
QUIET = (
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=[*QUIET])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def client(m: M6, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with serving(m, tmp_path_factory.mktemp("store")) as client:
        yield client


@pytest.fixture(scope="module")
def folder(pictures: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, one that is none, and one whose name means no good."""
    folder = tmp_path_factory.mktemp("folder") / "shop"
    folder.mkdir()
    for number, picture in enumerate(pictures[:9]):
        (folder / f"{number}.png").write_bytes(picture)
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / f"{EVIL[: EVIL.index('/')]}.png").write_bytes(pictures[10])
    return folder


class Visit:
    """A page that is open, with all that it complains of."""

    def __init__(self, browser: Browser, port: int, **options: Any):
        self.address = f"http://127.0.0.1:{port}/"
        self.context = browser.new_context(**({"viewport": DESK, "locale": "en-US"} | options))
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.complaints: list[str] = []
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def _note(self, line: ConsoleMessage) -> None:
        """A request that is refused is no fault of the page."""
        if line.type == "error" and not line.text.startswith("Failed to load resource"):
            self.complaints.append(line.text)

    def open(self, tab: str = "caption", ready: bool = True) -> Page:
        self.page.goto(f"{self.address}#{tab}")
        self.page.reload()
        if ready:
            self.page.wait_for_selector("html[data-ready]")
        return self.page

    def ask(self, tab: str) -> None:
        """Press the button, and wait for what comes of it."""
        self.page.click(f"#{tab} .act")
        self.page.wait_for_selector(f"#{tab} .act:enabled")

    def choose(self, tab: str, *files: Path) -> None:
        self.page.set_input_files(f"#{tab}-files", [str(file) for file in files])
        self.page.wait_for_selector(f"#{tab} .drop .shown img")

    def sideways(self) -> int:
        """px that are wider than the window."""
        return self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


NAMELESS = """[...document.querySelectorAll('input, textarea, button, a, progress, [tabindex="0"]')].filter((one) =>
    !one.labels?.length && !one.getAttribute('aria-label') && !one.textContent.trim() && !one.hidden).length"""


@pytest.mark.parametrize("options", [{}, {"viewport": PHONE, "locale": "zh-CN", "color_scheme": "dark"}])
def test_every_task_works_at_both_widths(
    browser: Browser, client: Client, m: M6, folder: Path, options: dict[str, Any]
) -> None:
    first = (folder / "0.png").read_bytes()
    with Visit(browser, client.port, **options) as visit:
        page = visit.open()
        for tab in TABS:
            page.click(f'nav [data-tab="{tab}"]')
            assert page.is_visible(f"#{tab}") and page.locator("main section:visible").count() == 1
            assert visit.sideways() <= 0
            if tab == "caption":
                visit.choose(tab, folder / "0.png", folder / "1.png")
                visit.ask(tab)
                assert page.locator("#caption .said").all_inner_texts() == m.captions([first, folder / "1.png"])
            elif tab == "ask":
                visit.choose(tab, folder / "0.png")
                page.fill("#question", "这是什么?")
                page.fill("#choices", "红色的圆，蓝色")
                visit.ask(tab)
                assert page.inner_text("#ask .answer") == m.ask("这是什么?", first, ["红色的圆", "蓝色"])
            elif tab == "write":
                page.click("#write .examples button >> nth=0")
                prompt = page.input_value("#prompt")
                visit.ask(tab)
                assert page.locator("#write .text").text_content() == m.write(prompt, Style())
            elif tab == "draw":
                page.fill("#draw-text", "红")
                page.evaluate("document.querySelector('#draw-tries').value = 4")
                visit.ask(tab)
                assert page.locator("#draw .drawn img").count() == 4
            elif tab == "edit":
                edits(visit, folder)
            else:
                searches(visit, folder)
            assert visit.sideways() <= 0 and page.evaluate(NAMELESS) == 0
        assert not visit.complaints


def edits(visit: Visit, folder: Path) -> None:
    """By dragging, by keys and by numbers."""
    page = visit.page
    visit.choose("edit", folder / "0.png")
    page.wait_for_selector(".region")
    page.locator("#edit .stage").scroll_into_view_if_needed()
    box = page.locator("#edit .stage").bounding_box()
    assert box

    def marked() -> list[int]:
        return [int(page.input_value(f"#{name}")) for name in ("left", "top", "width", "height")]

    page.mouse.move(box["x"] + 4, box["y"] + 6)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()
    dragged = marked()
    assert dragged[0] < 8 and dragged[1] < 8 and 38 < dragged[2] < 50 and 38 < dragged[3] < 50  # of 96 px
    page.press(".region", "ArrowRight")
    page.press(".region", "Shift+ArrowDown")
    moved = marked()
    assert moved[0] > dragged[0] and moved[2] == dragged[2] and moved[3] > dragged[3]
    page.fill("#width", "30")
    assert "width: 31.25%" in page.get_attribute(".region", "style")
    page.fill("#edit-text", "圆")
    page.evaluate("document.querySelector('#edit-tries').value = 2")
    visit.ask("edit")
    assert page.locator("#edit .drawn img").count() == 1
    assert f"region={moved[0]},{moved[1]},30,{moved[3]}" in page.locator("#edit .call pre").text_content()


def searches(visit: Visit, folder: Path) -> None:
    """A folder is uploaded but for what is no picture, and searched."""
    page = visit.page
    page.fill("#collection", "shop-1")
    page.set_input_files("#search-files", str(folder))
    page.wait_for_selector("#search fieldset:disabled")
    page.wait_for_selector("#search fieldset:enabled")
    passed = page.locator("#search .uploading li").all_inner_texts()
    assert len(passed) == 1 and "broken.png" in passed[0]
    assert "10" in page.inner_text("#stand")
    page.fill("#query", "红色")
    visit.ask("search")
    assert page.locator("#search .sheet img").count() == 10
    assert EVIL[: EVIL.index("/")] in "".join(page.locator("#search .sheet .note").all_text_contents())
    page.click("#delete")
    page.click("#delete")
    page.wait_for_selector("#delete", state="hidden")


def test_what_looks_like_markup_is_shown_as_text(browser: Browser, client: Client, folder: Path) -> None:
    with Visit(browser, client.port) as visit:
        page = visit.open("ask")
        visit.choose("ask", next(folder.glob("<img*")))
        page.fill("#question", EVIL)
        visit.ask("ask")
        assert page.inner_text("#ask .card .soft") == EVIL
        assert EVIL[: EVIL.index("/")] in page.locator("#ask .shown figcaption").text_content()
        page.click('nav [data-tab="write"]')
        page.fill("#prompt", EVIL)
        visit.ask("write")
        assert "onerror" in page.locator("#write .call pre").text_content()
        page.route("**/v1/write", lambda route: route.fulfill(
            status=422, json={"error": {"code": EVIL, "message": EVIL}}
        ))  # fmt: skip
        visit.ask("write")
        assert page.inner_text("#write .error small") == EVIL
        assert page.locator("img[src=x]").count() == 0 and page.locator("main script").count() == 0
        assert page.title() == "Write · M6"
        assert not visit.complaints


def test_a_text_comes_as_it_is_written_and_can_be_stopped(
    browser: Browser, m: M6, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extend = m.network.extend
    monkeypatch.setattr(m.network, "extend", lambda *some: (time.sleep(0.08), extend(*some))[1])
    with serving(m, tmp_path) as client, Visit(browser, client.port) as visit:
        page = visit.open("write")
        page.fill("#prompt", "写一首诗。")
        page.click("#write .act")
        text = page.locator("#write .text.going")
        page.wait_for_selector("#write .text.going:not(:empty)")
        early = text.text_content()
        time.sleep(0.5)
        later = text.text_content()
        assert later.startswith(early) and len(later) > len(early) and page.is_disabled("#write .act")
        page.click("#write .actions .quiet")
        page.wait_for_selector("#write .act:enabled")
        assert page.locator("#write .text").text_content().startswith(later)
        assert page.inner_text("#write .under span") == "stopped" and not visit.complaints


def test_pictures_can_be_dropped_and_pasted(browser: Browser, client: Client, pictures: list[bytes]) -> None:
    with Visit(browser, client.port) as visit:
        page = visit.open("caption")
        give = """([bytes, name]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], 'given.png', { type: 'image/png' }));
            const how = { dataTransfer: transfer, clipboardData: transfer, bubbles: true, cancelable: true };
            if (name === 'drop') document.querySelector('#caption .drop').dispatchEvent(new DragEvent(name, how));
            else dispatchEvent(new ClipboardEvent(name, how));
        }"""
        for number, way in enumerate(("drop", "paste"), 1):
            page.evaluate(give, [list(pictures[number]), way])
            page.locator("#caption .shown img").nth(number - 1).wait_for()
        page.click("#caption .shown .remove >> nth=0")
        assert page.locator("#caption .shown img").count() == 1
        visit.ask("caption")
        assert page.locator("#caption .said").count() == 1 and not visit.complaints


def test_a_large_photo_is_sent_small_and_a_gif_as_a_picture(browser: Browser, client: Client, tmp_path: Path) -> None:
    from PIL import Image

    Image.effect_noise((3000, 2000), 60).convert("RGB").save(tmp_path / "photo.jpg", quality=95)
    Image.new("RGB", (40, 40), "red").save(tmp_path / "old.gif")
    with Visit(browser, client.port) as visit:
        page = visit.open("caption")
        visit.choose("caption", tmp_path / "photo.jpg", tmp_path / "old.gif")
        page.locator("#caption .shown img").nth(1).wait_for()
        sizes = (
            "[...document.querySelectorAll('#caption .shown img')].map((one) => [one.naturalWidth, one.naturalHeight])"
        )
        assert page.evaluate(sizes) == [[1024, 683], [40, 40]]
        visit.ask("caption")
        assert page.locator("#caption .said").count() == 2 and not visit.complaints


def test_the_language_is_the_browsers_until_another_is_chosen(browser: Browser, client: Client) -> None:
    with Visit(browser, client.port, locale="zh-CN") as visit:
        page = visit.open("write")
        assert page.inner_text("#write h2") == "写一段文字" and page.get_attribute("html", "lang") == "zh"
        page.click("[data-language=en]")
        assert page.inner_text("#write h2") == "Write a text"
        page = visit.open("write")
        assert page.inner_text("#write h2") == "Write a text" and page.get_attribute("html", "lang") == "en"
        assert page.title() == "Write · M6"
        for language in ("zh", "en"):
            page.click(f"[data-language={language}]")
            words = page.evaluate(
                "[...document.querySelectorAll('[data-t]')].map((one) => [one.dataset.t, one.textContent])"
            )
            assert len(words) > 60 and not [
                key for key, text in words if not text or (text == key and language == "zh")
            ]


def test_what_the_run_cannot_do_is_greyed_with_the_reason(
    browser: Browser, m: M6, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert m.recipe
    monkeypatch.setattr(m, "recipe", m.recipe.model_copy(update={"tasks": {"poem": 1.0}}))
    with serving(m, tmp_path) as client, Visit(browser, client.port) as visit:
        page = visit.open("draw")
        assert page.is_disabled("#draw .act") and page.is_disabled("#draw-text")
        assert "trained without task `draw`" in page.inner_text("#draw .notice")
        assert page.locator("nav .unable").count() == 5 and not visit.complaints


def test_errors_say_what_to_do(browser: Browser, client: Client, folder: Path) -> None:
    with Visit(browser, client.port) as visit:
        page = visit.open("caption")
        visit.ask("caption")
        assert page.inner_text("#caption .error") == "Choose at least one picture first."
        page.click('nav [data-tab="ask"]')
        page.fill("#question", "很长的问题" * 60)
        visit.ask("ask")
        assert "shorten it" in page.inner_text("#ask .error small")
        page.route(
            "**/v1/ask", lambda route: route.fulfill(status=503, json={"error": {"code": "busy", "message": "x"}})
        )
        visit.ask("ask")
        assert "Wait a moment, then try again." in page.inner_text("#ask .error")
        page.route("**/v1/ask", lambda route: route.abort())
        visit.ask("ask")
        assert "The server does not answer" in page.inner_text("#ask .error")


def test_the_token_is_asked_for_and_kept(browser: Browser, m: M6, folder: Path, tmp_path: Path) -> None:
    token = "a-token-of-many-letters"
    with serving(m, tmp_path, token=token) as client, Visit(browser, client.port) as visit:
        page = visit.open("search", ready=False)
        page.wait_for_selector("dialog[open]")
        page.fill("#token-value", "another-token-than-that")
        page.press("#token-value", "Enter")
        page.wait_for_selector("dialog[open] .error:visible")
        page.fill("#token-value", token)
        page.press("#token-value", "Enter")
        page.wait_for_selector("html[data-ready]")
        page.set_input_files("#search .single input", [str(folder / "0.png"), str(folder / "1.png")])
        page.wait_for_selector("#search fieldset:disabled")
        page.wait_for_selector("#search fieldset:enabled")
        page.fill("#query", "红")
        visit.ask("search")
        assert page.locator("#search .sheet img").count() == 2
        assert "$M6_TOKEN" in page.locator("#search .call pre").text_content()
        visit.open("search")
        assert not page.is_visible("dialog")


def test_the_keyboard_reaches_everything_and_shows_where_it_is(browser: Browser, client: Client) -> None:
    with Visit(browser, client.port) as visit:
        page = visit.open("write")
        reached = []
        for _ in range(30):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
        assert reached[0] == "To the content" and {"English", "Caption", "Search", "prompt", "Write"} < {*reached}
        page.focus("#prompt")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        page.fill("#prompt", "写诗。")
        page.focus("#write .act")
        page.keyboard.press("Enter")
        page.wait_for_selector("#write .text:not(.going)")


def test_dark_mode_follows_the_system(browser: Browser, client: Client) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        with Visit(browser, client.port, color_scheme=scheme) as visit:
            visit.open()
            ground = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
            grounds.append(sum(map(int, re.findall(r"\d+", ground))))
    assert grounds[0] > 700 and grounds[1] < 100
