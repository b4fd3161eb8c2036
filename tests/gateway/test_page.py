"""The web page in headless Chromium: drops an image, checks score, threshold and overlay; lists runs."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By

from raydetect import create_model
from raydetect.gateway.http.tokens import Tokens, read_tokens
from tests.builders.browser import chromium
from tests.builders.images import defect_image, encode, normal_image
from tests.builders.server import fit_small, running, serve_spec

SECRET = "a-secret-of-the-page-0001"
PATIENCE = 30


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    """Debian's Chromium."""
    with chromium() as driver:
        yield driver


def until(condition: Any) -> Any:
    """Waits for a condition and returns its first true value."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError("timed out")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact and two pictures."""
    folder = tmp_path_factory.mktemp("page")
    fit_small(folder, "one")
    # Which images are held out follows from their paths, so the normal one is chosen by its p-value.
    normal = np.stack([normal_image(70_000 + i) for i in range(5)])
    p_values = create_model.load(folder / "models" / "one").p_values(normal)
    (folder / "normal.png").write_bytes(encode(normal[int(p_values.argmax())]))
    (folder / "odd.png").write_bytes(encode(defect_image(3, "blob")[0]))
    (folder / "text.png").write_bytes(b"no image")
    return folder


def test_an_image_shows_its_score_and_overlay(browser: webdriver.Chrome, data_dir: Path) -> None:
    with running(serve_spec(data_dir)) as url:
        body = {
            "detector": "bottle",
            "source": {"uri": f"{data_dir}/open/mixed"},
            "sink": {"uri": f"{data_dir}/results/page"},
        }
        assert httpx.post(f"{url}/v1/archives", json=body).status_code == 202
        browser.get(url)
        until(lambda: "patchcore" in browser.find_element(By.ID, "facts").text)
        names = [str(data_dir / name) for name in ("normal.png", "odd.png", "text.png")]
        browser.find_element(By.ID, "files").send_keys("\n".join(names))
        cards = until(lambda: len(found := browser.find_elements(By.CLASS_NAME, "card")) == 3 and found)
        text, odd, normal = cards
        assert "not_an_image" in text.text and "Score" not in text.text
        assert "Flagged" in odd.text and "flagged" in odd.get_attribute("class")
        assert "Not flagged" in normal.text
        for card in (odd, normal):
            picture = card.find_element(By.TAG_NAME, "img")
            assert picture.get_attribute("src").startswith("data:image/png;base64,")
            assert browser.execute_script("return arguments[0].naturalWidth", picture) == 96
        line = until(lambda: browser.find_elements(By.CSS_SELECTOR, "#runs tr") and browser.find_element(By.ID, "runs"))
        until(lambda: "finished" in line.text and "3 of 3 shards" in line.text)
        line.find_element(By.TAG_NAME, "a").click()
        report = browser.find_element(By.ID, "report")
        until(lambda: "12" in report.text and "finished" in report.text)
        assert f"Report of file://{data_dir}/results/page" in report.text and "none" in report.text
        severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        assert len(severe) == 1 and "422" in severe[0]["message"], severe  # the response for text.png
        first = browser.current_window_handle
        browser.find_element(By.ID, "whole").click()
        other = until(lambda: [handle for handle in browser.window_handles if handle != first])[0]
        browser.switch_to.window(other)
        until(lambda: browser.title == "Report of results/page")
        pictures = until(lambda: browser.find_elements(By.CSS_SELECTOR, "figure img, .card img"))
        assert browser.execute_script("return arguments[0].naturalWidth", pictures[0]) == 96
        assert not [entry for entry in browser.get_log("browser") if "Content Security" in entry["message"]]
        browser.close()
        browser.switch_to.window(first)
        widest = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        browser.set_window_size(500, 900)
        assert browser.execute_script(widest) == 0


def test_the_page_asks_for_a_token_when_one_is_required(
    browser: webdriver.Chrome, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYDETECT_TOKENS", f"[{{name: page, token: {SECRET}, scopes: [score]}}]")
    spec = serve_spec(data_dir)
    tokens: Tokens = read_tokens(spec)
    with running(spec, tokens) as url:
        browser.get(url)
        field = until(lambda: (f := browser.find_element(By.ID, "token")).is_displayed() and f)
        assert "token is required" in browser.find_element(By.ID, "problem").text
        field.send_keys(SECRET + "\n")
        browser.find_element(By.TAG_NAME, "h1").click()
        until(lambda: "patchcore" in browser.find_element(By.ID, "facts").text)
