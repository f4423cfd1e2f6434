"""The page at / in a real browser, used with the keyboard."""

import json
import shutil
import time

from glass_mlx.server import generation
from raw_http import wait_until

import pytest

playwright = pytest.importorskip("playwright.sync_api")
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium"),
]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, server):
    """Return a function that opens the page, which may not complain or load anything else."""
    complaints, pages = [], []

    def open_page(url=server.url, **options):
        page = browser.new_page(**options)
        pages.append(page)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "console", lambda line: complaints.append(line.text) if line.type == "error" else None
        )
        page.on(
            "request",
            lambda request: (
                None if request.url.startswith((url, "data:")) else complaints.append(request.url)
            ),
        )
        page.goto(url)
        page.wait_for_selector("#model:has-text('tiny')")
        return page

    yield open_page
    for page in pages:
        page.close()
    assert [c for c in complaints if "status of 500" not in c] == []


def ask(page, text):
    """Type a message, send it with Enter and return the request's body and the answer's text."""
    with page.expect_request("**/v1/chat/completions") as request:
        page.keyboard.type(text)
        page.keyboard.press("Enter")
    page.wait_for_selector("#send:visible")
    return json.loads(request.value.post_data), page.inner_text(".assistant:last-child .text")


def move_budget(page, steps):
    page.focus("#budget")
    for _ in range(steps):
        page.keyboard.press("ArrowRight")
    page.focus("#prompt")


def picture(page, canvas):
    return page.eval_on_selector(canvas, "canvas => canvas.toDataURL()")


def test_a_message_is_answered_and_the_panel_shows_how(open_page):
    page = open_page()
    empty = picture(page, "#layers")
    move_budget(page, 15)
    body, answer = ask(page, "丁七丄")
    assert body["messages"] == [{"role": "user", "content": "丁七丄"}]
    assert body["glass"] == {"max_kl": pytest.approx(0.05, rel=0.01), "trace": True}
    assert len(answer) > 100
    assert "512 tokens" in page.inner_text(".assistant .note")
    assert float(page.inner_text("#now")) > 0
    assert float(page.inner_text("#dense-rate")) > 0
    assert page.inner_text("#bytes") == "0.6 MB"
    assert page.inner_text("#expected") == "≤ 0.050 nats"
    assert page.inner_text("#drafts") == "–"  # this model predicts too badly for drafts to pay
    assert page.get_attribute("#layers", "aria-label").startswith("4 layers keep 75 % of their ")
    assert "renewed at token" in page.inner_text("#selections")
    assert picture(page, "#layers") != empty
    assert page.inner_text("#announce") == f"The model answered: {answer}"
    body, _ = ask(page, "丂")
    assert [message["role"] for message in body["messages"]] == ["user", "assistant", "user"]
    assert "prompt tokens came from the cache" in page.inner_text(".assistant:last-child .note")


def test_the_first_text_is_the_dense_models_own(open_page):
    page = open_page()
    assert page.inner_text("#budget-value") == "0 nats per token"
    sliced = ask(page, "丁七丄")
    assert sliced[0]["glass"] == {"max_kl": 0, "trace": True}
    assert page.inner_text("#expected") == "none"
    page.click("#fresh")
    page.wait_for_selector("#model:has-text('tiny')")
    page.check("#dense")
    page.focus("#prompt")
    assert ask(page, "丁七丄")[1] == sliced[1]


def test_the_strip_changes_at_each_renewal(open_page):
    page = open_page()
    page.evaluate("""() => {
        window.seen = [];
        const show = showKept;
        showKept = (trace) => { show(trace); window.seen.push($("layers").toDataURL()); };
    }""")
    move_budget(page, 36)
    ask(page, "丁七丄")
    seen = page.evaluate("() => window.seen")
    assert len(seen) > 3
    assert len({*seen}) > 2


