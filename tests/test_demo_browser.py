"""The demo in a real browser: four panes, the wrong-message switch, the blend by keyboard, stop, a document, pictures.

Needs playwright and a Chromium, its own or one of the system (``C2C_CHROMIUM`` names another).
"""

from __future__ import annotations

import pytest

from c2c.demo import DemoConfig
from c2c.demo.server import launch
from demo_rig import fuser_folders

pytest.importorskip("gradio")
pytest.importorskip("playwright.sync_api")
pytestmark = [pytest.mark.browser, pytest.mark.slow]
_DONE = "document.querySelectorAll('[id^={tab}-] .c2c-pane[data-state=done]').length === 4"
_WAIT = 60_000  # milliseconds


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folders = fuser_folders(tmp_path_factory.mktemp)
    addresses = []
    page = launch(DemoConfig(fuser=list(folders.values()), port=0, max_new_tokens=6), on_start=addresses.append)
    yield addresses[0]
    page.close(verbose=False)


@pytest.fixture(params=[(1280, 900), (390, 844)], ids=["desktop", "phone"])
def page(browser, address, request):
    width, height = request.param
    opened = browser.new_page(viewport={"width": width, "height": height})
    opened.set_default_timeout(_WAIT)
    hosts, broken = set(), []
    opened.on("request", lambda sent: hosts.add(sent.url.split("/")[2]))
    opened.on("pageerror", lambda error: broken.append(str(error)))
    opened.goto(address)
    opened.wait_for_selector('#ask-status [data-status="ready"]')
    yield opened
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    assert hosts == {address.split("/")[2]}  # nothing is fetched from elsewhere
    assert broken == []
    opened.close()


def answer(page, tab="ask"):
    return page.inner_text(f"#{tab}-c2c .c2c-answer")


def test_ask_then_give_the_sharer_another_question_then_blend_by_keyboard(page):
    page.fill("#ask-prompt textarea", "Name three uses of copper.")
    page.focus("#ask-run")
    page.keyboard.press("Enter")
    page.wait_for_function(_DONE.format(tab="ask"))
    assert page.inner_text("#ask-text .c2c-message blockquote") != ""
    first, receiver = answer(page), page.inner_text("#ask-receiver .c2c-answer")

    page.focus("#ask-wrong input")
    page.keyboard.press("Space")
    page.wait_for_selector("#ask-c2c .c2c-pane[data-state=done] .c2c-wrong-message")
    assert answer(page) != first
    assert page.inner_text("#ask-c2c .c2c-previous") != ""
    assert page.inner_text("#ask-receiver .c2c-answer") == receiver

    page.keyboard.press("Space")
    page.wait_for_function("!document.querySelector('#ask-c2c .c2c-wrong-message')")
    page.wait_for_selector("#ask-c2c .c2c-pane[data-state=done]")
    assert answer(page) == first

    page.focus("#ask-blend input[type=range]")
    page.keyboard.press("Home")
    page.wait_for_function("text => document.querySelector('#ask-c2c .c2c-answer').innerText === text", arg=receiver)


def test_a_run_is_stopped_and_another_visitor_is_next(page, browser, address):
    other = browser.new_page()
    other.goto(address)
    page.get_by_role("button", name="Options").first.click()
    page.get_by_label("Tokens per answer, at most").first.fill("2000")
    page.click("#ask-run")
    page.wait_for_selector("#ask-receiver .c2c-pane[data-state=running]")
    other.click("#ask-run")
    page.click("#ask-stop")
    page.wait_for_selector("#ask-text .c2c-pane[data-state=stopped]")
    assert page.locator("[id^=ask-] .c2c-pane[data-state=running]").count() == 0
    other.wait_for_function(_DONE.format(tab="ask"))
    other.close()


def test_a_document_is_uploaded_and_only_the_sharer_reads_it(page):
    page.get_by_role("tab", name="Private context").click()
    note = {"name": "note.txt", "mimeType": "text/plain", "buffer": b"The cat is called Oskar."}
    page.set_input_files("#private-upload input[type=file]", files=[note])
    page.wait_for_selector('#private-uploaded [data-status="ready"]')
    assert page.input_value("#private-document textarea") == "The cat is called Oskar."
    page.click("#private-run")
    page.wait_for_function(_DONE.format(tab="private"))
    first = answer(page, "private")
    page.click("#private-wrong input")
    page.wait_for_selector("#private-c2c .c2c-pane[data-state=done] .c2c-wrong-message")
    assert answer(page, "private") != first


def test_pictures_are_drawn_and_errors_are_shown(page):
    page.get_by_role("tab", name="Pictures").click()
    page.click("#pictures-run")
    page.wait_for_selector("#pictures-shown svg")
    page.get_by_role("tab", name="Ask both").click()
    page.fill("#ask-prompt textarea", " ")
    page.click("#ask-run")
    page.wait_for_selector("#ask-c2c .c2c-error")
    assert "There is no prompt" in page.inner_text("#ask-c2c .c2c-error")
