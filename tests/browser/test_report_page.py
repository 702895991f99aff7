"""The HTML report in a real browser.

The console stays empty, every figure is drawn, texts from data sets are escaped, and no page is
wider than the window.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from datasets import Dataset

import pipeline as softlabel
from pipeline.config import ReportConfig
from pipeline.evaluation.report.report import report
from tests.support.classifier import LABELS, classifier, taught

pytestmark = pytest.mark.browser

PLANTED = '<script>window.planted = 1</script><img src="x" onerror="window.planted = 2"> <b>bold</b> & "quoted" the cat'
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


@pytest.fixture
def page(tmp_path, bert_tokenizer, topics, save_teacher) -> str:
    """The URL of a report whose texts contain markup."""
    teacher = classifier(bert_tokenizer)
    path = save_teacher(teacher, bert_tokenizer)
    other = save_teacher(classifier(bert_tokenizer, seed=5), bert_tokenizer, "other")
    rows = taught(topics, teacher, bert_tokenizer)
    rows["test"] = Dataset.from_dict({"text": [PLANTED] * 30, "label": [LABELS[i % 3] for i in range(30)]})
    cache = softlabel.cache_logits(str(path), rows, tmp_path / "cache", task="sequence-classification")
    report(
        ReportConfig(
            cache=str(cache.root),
            student=(f"<i>student</i>={other}",),
            control=(f"copy={path}",),
            output=str(tmp_path / "out"),
            rounds=0,
            resamples=200,
        )
    )
    return (tmp_path / "out" / "report.html").as_uri()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[object]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    assert chromium is not None, "chromium is not installed"
    assert driver is not None, "chromedriver is not installed"
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(driver))
    yield found
    found.quit()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_the_page(page, browser, scheme, width):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    browser.get(page)
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    figures = browser.execute_script(
        "return [...document.images].map(i => [i.naturalWidth, i.clientWidth, i.alt, i.currentSrc.slice(0, 15)])"
    )
    assert len(figures) >= 4
    for natural, shown, alt, source in figures:
        assert natural > 0
        assert 0 < shown <= width
        assert alt
        assert source == "data:image/png;"
    sources = browser.execute_script("return [...document.images].map(i => i.currentSrc === i.src)")
    assert all(light == (scheme == "light") for light in sources)
    # Wide tables scroll within their own boxes.
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script(
        "return [...document.querySelectorAll('.scroll')].every(e => e.clientWidth <= innerWidth)"
    )
    colours = browser.execute_script(
        "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor].map(c => +c.match(/\\d+/)[0])"
    )
    assert (colours[0] > colours[1]) == (scheme == "dark")


def test_markup_in_the_data_is_text(page, browser):
    browser.get(page)
    assert browser.execute_script("return window.planted === undefined")
    assert browser.execute_script("return document.scripts.length") == 0
    assert browser.execute_script("return document.querySelectorAll('b, i, img[src=x]').length") == 0
    quotes = browser.execute_script("return [...document.querySelectorAll('.quote p')].map(p => p.textContent)")
    assert quotes
    assert set(quotes) == {PLANTED}
    assert "<i>student</i>" in browser.execute_script("return document.getElementById('verdict').textContent")
    requests = [
        entry["message"] for entry in browser.get_log("performance") if "Network.requestWillBeSent" in entry["message"]
    ]
    assert not any('"url":"http' in message for message in requests)