def test_the_budget_is_set_with_the_keyboard(open_page):
    page = open_page()
    page.focus("#budget")
    page.keyboard.press("End")
    assert page.inner_text("#budget-value") == "1.0 nats per token"
    assert page.get_attribute("#budget", "aria-valuetext") == "1.0 nats per token"
    page.keyboard.press("Home")
    assert page.inner_text("#budget-value") == "0 nats per token"
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#budget-value") == "0.010 nats per token"
    page.focus("#prompt")
    assert ask(page, "丁")[0]["glass"] == {"max_kl": pytest.approx(0.01), "trace": True}
    page.focus("#dense")
    page.keyboard.press("Space")
    page.focus("#prompt")
    assert ask(page, "丁")[0]["glass"] == {"dense": True, "trace": True}
    assert "in the last answer of the dense model" in page.inner_text("#computed")


def test_escape_stops_the_answer(open_page, monkeypatch):
    numbers, original = [], generation.stream_generate

    def slow(*args, **options):
        stream = original(*args, **options)
        try:
            for response in stream:
                numbers.append(response.generation_tokens)
                time.sleep(0.02)
                yield response
        finally:
            stream.close()

    monkeypatch.setattr(generation, "stream_generate", slow)
    page = open_page()
    page.keyboard.type("丁七")
    page.keyboard.press("Enter")
    page.wait_for_selector("#stop:visible")
    assert wait_until(lambda: len(numbers) > 3)
    page.keyboard.press("Escape")
    page.wait_for_selector("#send:visible")
    assert page.inner_text(".assistant .note") == "Stopped."
    count = len(numbers)
    page.wait_for_timeout(300)
    assert len(numbers) < count + 10


def test_everything_has_a_name_and_can_be_reached(open_page):
    page = open_page()
    snapshot = page.locator("body").aria_snapshot()
    for part in (
        'slider "KL budget"',
        'checkbox "Dense model"',
        'textbox "Message"',
        'button "Send"',
        'button "New chat"',
        'button "Dark theme"',
        'img "No neurons are selected yet"',
        'log "Conversation"',
        'complementary "What the engine does"',
    ):
        assert part in snapshot, snapshot
    reached = []
    for _ in range(16):  # around the page, and through the browser's own controls
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("() => document.activeElement.id || document.activeElement.textContent")
        )
    assert {
        "Skip to the message box",
        "theme",
        "fresh",
        "log",
        "prompt",
        "send",
        "dense",
        "budget",
    } <= {*reached}


def test_shift_and_enter_begin_a_new_line(open_page):
    page = open_page()
    page.keyboard.type("丁")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("七")
    assert page.input_value("#prompt") == "丁\n七"


def test_text_is_shown_as_text(open_page):
    page = open_page()
    text = "<img src=x onerror=alert(1)>"
    ask(page, text)
    assert page.inner_text(".user .text") == text
    assert page.locator("#log img").count() == 0


def test_there_are_a_light_and_a_dark_theme(open_page):
    def background(page):
        return page.evaluate("() => getComputedStyle(document.body).backgroundColor")

    light, dark = open_page(color_scheme="light"), open_page(color_scheme="dark")
    colors = background(light), background(dark)
    assert colors == ("rgb(243, 245, 247)", "rgb(14, 18, 22)")
    for page, other in ((light, colors[1]), (dark, colors[0])):
        page.focus("#theme")
        page.keyboard.press("Enter")
        assert background(page) == other


def test_the_page_fits_a_small_screen(open_page):
    page = open_page(viewport={"width": 360, "height": 640})
    assert page.evaluate("() => document.documentElement.scrollWidth") == 360


def test_an_error_is_shown(open_page, monkeypatch):
    page = open_page()
    monkeypatch.setattr(generation, "stream_generate", None)
    page.keyboard.type("丁")
    page.keyboard.press("Enter")
    page.wait_for_selector(".note.error")
    text = "This did not work: the server failed on this request; its log says why"
    assert page.inner_text(".assistant .note") == text
    assert page.inner_text("#announce") == text


def test_fixed_shares_are_shown_instead_of_the_slider(run_server, folder, open_page):
    with run_server(folder, "--density", 0.5) as server:
        page = open_page(server.url)
        assert not page.is_visible("#budget")
        assert "a density of 0.5" in page.inner_text("#fixed")
        assert ask(page, "丁")[0]["glass"] == {"trace": True}
    with run_server(folder, "--dense") as server:
        page = open_page(server.url)
        assert page.is_checked("#dense")
        assert ask(page, "丁")[0]["glass"] == {"trace": True}
