"""The report in a real browser: nothing is cut off on a phone, losses and the systems' names are in sight.

Needs matplotlib, playwright and a Chromium, its own or one of the system (``C2C_CHROMIUM`` names another).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from c2c.reporting import draw, group, read_results, to_html
from c2c.reporting.canvas import COLOURS

pytest.importorskip("matplotlib")
pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.browser
RESULTS = Path(__file__).parent.parent / "results"
# what reaches over the page's edge, or whose text is wider than itself
_CUT = """width => [...document.querySelectorAll('td, th, h1, h2, caption span, .verdict li, .glance li, figure')]
    .filter(it => it.checkVisibility() && !(width < 600 && it.closest('thead')))
    .filter(it => it.getBoundingClientRect().right > width || it.scrollWidth > it.clientWidth + 1 && it.clientWidth)
    .map(it => it.textContent.trim().slice(0, 60))"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    sections = group(read_results([RESULTS]))
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(to_html(sections, "Results", draw(sections)))
    return path


@pytest.mark.parametrize("width", [1280, 390, 360])
def test_nothing_is_cut_off(browser, file, width):
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(file.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(it => { it.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(_CUT, width) == []
    page.close()


def test_a_phone_names_every_number(browser, file):
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(file.as_uri())
    first = page.locator(".overview tr:has(td)").first
    names = first.locator("td:visible").evaluate_all(
        "cells => cells.map(it => getComputedStyle(it, '::before').content)"
    )
    assert [name.strip('"') for name in names[:5]] == ["n", "receiver", "sharer", "matched", "deranged"]
    assert first.get_by_role("cell").first.is_visible()  # still a table for those who hear it
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_losses_are_in_the_colour_of_losses(browser, file, scheme):
    page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
    page.goto(file.as_uri())
    lost = page.locator(".overview td.lost")
    assert lost.count() > 0
    wanted = COLOURS["loss"][scheme == "dark"]
    shown = lost.first.evaluate("it => getComputedStyle(it).color")
    assert shown == "rgb({}, {}, {})".format(*bytes.fromhex(wanted[1:]))
    page.close()
