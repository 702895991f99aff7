"""A headless Chromium with an empty profile, for tests of the documentation pages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[object]:
    """Yield a selenium driver."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
    yield driver
    driver.quit()


def show(driver, page: Path, *, width: int = 1200, height: int = 900, scheme: str = "light") -> None:
    """Open a page with this window size and colour scheme."""
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    driver.execute_cdp_cmd("Emulation.setFocusEmulationEnabled", {"enabled": True})
    driver.get(page.resolve().as_uri())


#: Script that lists elements which cannot be read. Scrollable boxes and content that is hidden by
#: default may be wider than the window.
_FAULTS = """
const found = [], width = document.documentElement.clientWidth;  // innerWidth grows with what is off-screen
if (document.documentElement.scrollWidth > width) found.push(`the page is wider than the window`);
for (const element of document.querySelectorAll("body *")) {
  const box = element.getBoundingClientRect(), style = getComputedStyle(element);
  if (!box.width || element.closest("svg, .pop") || style.clipPath !== "none" || element.closest("thead")?.offsetWidth === 1) continue;
  const name = `${element.tagName}.${element.className}: ${element.textContent.trim().slice(0, 40)}`;
  const holder = element.closest(".scroll");
  if ((!holder || holder === element) && (box.right > width + 0.5 || box.left < -0.5)) found.push(`off-screen: ${name}`);
  if (element !== holder && style.display !== "inline" && style.overflowX !== "visible" && element.scrollWidth > element.clientWidth + 1)
    found.push(`cut: ${name}`);
}
for (const svg of document.querySelectorAll("svg")) {
  const frame = svg.viewBox.baseVal;
  const texts = [...svg.querySelectorAll("text")].map(text => [text.textContent, text.getBBox()]);
  texts.forEach(([text, box], i) => {
    if (box.x < -0.5 || box.y < -0.5 || box.x + box.width > frame.width + 0.5 || box.y + box.height > frame.height + 0.5)
      found.push(`outside its drawing: ${text}`);
    for (const [other, its] of texts.slice(0, i))
      if (box.x < its.x + its.width && its.x < box.x + box.width && box.y < its.y + its.height && its.y < box.y + box.height)
        found.push(`one over the other: ${text}, ${other}`);
  });
}
return found;
"""


def layout_faults(driver) -> list[str]:
    """Return all visible elements that are off-screen, cut, outside their drawing or covered."""
    return driver.execute_script(_FAULTS)
