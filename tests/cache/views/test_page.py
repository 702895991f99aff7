"""The page of a cache: what it says is true, what comes from data is text, and a browser shows it."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from click.testing import CliRunner

import pipeline as softlabel
from pipeline.cache import Cache
from pipeline.cache.views.charts import HEIGHT, WIDTH, histogram
from pipeline.cache.views.page import write_page
from pipeline.cli import main
from pipeline.errors import CacheError
from pipeline.records import Ancestor, Full, Sampled, TopK, TopP
from tests.support.browser import browser, show  # noqa: F401 - a fixture
from tests.support.rows import build_cache

NASTY = "<script>document.title='owned'</script><img src=x onerror=document.title='owned'> & \"quoted\""


@pytest.fixture
def nasty(tmp_path, bert_tokenizer):
    """A classifier's cache whose texts, labels and names are markup."""
    rows = [
        softlabel.LabelledRow(
            bert_tokenizer("the cat")["input_ids"], logits=np.asarray([[2.0, n]]), label=n % 2, text=NASTY
        )
        for n in range(3)
    ]
    return softlabel.write_cache(
        rows,
        tmp_path / "c",
        task="sequence-classification",
        tokenizer=bert_tokenizer,
        encoding=Full(),
        teacher=f"org/{NASTY}",
        label_names=("<b>bold</b>", "</style><h1>big"),
        source="https://user:planted-password@host/data?token=planted-token hf_plantedplanted",
    )


def page_of(cache: Cache, **settings) -> str:
    path = cache.root.parent / "page.html"
    write_page(cache, path, **settings)
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("encoding", [Full(), TopK(4), TopP(0.7), Sampled(6.0)], ids=lambda e: e.kind)
def test_a_page_of_every_encoding(tmp_path, lm_tokenizer, encoding):
    cache = build_cache(tmp_path / "cache", lm_tokenizer, encoding=encoding)
    page = page_of(cache)
    assert cache.manifest.cache_id in page
    assert page.count('<figure class="card chart">') == (3 if encoding.kind == "full" else 5)
    shown = list(cache.dataset("train"))[:6]
    assert page.count('class="tok" tabindex="0"') == sum(len(row.soft) for row in shown)
    assert f"{cache.manifest.shards[0].bytes + cache.manifest.shards[1].bytes:,}" in page
    assert "nan" not in page


def test_text_is_escaped_and_no_secret_is_shown(nasty, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_fromtheenvironment")
    page = page_of(nasty)
    assert "<script>" not in page
    assert "<img" not in page
    assert "<b>bold" not in page
    assert "&lt;script&gt;" in page
    for secret in ("planted-password", "planted-token", "hf_planted", "hf_fromtheenvironment"):
        assert secret not in page
    assert not re.search(r"<[^>]*\s(src|href)=", page)  # it asks for nothing


def test_the_histogram_counts_each_value_once():
    values = np.asarray([1, 1, 2, 7, 20, np.nan])
    chart = histogram("t", values, "c", whole=True)
    shares = [float(bar.title.rpartition(" ")[2].rstrip("%")) for bar in chart.bars]
    assert shares == [40.0, 20.0, 20.0, 20.0]
    assert [bar.height for bar in chart.bars] == [HEIGHT, HEIGHT / 2, HEIGHT / 2, HEIGHT / 2]
    assert all(bar.x >= 0 and bar.x + bar.width <= WIDTH for bar in chart.bars)
    assert "median 2.0" in chart.summary
    assert chart.low == "1"
    assert histogram("t", np.full(3, np.nan), "c") is None
    same = histogram("t", np.full(4, 2.5), "c")
    assert [bar.title for bar in same.bars] == ["2.50 to 2.54: 100.0%"]


def test_what_a_token_shows_is_what_was_predicted_in_its_place(tmp_path, lm_tokenizer):
    cache = build_cache(tmp_path / "cache", lm_tokenizer, encoding=TopK(3))
    row = cache.dataset("train")[0]
    page = page_of(cache, rows=1, top=1)
    weights = [float(found) for found in re.findall(r"weight ([\d.]+)%", page)]
    place = np.flatnonzero(row.example.supervised) + 1
    expected = []
    for n, token in enumerate(row.example.input_ids[place].tolist()):
        part = slice(3 * n, 3 * n + 3)
        hit = row.soft.top_logprobs[part].exp()[row.soft.top_ids[part] == token]
        expected.append(100 * float(hit[0]) if len(hit) else 0.0)
    np.testing.assert_allclose(weights, expected, atol=0.3)


def test_the_command_writes_the_page(tmp_path, lm_tokenizer):
    cache = build_cache(tmp_path / "cache", lm_tokenizer)
    command = ["inspect", "--cache", str(cache.root), "--html", str(tmp_path / "out" / "page.html")]
    assert CliRunner().invoke(main, command, catch_exceptions=False).exit_code == 0
    assert (tmp_path / "out" / "page.html").read_text().startswith("<!doctype html>")
    assert CliRunner().invoke(main, [*command, "--json"]).exit_code == 2
    with pytest.raises(CacheError, match="no split 'dev'"):
        page_of(cache, split="dev")


def test_ancestors_are_named(tmp_path, lm_tokenizer):
    cache = build_cache(tmp_path / "cache", lm_tokenizer)
    manifest = dataclasses.replace(cache.manifest, ancestry=(Ancestor("f" * 64, "filter where a < 1"),))
    assert "filter where a &lt; 1: " + "f" * 64 in page_of(Cache(cache.root, manifest))


# ------------------------------------------------------------------------------------------------------- browser


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_a_browser_shows_the_soft_labels_of_the_token_in_focus(tmp_path, lm_tokenizer, browser, scheme, width):
    from selenium.webdriver import Keys
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    cache = build_cache(tmp_path / "cache", lm_tokenizer)
    write_page(cache, tmp_path / "page.html")
    show(browser, tmp_path / "page.html", width=width, scheme=scheme)
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    tokens = browser.find_elements(By.CSS_SELECTOR, ".tok")
    pops = browser.find_elements(By.CSS_SELECTOR, ".pop")
    assert not any(pop.is_displayed() for pop in pops[:20])
    for _ in range(6):  # by keyboard alone; on a phone the table that scrolls comes first
        ActionChains(browser).send_keys(Keys.TAB).perform()
        if browser.switch_to.active_element == tokens[3]:
            break
    assert pops[3].is_displayed()
    box = pops[3].rect
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    page = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", page)[:3])) > 384) == (scheme == "light")
    assert browser.find_elements(By.CSS_SELECTOR, "svg rect")[0].rect["height"] >= 0
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.browser
def test_markup_in_data_does_nothing(nasty, browser):
    path = nasty.root.parent / "page.html"
    write_page(nasty, path)
    show(browser, path)
    assert browser.title.startswith("Soft labels of org/<script>")
    assert NASTY in browser.find_element("css selector", ".text").text
    assert browser.find_elements("css selector", "script, img") == []
