"""The report in headless Chromium: sorted, filtered and leafed through; a million rows; phone, dark and print."""

import base64
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from raydetect.report.build import report_html
from raydetect.report.charts import Plot, Series, legend
from raydetect.report.page import Extra
from raydetect.report.run_charts import Chart
from raydetect.sinks.ledger import Ledger
from raydetect.storage import Storage
from tests.builders.browser import chromium
from tests.builders.results import HOSTILE, make_large_results, make_results, names_of

SECONDS, BYTES = 2.0, 6_000_000


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    """Debian's Chromium."""
    with chromium() as made:
        yield made


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """URL of a report with hostile names among others."""
    folder = tmp_path_factory.mktemp("report")
    names = names_of(30, ("bolt", "plate", "a category of a long name that must wrap somewhere"))
    names[1] += [name.replace("/", "_") for name in HOSTILE]
    ledger = make_results(f"file://{folder}", names)
    (folder / "report.html").write_text(report_html(ledger, 24))
    return f"file://{folder}/report.html"


def shown(browser: webdriver.Chrome) -> list[Any]:
    """Cards that are seen."""
    return [card for card in browser.find_elements(By.CSS_SELECTOR, "#cards .card") if card.is_displayed()]


def choose(browser: webdriver.Chrome, name: str, value: str) -> None:
    """Picks a value of a select."""
    browser.execute_script(
        "const s = document.getElementById(arguments[0]); s.value = arguments[1]; s.dispatchEvent(new Event('change'))",
        name,
        value,
    )


def severe(browser: webdriver.Chrome) -> list[Any]:
    """What the console complains of."""
    return [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_cards_are_sorted_and_filtered(browser: webdriver.Chrome, page: str) -> None:
    browser.get(page)
    cards = shown(browser)
    assert len(cards) == 24
    scores = [float(card.find_element(By.CLASS_NAME, "score").text) for card in cards]
    assert scores == sorted(scores, reverse=True)
    for picture in browser.find_elements(By.CSS_SELECTOR, "#cards img"):
        assert browser.execute_script("return arguments[0].naturalWidth", picture) == 96
    choose(browser, "order", "-place")
    assert [float(card.find_element(By.CLASS_NAME, "score").text) for card in shown(browser)] == scores[::-1]
    choose(browser, "category", "plate")
    assert {card.get_attribute("data-category") for card in shown(browser)} == {"plate"}
    choose(browser, "verdict", "flagged")
    assert shown(browser) and all("not flagged" not in card.text for card in shown(browser))
    assert browser.find_element(By.ID, "count").text == f"{len(shown(browser))} of 24 shown"
    choose(browser, "verdict", "missed")
    assert not shown(browser)
    before = len(browser.find_elements(By.CSS_SELECTOR, "#bad-rows tr"))
    choose(browser, "status", "not_an_image")
    assert before == 3 == len([r for r in browser.find_elements(By.CSS_SELECTOR, "#bad-rows tr") if r.is_displayed()])
    assert not severe(browser)


def test_arrow_keys_leaf_through_the_cards(browser: webdriver.Chrome, page: str) -> None:
    browser.get(page)
    first = shown(browser)[0]
    browser.execute_script("arguments[0].focus()", first)
    first.send_keys(Keys.ARROW_RIGHT)
    assert browser.switch_to.active_element.get_attribute("data-place") == "2"
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert browser.find_element(By.ID, "viewer").is_displayed()
    assert browser.find_element(By.ID, "where").text == "2 of 24"
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert browser.find_element(By.ID, "where").text == "3 of 24"
    for _ in range(5):
        browser.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
    assert browser.find_element(By.ID, "where").text == "1 of 24"
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not browser.find_element(By.ID, "viewer").is_displayed()


def test_no_name_becomes_markup_or_script(browser: webdriver.Chrome, page: str) -> None:
    browser.get(page)
    assert len(browser.find_elements(By.TAG_NAME, "script")) == 1
    assert not browser.find_elements(By.CSS_SELECTOR, "[onerror], [onload], img[src=x]")
    text = browser.find_element(By.TAG_NAME, "main").text
    assert "<script>alert(1)<_script>.png" in text and "{{ 7 * 7 }}.png" in text
    added = "const s = document.createElement('script'); s.textContent = 'window.broken = 1'; document.body.append(s);"
    assert browser.execute_script(added + "return window.broken === undefined")  # the policy lets nothing else run


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_light_and_dark(browser: webdriver.Chrome, page: str, scheme: str, tmp_path: Path) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        browser.get(page)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
        ink, ground = browser.execute_script(
            "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
        )
        assert contrast(ink, ground) >= 7
        assert (luminance(ground) < 0.1) == (scheme == "dark")
        quiet = browser.execute_script("return getComputedStyle(document.querySelector('small')).color")
        assert contrast(quiet, ground) >= 4.5
        browser.save_screenshot(str(tmp_path / "phone.png"))
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_it_prints(browser: webdriver.Chrome, page: str) -> None:
    browser.get(page)
    pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
    assert pdf.startswith(b"%PDF") and 2 <= pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page/") <= 20
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert not browser.find_element(By.ID, "controls").is_displayed()
        assert len(shown(browser)) == 24
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_a_million_rows_open_within_two_seconds(browser: webdriver.Chrome, tmp_path: Path) -> None:
    made = make_large_results(f"file://{tmp_path}", 40, 5, 5000)
    text = report_html(Ledger(made.uri, Storage()))
    path = tmp_path / "report.html"
    path.write_text(text)
    assert "1,000,000" in text and path.stat().st_size < BYTES
    browser.get("about:blank")
    started = time.monotonic()
    browser.get(f"file://{path}")
    seconds = time.monotonic() - started
    assert len(shown(browser)) == 48 == len(browser.find_elements(By.CSS_SELECTOR, "#cards img"))
    assert seconds < SECONDS, f"{seconds:.2f} s"
    print(f"a million rows: {path.stat().st_size:,} bytes, open after {seconds:.2f} s")
    shutil.rmtree(tmp_path)


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)` (WCAG 2.1)."""
    channels = [int(float(word)) / 255 for word in colour.partition("(")[2].rstrip(")").split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_an_audit_s_words_are_text_too(browser: webdriver.Chrome, tmp_path: Path) -> None:
    words = HOSTILE[0]
    drawn = Plot(words, 0, 1, 1).svg([(0.5, words)], words)
    extra = Extra(
        title=f"Audit of {words}",
        verdict=f"Alarm: {words}",
        alarm=True,
        rules=[(f"{words}: images > 1", "alarm", "images = 5"), ("bad_rate > 1", "calm", "bad_rate = 0")],
        measures=[(words, "1", "2", words)],
        charts=[Chart(words, drawn, legend([Series(words, "one", ())]), words)],
        note=words,
    )
    path = tmp_path / "report.html"
    path.write_text(report_html(make_results("memory://audit", names_of(9)), 4, extra))
    severe(browser)  # what earlier pages left
    browser.get(f"file://{path}")
    assert browser.find_element(By.TAG_NAME, "h1").text == f"Audit of {words}"
    assert browser.find_element(By.CSS_SELECTOR, "#audit tr.alarm").text.count("alarm") == 1
    assert browser.find_element(By.CSS_SELECTOR, "#drift svg text").text in ("0", words)
    assert len(browser.find_elements(By.TAG_NAME, "script")) == 1 and not severe(browser)
