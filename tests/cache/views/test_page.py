"""The HTML page of a cache.

Its numbers are right, it escapes all text from data, and a browser displays it.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from click.testing import CliRunner

import pipeline as softlabel
from pipeline.cache import Cache
from pipeline.cache.views import inspection, measures
from pipeline.cache.views.measures import measure
from pipeline.cache.views.page import write_page
from pipeline.cli import main
from pipeline.errors import CacheError
from pipeline.records import Ancestor, Full, Sampled, Shard, TopK, TopP
from tests.support.browser import browser, layout_faults, show  # noqa: F401 - a fixture
from tests.support.rows import build_cache

NASTY = "<script>document.title='owned'</script><img src=x onerror=document.title='owned'> & \"quoted\""


@pytest.fixture
def nasty(tmp_path, bert_tokenizer):
    """A classifier's cache whose texts, labels and names contain markup."""
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
    assert page.count('<figure class="card chart">') == (4 if encoding.kind == "full" else 6)
    assert "ln V = 3.714: uniform over 41 classes" in page
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
    assert not re.search(r"<[^>]*\s(src|href)=(?!\"#)", page)  # the page loads nothing


def numbers(text: str) -> list[str]:
    """All numbers in a piece of a page, ignoring its markup."""
    return re.findall(r"[\d,]+(?:\.\d+)?", re.sub(r"<[^>]*>", " ", text))


def part(page: str, start: str, stop: str) -> str:
    return page[page.index(start) : page.index(stop, page.index(start))]


def test_the_head_says_what_the_cache_is_and_what_each_split_holds(tmp_path, bert_tokenizer):
    cache = build_cache(
        tmp_path / "c", bert_tokenizer, encoding=TopK(3), classes=5, tokens=False, splits=("train", "test")
    )
    page = page_of(cache)
    head = part(page, "<h1>", "<nav")
    for expected in (cache.manifest.cache_id, "5 classes", "tiny, 1,000 parameters", "top-k, k 3, temperatures"):
        assert expected in head
    for split in ("train", "test"):
        row = part(head, f"<bdi>{split}</bdi>", "</tr>")
        shards = cache.manifest.split_shards(split)
        tokens, size = (sum(getattr(shard, key) for shard in shards) for key in ("tokens", "bytes"))
        assert numbers(row) == ["60", "40", "60", f"{tokens:,}", f"{size:,}", f"{size / 60:,.1f}", "2"]


def test_every_split_has_its_part_with_the_numbers_of_its_own_rows(tmp_path, bert_tokenizer):
    cache = build_cache(
        tmp_path / "c", bert_tokenizer, encoding=Full(), classes=5, tokens=False, splits=("train", "test")
    )
    page = page_of(cache)
    for n, split in enumerate(("train", "test"), start=1):
        rows = list(cache.dataset(split))
        top = np.asarray([int(row.soft.top_logprobs.argmax()) for row in rows])
        labels = np.asarray([-1 if row.example.label is None else row.example.label for row in rows])
        shown = part(page, f'id="split-{n}"', 'id="split-2"' if n == 1 else 'id="rows"')
        agreed = int((labels == top).sum())
        assert f"agrees with the labels on {agreed / 40:.1%} of 40 labelled rows ({agreed});" in shown
        assert "20 rows have no label." in shown
        balance = numbers(part(shown, '<table class="counts">', "</table>"))
        assert balance[:6] == ["40", "0", balance[2], "60", "0", balance[2]]
        pairs = [(f"class {i}", int((labels == i).sum()), int((top == i).sum())) for i in range(5)]
        assert balance[6:] == [str(x) for name, a, b in pairs for x in (name.split()[1], a, b)]
        assert balance[2] == str(max(max(a, b) for _, a, b in pairs))
        lines = re.findall(r"<tr>.*?</tr>", part(shown, '<table class="matrix', "</table>"), flags=re.DOTALL)[2:]
        for i, line in enumerate(lines):
            counts = [int(((labels == i) & (top == j)).sum()) for j in range(5)]
            share = [f"{100 * counts[i] / sum(counts):.1f}"] if sum(counts) else []
            assert numbers(line) == [str(i + 1), str(i), *map(str, counts), str(sum(counts)), *share]
        wrong = [row.example.source_row for row, a, b in zip(rows, labels, top, strict=True) if a >= 0 and a != b]
        doubted = [int(found) for found in re.findall(r"source row (\d+)", shown)]
        assert len(doubted) == min(6, len(wrong))
        assert set(doubted) <= set(wrong)
        assert "ln V = 1.609: uniform over 5 classes" in shown


