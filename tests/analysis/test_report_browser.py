"""The report as a reader sees it, in headless Chromium: no errors, nothing overflows, it sorts, hovers and enlarges."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from analysis import figures
from analysis.report.__main__ import main
from tests.analysis import reported

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: make test-browser installs it")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: make test-browser installs it as root on Debian"),
]
WIDTHS = {"phone": 390, "desktop": 1440}


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    root = reported.everything(tmp_path_factory.mktemp("results"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "names", lambda: ["fig1", "fig9", "fig11"])
        assert main(["--results", str(root)]) == 0
    return (root / "report" / "index.html").as_uri()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield running
        running.close()


@pytest.fixture(params=[(width, theme) for width in WIDTHS for theme in ("light", "dark")], ids="-".join)
def page(request, browser, address):
    """The page at a width and in a theme, its plots drawn; fails on any error that the browser reports."""
    width, theme = request.param
    context = browser.new_context(viewport={"width": WIDTHS[width], "height": 900}, color_scheme=theme, offline=True)
    opened = context.new_page()
    errors = []
    opened.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("requestfailed", lambda request: errors.append(request.url[:80]))
    opened.goto(address)
    opened.wait_for_selector("html[data-plots=ready]", state="attached", timeout=60_000)
    yield opened
    assert errors == []
    context.close()


def test_a_reader_sees_and_uses_all_of_it(page, request, tmp_path):
    """One test for each width and theme: loading the page is what takes time."""
    folder = Path(os.environ.get("CHAI_SCREENSHOTS", tmp_path))
    page.screenshot(path=folder / f"{request.node.callspec.id}.png", full_page=True)
    nothing_overflows(page)
    pictures_are_there(page)
    tables_sort(page)
    figures_enlarge(page)
    plots_hover(page)
    the_theme_changes(page)


def nothing_overflows(page):
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    wide = page.evaluate(
        """[...document.querySelectorAll("main *")].filter((node) => node.getBoundingClientRect().right > innerWidth + 1
        && !node.closest(".scroll, svg, .plot, details:not([open])")).map((node) => node.className || node.tagName)"""
    )
    assert wide == []


def pictures_are_there(page):
    page.evaluate("Promise.all([...document.images].filter((one) => one.src).map((one) => one.decode()))")
    sizes = page.evaluate("[...document.querySelectorAll('main img')].map((one) => one.naturalWidth)")
    assert len(sizes) == 6 and min(sizes) > 500


def tables_sort(page):
    def column():
        return page.eval_on_selector_all(
            "#table-table2 tbody tr", "rows => rows.map((row) => parseFloat(row.cells[1].dataset.sort))"
        )

    head = page.locator("#table-table2 thead th").nth(1)
    head.locator("button").click()
    down = [value for value in column() if value == value]
    assert head.get_attribute("aria-sort") == "descending" and down == sorted(down, reverse=True) and len(down) >= 3
    head.locator("button").click()
    assert [value for value in column() if value == value] == down[::-1]
    assert column()[-1] != column()[-1]  # what isn't run stays last


def figures_enlarge(page):
    page.locator(".enlarge").first.click()
    assert page.locator("#viewer").is_visible()
    assert page.locator("#viewer img").evaluate("(one) => one.decode().then(() => one.naturalWidth)") > 500
    page.keyboard.press("Escape")
    assert not page.locator("#viewer").is_visible()


def plots_hover(page):
    plot = page.locator("[data-spec=paper-tradeoff-0]")
    plot.scroll_into_view_if_needed()
    point = plot.locator(".scatterlayer .points path").nth(1)
    box = point.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    label = plot.locator(".hoverlayer .hovertext")
    label.wait_for(timeout=10_000)
    assert "accuracy" in label.text_content()
    page.locator("[data-plot=paper-tradeoff-1]").click()
    page.wait_for_function("document.querySelector('[data-spec=paper-tradeoff-1] .xtitle')?.textContent.includes('KV')")


def the_theme_changes(page):
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator("#theme").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    page.locator("#theme").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == before
