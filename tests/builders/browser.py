"""Headless Chromium from Debian."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1100,1400")


@contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    """Runs a browser while the block runs; skips the test if Chromium is not installed."""
    driver, binary = shutil.which("chromedriver"), shutil.which("chromium")
    if not driver or not binary:
        pytest.skip("needs Debian's chromium and chromium-driver")
    options = Options()
    options.binary_location = binary
    for option in OPTIONS:
        options.add_argument(option)
    browser = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield browser
    finally:
        browser.quit()