def test_many_classes_are_cut_and_the_page_says_so(tmp_path, bert_tokenizer):
    cache = build_cache(tmp_path / "c", bert_tokenizer, encoding=Sampled(6.0), classes=200, tokens=False)
    page = page_of(cache)
    assert part(page, '<table class="counts">', "</table>").count('scope="row"') == 31
    assert "170 other classes" in page
    assert "The 30 classes with the most disagreements are shown one by one, 170 in one line" in page
    assert re.search(r"Classes without a labelled row: \d+ of 200\.", page)
    assert re.search(r"\d+ other pairs of classes, \d+ rows, are left out\.", page)
    found = measure(cache, "train")
    wrong = int(((found.labels >= 0) & (found.labels != found.predicted)).sum())
    assert f"{wrong - 6} others are left out" in page


def test_a_language_models_page_has_tokens_and_no_classes(tmp_path, lm_tokenizer):
    cache = build_cache(tmp_path / "c", lm_tokenizer, encoding=TopK(4))
    page = page_of(cache)
    found = measure(cache, "train")
    share = (found.labels == found.predicted).mean()
    assert f"the next token of the data at {share:.1%} of {len(found.labels):,} positions." in page
    assert f"loss is {found.nll.sum() / len(found.labels):.3f} nats a token" in page
    assert "29 other tokens" in page
    for word in ("Class balance", "Teacher against labels", "disagreements", "labelled rows"):
        assert word not in page
    ranks = part(page, "<h3>Rank</h3>", "</svg>")
    titles = re.findall(r"<title>(.*?): ([\d,]+) \(", ranks)
    expected = {"1": (found.ranks == 1).sum(), "2": (found.ranks == 2).sum(), "other": (found.ranks == 0).sum()}
    assert {name: int(count) for name, count in titles if name in expected} == expected
    assert sum(int(count) for _, count in titles) == len(found.labels)


def test_a_sample_is_called_one(tmp_path, bert_tokenizer, monkeypatch):
    cache = build_cache(tmp_path / "c", bert_tokenizer, encoding=Full(), classes=3, tokens=False)
    monkeypatch.setattr(measures.measure, "__kwdefaults__", {"most": 20})
    assert "A sample: 20 of 60 rows, from all over the split." in page_of(cache)
    monkeypatch.setattr(inspection, "_AGREEMENT_ROWS", 30)
    lines = list(inspection.describe(cache, split=None, rows=0, tokens=0, top=0))
    assert re.fullmatch(
        r"train: teacher agrees with the labels on [\d.]+% of 20 labelled rows, in a sample of 30 of 60 rows", lines[-1]
    )


@pytest.mark.parametrize("labels", [(None,), (0,)], ids=["no label", "one class"])
def test_few_labels(tmp_path, bert_tokenizer, labels):
    rows = [
        softlabel.LabelledRow(bert_tokenizer("the cat")["input_ids"], logits=np.asarray([[n, 0.0]]), label=labels[0])
        for n in range(3)
    ]
    cache = softlabel.write_cache(
        rows,
        tmp_path / "c",
        task="sequence-classification",
        tokenizer=bert_tokenizer,
        encoding=Full(),
        teacher="t",
        label_names=("a", "b"),
    )
    page = page_of(cache)
    text = "\n".join(inspection.describe(cache, split=None, rows=1, tokens=0, top=1))
    assert "nan" not in page
    assert ("No row has a label" in page) == (labels[0] is None)
    assert ("100.0% of 3 labelled rows (3)" in page) == (labels[0] == 0)
    assert ("None: the teacher agrees with every label." in page) == (labels[0] == 0)
    assert ("train: teacher agrees with the labels on 100.0% of 3 labelled rows\n" in text) == (labels[0] == 0)
    assert "[CLS] the cat" in page  # the tokens, as no text is stored


@pytest.mark.parametrize("tokens", [False, True])
def test_a_split_without_rows(tmp_path, bert_tokenizer, lm_tokenizer, tokens):
    tokenizer = lm_tokenizer if tokens else bert_tokenizer
    cache = build_cache(tmp_path / "c", tokenizer, encoding=TopK(3), classes=41, tokens=tokens)
    shards = (*cache.manifest.shards, Shard("test-00000", "test", 0, 0, 0, 0, "", ()))
    page = page_of(Cache(cache.root, dataclasses.replace(cache.manifest, shards=shards)), split="test")
    assert page.count("No rows.") == 2
    assert "<svg" not in part(page, 'id="split-2"', 'id="rows"')
    assert "nan" not in page


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


