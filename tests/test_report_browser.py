"""The page of `inarch report` in a real browser: what a click opens, what a filter leaves, who can read it.

`make browser` installs Chromium; without one, these tests are skipped.
"""

import os
import shutil

import little_records as little
import pytest

from inarch.report import read_entries, write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: `make browser`")

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A page of six runs: what a sweep leaves, an unsound one, one with a hostile name."""
    folder = tmp_path_factory.mktemp("runs")
    swept = {f"lr-{n}": little.run(0.6 + n / 20, learning_rate=10.0**-n, reduction=2.0**n) for n in (1, 2, 3)}
    hostile = little.run(0.5, adapter=little.HOSTILE, data={"name": little.HOSTILE}, environment={"x": little.HOSTILE})
    little.save(folder, **swept, twice=little.seeds(0.9, 0.94), unsound=little.unsound(), hostile=hostile)
    return write_report(read_entries([folder]), folder / "report.html").as_uri()


@pytest.fixture
def open_page(chromium, address):
    """Open the page in some window; whatever the console says fails the test."""
    said, contexts = [], []

    def opened(viewport=DESKTOP, **options):
        context = chromium.new_context(viewport=viewport, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if request.url.startswith("http") else None)
        page.goto(address)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert said == []


def shown(page, selector):
    return [one.inner_text() for one in page.locator(selector).all() if one.is_visible()]


def test_a_click_opens_a_site_and_closes_the_other(open_page):
    page = open_page()
    first = page.locator(".graft[open]").first
    sites = first.locator(".site")
    sites.nth(1).locator("summary").click()
    assert little.KEPT in sites.nth(1).locator("dl").inner_text()
    sites.nth(3).locator("summary").click()
    assert sites.nth(3).locator("dl").is_visible()
    assert not sites.nth(1).locator("dl").is_visible()


def test_a_site_shows_its_formula_when_it_is_pointed_at_or_reached_by_key(open_page):
    page = open_page()
    summary = page.locator(".site.kept summary").first
    tip = summary.locator(".tip")
    assert not tip.is_visible()
    summary.hover()
    assert little.KEPT in tip.inner_text() and tip.is_visible()
    page.mouse.move(0, 0)
    page.locator(".graft > summary").first.focus()
    page.keyboard.press("Tab")  # the attention of the first layer
    page.keyboard.press("Tab")
    assert tip.is_visible()
    page.keyboard.press("Enter")
    assert page.locator(".site.kept dl").first.is_visible()


def test_a_filter_leaves_the_runs_that_it_names(open_page):
    """In the table, in the charts, and in the rest of the page."""
    page = open_page()
    names = "#table tbody th"
    assert len(shown(page, names)) == 6
    page.get_by_label("Verdict").select_option("unsound")
    assert shown(page, names) == ["unsound"]
    assert page.get_by_role("status").inner_text() == "1 of 6 runs"
    number = page.locator("#table tbody tr:visible").get_attribute("data-run")
    left = page.eval_on_selector_all(
        ".chart [data-run]:not(.off)", "marks => [...new Set(marks.map(m => m.dataset.run))]"
    )
    assert left == [number]
    assert len(shown(page, ".finding")) == len(shown(page, ".again .more")) == len(shown(page, ".graft")) == 1
    page.get_by_label("Verdict").select_option("")
    page.get_by_label("Learning rate", exact=True).select_option("0.01")
    assert shown(page, names) == ["lr-2"]
    page.get_by_label("Learning rate", exact=True).select_option("")
    page.get_by_label("Search").fill("LR-")
    assert shown(page, names) == ["lr-1", "lr-2", "lr-3"]
    page.get_by_label("Search").fill("")
    assert len(shown(page, names)) == 6
    assert page.get_by_role("status").inner_text() == ""


def test_the_table_is_sorted_by_its_headings(open_page):
    page = open_page()
    heading = page.locator("#table thead th", has_text="accuracy")
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    assert shown(page, "#table tbody th")[0].startswith("unsound")
    heading.get_by_role("button").press("Enter")
    assert heading.get_attribute("aria-sort") == "descending"
    assert shown(page, "#table tbody th")[0].startswith("twice")


def test_a_mark_of_a_chart_says_what_it_is(open_page):
    page = open_page()
    mark = page.locator('.drawn [data-tip*="trained parameters"]').last
    mark.hover()
    assert page.locator("#pointer").inner_text() == mark.get_attribute("data-tip")
    page.keyboard.press("Escape")
    assert not page.locator("#pointer").is_visible()


@pytest.mark.parametrize(("scheme", "viewport"), [("light", PHONE), ("dark", DESKTOP)], ids=["light", "dark"])
def test_axe_finds_no_violation(open_page, scheme, viewport):
    from axe_playwright_python.sync_playwright import Axe

    page = open_page(viewport, color_scheme=scheme)
    page.locator(".site.kept summary").first.click()
    page.locator(".more summary").first.click()
    found = Axe().run(page).response
    assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found["violations"]] == []
    assert {"color-contrast", "label", "button-name", "html-has-lang"} <= {one["id"] for one in found["passes"]}
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")


def test_nothing_is_wider_than_a_telephone(open_page):
    page = open_page(PHONE)
    for element in page.locator(".more > summary, .graft:not([open]) > summary").all():
        element.click()
    page.locator(".site.kept summary").first.click()
    page.locator(".site.kept summary").nth(1).hover()
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    assert page.locator(".chart.full .drawn").is_visible()
    assert not page.locator(".chart.full .drawn-wide").is_visible()


def test_a_table_that_goes_on_beside_the_screen_says_so(open_page):
    told = """new Promise((told) => requestAnimationFrame(() => requestAnimationFrame(() => told(
        [...document.querySelectorAll(".scroll")].filter((one) => one.checkVisibility()).map((one) => [
            one.scrollWidth > one.clientWidth + 1, getComputedStyle(one, "::before").content.includes("Scroll")])))))"""
    found = [tuple(one) for viewport in (PHONE, DESKTOP) for one in open_page(viewport).evaluate(told)]
    assert set(found) == {(True, True), (False, False)}


def test_all_is_readable_without_scripts(open_page):
    page = open_page(java_script_enabled=False)
    text = page.inner_text("main")
    for words in (
        "The best of 6 runs is twice",
        "92.0 % ± 2.8 %",
        little.LOST,
        "Set residual_before_ln=False",
        "unsound",
    ):
        assert words in text
    assert page.locator(".chart svg").first.is_visible()
    assert not page.locator("#filters").is_visible()
    page.locator(".site.kept summary").first.click()
    assert page.locator(".site.kept dl").first.is_visible()


def test_a_hostile_name_stays_a_text(open_page):
    page = open_page()
    assert page.title().startswith("6 runs on")
    assert "{{ 1 + 1 }}" in page.inner_text("#table")
    assert page.locator("script").count() == 1
    assert page.locator("main b").count() == 0


def test_it_is_printed_in_light_without_what_only_a_screen_can_do(open_page):
    page = open_page(color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert not page.locator("nav").is_visible()
    assert not page.locator("#filters").is_visible()
    assert page.locator("#table").is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(28, 36, 32)"
