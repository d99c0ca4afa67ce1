# SPDX-License-Identifier: Apache-2.0
"""Chromium without a screen, for tests of pages."""

import contextlib
import json
import shutil

import pytest


@contextlib.contextmanager
def started():
    """A browser that logs its requests and its console; a skip where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("Debian's chromium and chromium-driver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as browser:
        browser.set_window_size(1200, 900)
        yield browser


@contextlib.contextmanager
def opened(browser, page):
    """A page, freshly opened; afterwards it has made no request and printed no error."""
    for log in ("performance", "browser"):
        browser.get_log(log)
    browser.get(page.as_uri())
    yield browser
    emulate(browser)
    assert requests(browser) == [page.as_uri()]
    assert browser.get_log("browser") == []


def emulate(browser, scheme=None, width=None):
    """Prefer a colour scheme, and be a screen of this width; without either, be as before."""
    features = [{"name": "prefers-color-scheme", "value": scheme}] if scheme else []
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": features})
    if width is None:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        return
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 400}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def requests(browser):
    """Addresses that were asked for since the last call."""
    events = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
    sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return [params["request"]["url"] for params in sent if params["request"]["url"] != "data:,"]


def luminance(browser, what, name):
    """Relative luminance of a colour of an element, by WCAG."""
    color = browser.find_element("css selector", what).value_of_css_property(name)
    numbers = [float(x) / 255 for x in color[color.index("(") + 1 : -1].split(",")[:3]]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in numbers]
    return sum(x * weight for x, weight in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))


def contrast(browser, text, ground):
    """Contrast of an element's text with the background of another."""
    pair = luminance(browser, text, "color"), luminance(browser, ground, "background-color")
    return (max(pair) + 0.05) / (min(pair) + 0.05)
