"""The report's page in a browser, on a desktop and on a phone, in light and in dark.

Needs playwright and a Chromium, its own or one of the system (``C2C_CHROMIUM`` names another).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from c2c.report import load_evaluations, make_files

pytest.importorskip("playwright.sync_api")
pytestmark = [pytest.mark.browser, pytest.mark.slow]
RESULTS = Path(__file__).parent.parent / "results"
LOSS = {"light": "rgb(179, 38, 30)", "dark": "rgb(255, 138, 117)"}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(make_files(load_evaluations([RESULTS]), "Results", html=path)[path])
    return path


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (360, "dark")])
def test_nothing_is_cut_off_and_losses_are_coloured(browser, file, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.goto(file.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(it => { it.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    images = page.locator("figure img").evaluate_all("all => all.map(it => it.naturalWidth > 0)")
    assert images == [True] * 4
    lost = page.locator("td.loss").first
    assert lost.evaluate("it => getComputedStyle(it).color") == LOSS[scheme]
    page.close()