# ------------------------------------------------------------------------------------------ browser


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
    assert layout_faults(browser) == []
    tokens = browser.find_elements(By.CSS_SELECTOR, ".tok")
    pops = browser.find_elements(By.CSS_SELECTOR, ".pop")
    assert not any(pop.is_displayed() for pop in pops[:20])
    for _ in range(20):  # by keyboard alone; links to the sections come first
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


#: Labels of the boxes whose content is wider than they are; only confusion matrices may be.
_SCROLLED = """
const wide = [...document.querySelectorAll(".scroll")].filter(box => box.scrollWidth > box.clientWidth);
return [...new Set(wide.map(box => box.getAttribute("aria-label").split(" ").slice(0, 3).join(" ")))];
"""

#: Class names that are hard to display: markup, right-to-left text, emoji, long names.
ODD = (
    "<script>document.title='owned'</script>",
    "\u0643\u0631\u0629 \u0627\u0644\u0642\u062f\u0645",
    "\U0001f3ac film",
    "long " * 20,
    "x" * 90,
)


def odd_names(root, tokenizer):
    """Five oddly named classes in two splits; a third of the rows has no label, many disagree."""
    rng = np.random.default_rng(0)
    rows = [
        softlabel.LabelledRow(
            tokenizer("the cat")["input_ids"],
            logits=rng.normal(size=(1, 5)) * 2,
            label=None if n % 3 == 2 else n % 5,
            text=f"{NASTY} {'word' * 40} \u0643\u0631\u0629",
            split=split,
        )
        for split in ("train", "a-split-of-a-long-name" * 3)
        for n in range(90)
    ]
    return softlabel.write_cache(
        rows,
        root,
        task="sequence-classification",
        tokenizer=tokenizer,
        encoding=Full(),
        teacher="organisation/" + "teacher" * 12,
        label_names=ODD,
    )


@pytest.mark.browser
@pytest.mark.parametrize("kind", ["odd names", "many classes", "tokens"])
def test_nothing_is_cut_or_off_screen(tmp_path, bert_tokenizer, lm_tokenizer, browser, kind):
    if kind == "odd names":
        cache = odd_names(tmp_path / "c", bert_tokenizer)
    elif kind == "many classes":
        cache = build_cache(
            tmp_path / "c", bert_tokenizer, encoding=Sampled(6.0), classes=200, tokens=False, splits=("train", "test")
        )
    else:
        cache = build_cache(tmp_path / "c", lm_tokenizer, splits=("train", "test"))
    write_page(cache, tmp_path / "page.html")
    for width in (320, 390, 768, 1280):
        for scheme in ("light", "dark"):
            show(browser, tmp_path / "page.html", width=width, scheme=scheme)
            assert layout_faults(browser) == [], f"{width}, {scheme}"
            assert browser.execute_script(_SCROLLED) in ([], ["Confusion matrix of"]), f"{width}, {scheme}"
            colours = "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
            ink, paper = (int(re.search(r"\d+", colour)[0]) for colour in browser.execute_script(colours))
            assert (ink < paper) == (scheme == "light")
    assert browser.title.startswith("Soft labels of ")
    assert (
        len(browser.find_elements("css selector", "svg")) == 2 * {"odd names": 3, "many classes": 5, "tokens": 6}[kind]
    )
    assert browser.find_elements("css selector", "script, img") == []
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


@pytest.mark.browser
@pytest.mark.parametrize(
    ("markup", "fault"),
    [
        ('<div style="width:500px">a</div>', "off-screen: DIV.: a"),
        ('<div style="width:500px">a</div>', "the page is wider than the window"),
        ('<div style="width:20px; overflow:hidden; white-space:nowrap">much longer</div>', "cut: DIV.: much longer"),
        ('<svg viewBox="0 0 50 20"><text x="40" y="10">long</text></svg>', "outside its drawing: long"),
        ('<svg viewBox="0 0 50 50"><text y="20">a</text><text y="22">b</text></svg>', "one over the other: b, a"),
    ],
)
def test_faults_of_a_layout_are_found(tmp_path, browser, markup, fault):
    head = '<!doctype html><meta name="viewport" content="width=device-width"><body style="margin:0">'
    (tmp_path / "page.html").write_text(head + markup)
    show(browser, tmp_path / "page.html", width=390)
    assert fault in layout_faults(browser)
