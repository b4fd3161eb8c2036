"""Debian's Chromium without a window."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

WORDS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1100,1400")


@contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    """A browser while a test runs; skips where there is none."""
    driver, binary = shutil.which("chromedriver"), shutil.which("chromium")
    if not driver or not binary:
        pytest.skip("pages are looked at where Debian's chromium and chromium-driver are installed")
    options = Options()
    options.binary_location = binary
    for word in WORDS:
        options.add_argument(word)
    made = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield made
    finally:
        made.quit()
