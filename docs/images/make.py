"""Draw the README's pictures of a report: `python docs/images/make.py [REPORT]`, by default of `demo/report.jsonl`."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from weightsmith.core.report import Report

HERE = Path(__file__).parent
ROWS = 2
"""Rows of pictures shown, from the top."""


def main(source: str = "demo/report.jsonl") -> None:
    """Write `report.png` and `report-dark.png`."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page_file = Report.load(source).html(Path(folder, "report.html"))
        chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for scheme, name in (("light", "report.png"), ("dark", "report-dark.png")):
            page = browser.new_page(
                viewport={"width": 1180, "height": 900}, color_scheme=scheme, device_scale_factor=1.25
            )
            page.goto(page_file.as_uri())
            bottom = page.evaluate(
                """shown => {
                  document.querySelectorAll("#steps, #pipeline > .table").forEach(part => { part.hidden = true });
                  const figures = [...document.querySelectorAll("figure")].map(f => f.getBoundingClientRect());
                  const rows = [...new Set(figures.map(box => Math.round(box.top)))].slice(0, shown);
                  return Math.max(...figures.filter(box => rows.includes(Math.round(box.top))).map(box => box.bottom));
                }""",
                ROWS,
            )
            clip = {"x": 0, "y": 0, "width": 1180, "height": bottom + 14}
            page.screenshot(path=HERE / name, full_page=True, clip=clip)
            print(HERE / name, f"{(HERE / name).stat().st_size / 1e3:.0f} kB")
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
