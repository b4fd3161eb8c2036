"""The web page in headless Chromium: drops an image, checks score, threshold and overlay; lists runs."""

import base64
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from raydetect import create_model
from raydetect.gateway.http.tokens import Tokens, read_tokens
from tests.builders.browser import chromium
from tests.builders.images import defect_image, encode, normal_image
from tests.builders.server import SCORE, files, fit_small, running, serve_spec

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


def lines_of(card: WebElement) -> list[list[WebElement]]:
    """The cells of a card's list of regions."""
    return [line.find_elements(By.TAG_NAME, "td") for line in card.find_elements(By.CSS_SELECTOR, ".where tbody tr")]


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
        assert "Where, in px" in odd.text and not normal.find_elements(By.CSS_SELECTOR, "svg, .where")
        (answer,) = httpx.post(f"{url}{SCORE}", files=files((data_dir / "odd.png").read_bytes())).json()["results"]
        cells = [[cell.text for cell in line] for line in lines_of(odd)]
        assert [[int(text) for text in line[1:5]] for line in cells] == [
            [region[name] for name in ("x", "y", "width", "height")] for region in answer["regions"]
        ]
        assert cells and len(odd.find_elements(By.TAG_NAME, "rect")) == len(cells)
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


def found(left: int, upper: int, width: int, height: int, peak: float) -> dict[str, Any]:
    """A region of an answer."""
    box = {"x": left, "y": upper, "width": width, "height": height}
    return {**box, "area_px": width * height, "peak_score": peak, "peak_x": left, "peak_y": upper}


@pytest.mark.parametrize("width_px", [1280, 375])
@pytest.mark.parametrize(("size", "drawn"), [((4000, 1000), (1024, 256)), ((300, 700), (300, 700))])
def test_boxes_lie_on_the_picture_at_any_size_of_the_card(
    browser: webdriver.Chrome, data_dir: Path, width_px: int, size: tuple[int, int], drawn: tuple[int, int]
) -> None:
    """The box on the screen is where the picture, which keeps its ratio in the square of the card, shows it."""
    (width, height), edge = size, 17
    regions = [
        found(width // 2, height // 4, width // 4, height // 2, 41.25),
        found(0, 0, edge, edge, 0.000123),
        found(width - edge, height - edge, edge, edge, 3),
    ]
    picture = base64.b64encode(encode(np.full((drawn[1], drawn[0], 3), 90, np.uint8))).decode()
    score = {"name": "a-name-without-any-blank-" * 4, "status": "ok", "width": width, "height": height}
    score |= {"image_score": 41.25, "threshold": 2.0, "p_value": 0.01, "flagged": True, "heatmap_png": picture}
    score |= {"regions": regions, "regions_left_out": 1234}
    device = {"width": width_px, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    with running(serve_spec(data_dir)) as url:
        browser.get(url)
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", device)
        try:
            browser.execute_script("at('results').replaceChildren(card(arguments[0], null))", score)
            card = browser.find_element(By.CLASS_NAME, "card")
            until(lambda: browser.execute_script("return document.querySelector('.card img').complete"))
            shown = card.find_element(By.TAG_NAME, "img").rect
            scale = min(shown["width"] / width, shown["height"] / height)
            left = shown["x"] + (shown["width"] - width * scale) / 2
            upper = shown["y"] + (shown["height"] - height * scale) / 2
            places = browser.execute_script(
                "return [...document.querySelectorAll('rect')].map(r => {const b = r.getBoundingClientRect();"
                "return [b.x + scrollX, b.y + scrollY, b.width, b.height]})"
            )
            expected = [
                [left + r["x"] * scale, upper + r["y"] * scale, r["width"] * scale, r["height"] * scale]
                for r in regions
            ]
            np.testing.assert_allclose(places, expected, atol=1)
            cells = lines_of(card)
            assert [cell.text for cell in cells[0]] == [
                *("1", *(str(regions[0][name]) for name in ("x", "y", "width", "height"))),
                "41.25",
            ]
            assert len(cells) == 3 and "Left out: 1,234 with lower peaks." in card.text
            assert len({cell.rect["y"] for cell in cells[0]}) == 1
            table, outer = card.find_element(By.CLASS_NAME, "where").rect, card.rect
            assert table["x"] + table["width"] <= outer["x"] + outer["width"]
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width_px
        finally:
            browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_card_without_regions_has_no_boxes(browser: webdriver.Chrome, data_dir: Path) -> None:
    score = {"name": "a", "status": "ok", "width": 9, "height": 9, "image_score": 1, "threshold": 2.0, "p_value": 0.5}
    with running(serve_spec(data_dir)) as url:
        browser.get(url)
        for regions, left_out in ((None, None), ([], 0), ([], 3)):
            entry = {**score, "flagged": True, "heatmap_png": "", "regions": regions, "regions_left_out": left_out}
            text = browser.execute_script(
                "const c = card(arguments[0], new Blob()); at('results').replaceChildren(c);"
                "return c.querySelectorAll('svg, .where').length + c.innerText",
                entry,
            )
            assert text.startswith("0") and ("Left out: 3" in text) == bool(left_out)


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
