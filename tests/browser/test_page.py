"""The page in a real Chromium: send, stream, trip, rewind, compare, keys, a narrow screen.

Needs the extra `browser` and a Chromium; run with `-m browser`. With
SAFE_DECODE_SCREENSHOTS=DIR pictures of what was tested are kept there.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from safe_decode.demo import embedded_pair
from tests.servers import running, settings_of, staged_engine
from tests.staged import write

pytestmark = pytest.mark.browser
CHROMIUM = os.environ.get("SAFE_DECODE_CHROMIUM") or shutil.which("chromium")
PATIENCE_MS = 120_000


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A server of the stage, whose prompts stand in for the demo's."""
    folder = tmp_path_factory.mktemp("stage")
    write(folder)
    settings = settings_of(expose_scores=True, expose_bare=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded_pair, "artefact", lambda name: folder / name)
        with running(staged_engine(), settings) as (url, _):
            yield url


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    assert CHROMIUM, "no Chromium; install it, or name it in SAFE_DECODE_CHROMIUM"
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser, address, request):
    """A page whose console must stay silent, and which asks nobody but its server."""
    size = getattr(request, "param", {"width": 1280, "height": 900})
    context = browser.new_context(viewport=size, reduced_motion="reduce")
    opened, complaints, foreign = context.new_page(), [], []
    opened.set_default_timeout(PATIENCE_MS)
    opened.on("console", lambda m: m.type in ("error", "warning") and complaints.append(m.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda r: r.url.startswith(address) or foreign.append(r.url))
    opened.goto(address)
    opened.wait_for_selector("#scenes button")
    yield opened
    keep(opened, request.node.name)
    context.close()
    assert complaints == [] and foreign == []


def keep(page, name):
    folder = os.environ.get("SAFE_DECODE_SCREENSHOTS")
    if folder:
        page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


def answered(page, n=1):
    page.wait_for_selector("#send:not([hidden])")
    page.wait_for_function(
        "n => [...document.querySelectorAll('.arm')].length >= n && "
        "!document.querySelector('.caret')",
        arg=n,
    )


def test_a_calm_answer_streams_in_colours_and_is_released(page):
    page.click("[data-scene=benign]")
    page.click("#send")
    answered(page)
    assert page.inner_text(".verdict") == "Released"
    assert page.locator(".why").is_hidden()
    assert page.locator(".said .t").count() > 10
    assert page.get_attribute("svg .line", "points").count(",") > 10
    assert "Certificate valid" in page.inner_text("figcaption")
    assert page.inner_text(".asked p")


def test_a_prefilled_answer_trips_rewinds_and_turns(page):
    page.click("[data-scene=prefilled]")
    assert page.input_value("#prefill") != ""
    page.click("#send")
    answered(page)
    assert page.inner_text(".verdict") == "Tripped, rewound, turned"
    assert page.locator(".said .given").count() == 1
    assert page.locator(".said del").count() == page.locator(".said .flag").count() == 1
    gets = page.inner_text(".gets p")
    assert page.inner_text(".said ins").strip() in gets
    assert page.inner_text(".said del").strip() not in gets
    assert float(page.get_attribute("svg .trip", "x1")) > 0
    assert "The reader gets" in page.inner_text("#status")
    # What a stranger reads first.
    assert page.inner_text(".why") == (
        "The guard read harm in this answer and stepped in. 2 tokens were taken back "
        "before any reader saw them, and the model was made to think again."
    )


def test_the_bare_model_answers_beside_it_on_request(page):
    page.click("[data-scene=prefilled]")
    page.click("#send")
    answered(page)
    page.click("button.compare")
    answered(page, n=2)
    bare = page.locator(".arm.bare")
    assert bare.locator("h3").inner_text().lower() == "bare model"
    assert bare.locator(".flag").inner_text() == "would trip"
    assert "Unguarded" in bare.locator(".verdict").inner_text()


def test_the_keyboard_alone_is_enough(page):
    page.keyboard.type("I have the mirror here. Help me polish it.")
    page.keyboard.press("Enter")
    answered(page)
    assert page.inner_text(".verdict") == "Released"
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "prefill"


def test_every_control_has_a_name_and_every_picture_words(page):
    page.click("[data-scene=benign]")
    page.click("#send")
    answered(page)
    nameless = page.evaluate(
        "[...document.querySelectorAll('button, input, textarea')].filter(e => !e.hidden && "
        "!(e.ariaLabel || e.labels?.length || e.textContent.trim())).map(e => e.id)"
    )
    assert nameless == []
    assert "Released" in page.get_attribute(".arm svg", "aria-label")


@pytest.mark.parametrize("page", [{"width": 360, "height": 740}], indirect=True)
def test_a_narrow_screen_has_no_sideways_scroll(page):
    page.click("[data-scene=framed]")
    page.click("#send")
    answered(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    box = page.locator("#send").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 360


def test_dark_and_light_can_be_switched_and_differ(page):
    def ground():
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    before = ground()
    page.click("#theme")
    assert ground() != before
    page.reload()
    assert ground() != before


def test_what_a_user_types_is_text_and_never_markup(page):
    page.fill("#prompt", "<img src=x onerror=alert(1)><b>bold</b>")
    page.click("#send")
    answered(page)
    assert page.locator(".asked img, .asked b").count() == 0


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing(page, theme):
    """Deque's axe-core: contrast, names, roles, in both themes, with an answer that tripped."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    if page.evaluate("getComputedStyle(document.documentElement).colorScheme") != theme:
        page.evaluate("theme => { document.documentElement.dataset.theme = theme }", theme)
    assert axe.run(page).response["violations"] == [], "the empty page"
    page.click("[data-scene=prefilled]")
    page.check("#compare")
    page.click("#send")
    answered(page, n=2)
    found = axe.run(page).response["violations"]
    told = [(one["id"], one["help"], [n["html"] for n in one["nodes"]][:5]) for one in found]
    assert told == []


@pytest.mark.parametrize("page", [{"width": 375, "height": 780}], indirect=True)
def test_on_a_narrow_screen_the_answer_stays_in_view(page):
    page.click("[data-scene=prefilled]")
    page.click("#send")
    answered(page)
    box = page.locator(".why").bounding_box()
    assert box["y"] >= 0 and box["y"] + box["height"] <= 780
