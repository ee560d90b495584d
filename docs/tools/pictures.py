"""Take the pictures of the demo that these pages show, in a headless Chromium, with the shipped fusers.

    c2c pull smollm2-135m qwen2.5-coder-1.5b qwen2.5-coder-0.5b
    python docs/tools/pictures.py
    python docs/tools/pictures.py --only private

Needs ``.[demo]``, playwright and a Chromium (its own, one of the system, or the one that ``C2C_CHROMIUM`` names). The
page is driven as a visitor would: a question, four answers, a document for the sharer alone, the wrong-message switch.
It stops with an error where the switch does not change the answer.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

from c2c.demo import DemoConfig
from c2c.demo.panes import SYSTEMS
from c2c.demo.server import launch

IMAGES = Path(__file__).parents[1] / "images"
FUSER = IMAGES.parents[1] / "zoo" / "smollm2-135m_from_qwen2.5-coder-1.5b"
MINUTE = 60_000  # milliseconds
DESKTOP, PHONE = (1280, 900), (390, 844)
_DONE = "document.querySelectorAll('[id^={tab}-] .c2c-pane[data-state=done]').length === 4"


def main() -> None:
    """Take the chosen pictures."""
    arguments = _arguments()
    pictures: dict[str, Callable[[Browser, str], None]] = {"desktop": desktop, "phone": phone, "private": private}
    demo = launch(DemoConfig(fuser=[str(FUSER)], port=0, dtype=arguments.dtype))
    with sync_playwright() as driver:
        chromium = os.environ.get("C2C_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name in arguments.only or pictures:
            pictures[name](browser, demo.local_url)
        browser.close()
    demo.close(verbose=False)


def desktop(browser: Browser, address: str) -> None:
    """Four panes side by side."""
    page = _open(browser, address, DESKTOP)
    _ask(page, "ask")
    _keep(page, "desktop")


def phone(browser: Browser, address: str) -> None:
    """The same on a narrow screen, where the sharer is then given another question."""
    page = _open(browser, address, PHONE)
    _ask(page, "ask")
    _give_wrong_message(page, "ask")
    page.locator("#ask-c2c").scroll_into_view_if_needed()
    _keep(page, "phone", whole=False)


def private(browser: Browser, address: str) -> None:
    """A document is uploaded for the sharer alone, then another one is given to it."""
    page = _open(browser, address, DESKTOP)
    page.get_by_role("tab", name="Private context").click()
    note = {"name": "note.txt", "mimeType": "text/plain", "buffer": b"The locker number of Anna is 8264."}
    page.set_input_files("#private-upload input[type=file]", files=[note])
    page.wait_for_selector('#private-uploaded [data-status="ready"]')
    page.fill("#private-prompt textarea", "What is the locker number of Anna?")
    _ask(page, "private")
    _give_wrong_message(page, "private")
    _keep(page, "private")


def _open(browser: Browser, address: str, size: tuple[int, int]) -> Page:
    page: Page = browser.new_page(viewport={"width": size[0], "height": size[1]})
    page.set_default_timeout(20 * MINUTE)
    page.goto(address)
    page.wait_for_selector('#ask-status [data-status="ready"]')
    return page


def _ask(page: Page, tab: str) -> None:
    page.click(f"#{tab}-run")
    page.wait_for_function(_DONE.format(tab=tab))
    print({name: page.inner_text(f"#{tab}-{name} .c2c-answer") for name in SYSTEMS})


def _give_wrong_message(page: Page, tab: str) -> None:
    before = page.inner_text(f"#{tab}-c2c .c2c-answer")
    page.click(f"#{tab}-wrong input")
    page.wait_for_selector(f"#{tab}-c2c .c2c-pane[data-state=done] .c2c-wrong-message")
    after = page.inner_text(f"#{tab}-c2c .c2c-answer")
    print({"before": before, "wrong message": after})
    if before == after:
        raise SystemExit(f"the wrong message did not change the answer: {after!r}")


def _keep(page: Page, name: str, whole: bool = True) -> None:
    path = IMAGES / f"demo-{name}.png"
    page.screenshot(path=path.with_suffix(".new.png"), full_page=whole)
    path.with_suffix(".new.png").replace(path)
    page.close()
    print(path)


def _arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=("desktop", "phone", "private"), help="may be repeated")
    parser.add_argument("--dtype", default="bfloat16", help="type of the models' weights")
    return parser.parse_args()


if __name__ == "__main__":
    main()
