"""Prefect's and MLflow's pages as a person meets them: what is shown, and what can be typed and pressed."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from playwright.sync_api import Locator, Page, expect, sync_playwright

CHROMIUM = "/usr/bin/chromium"
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE_MS = 240_000
SIZE = {"width": 1280, "height": 900}
FIELD = "div[contains(concat(' ', @class, ' '), ' schema-form-property ')]"
LABEL = "div[contains(@class, 'p-label__header')]//span[contains(@class, 'schema-form-property__label')]"


@dataclass(frozen=True)
class Browser:
    """A page of Chromium; `shots`: where pictures of it are written, None where none are asked for."""

    page: Page
    shots: Path | None

    def open(self, address: str) -> None:
        """Load an address anew, also where only what follows its # is another."""
        self.page.goto("about:blank")
        self.page.goto(address)

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    def sees(self, text: str | re.Pattern[str]) -> None:
        """Wait until a text is to be seen."""
        expect(self.page.get_by_text(text).filter(visible=True).first).to_be_visible()

    def field(self, *keys: str) -> Locator:
        """An option in a form of Prefect's, by the keys that lead to it; most blocks are shown with a capital."""
        steps = []
        for depth, key in enumerate(keys):
            names = [
                f"normalize-space(.) = '{name}{end}'" for name in (key, key.title()) for end in ("", " (Optional)")
            ]
            steps.append(f"//{FIELD}[count(ancestor::{FIELD}) = {depth}][./{LABEL}[{' or '.join(names)}]]")
        return self.page.locator("xpath=" + "".join(steps))

    def choices(self, field: Locator) -> list[str]:
        """What an option offers to choose from."""
        field.locator(".p-select-button__control").focus()
        self.page.keyboard.press("ArrowDown")
        offered = self.page.locator(".p-select-option")
        expect(offered.first).to_be_visible()
        return [text.strip() for text in offered.all_inner_texts()]

    def shot(self, name: str) -> None:
        """A picture for the documentation, where they are asked for: of few colours, and so a small file."""
        if self.shots is None:
            return
        path = self.shots / f"{name}.png"
        self.page.screenshot(path=path, animations="disabled")
        with Image.open(path) as picture:
            picture.convert("RGB").quantize(96, dither=Image.Dither.NONE).save(path, optimize=True)


@contextmanager
def chromium(shots: Path | None) -> Iterator[Browser]:
    """A new Chromium, which waits long before it gives up: the machine may be busy."""
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=PATIENCE_MS)
        page = started.new_page(viewport=SIZE)  # type: ignore[arg-type]
        page.set_default_timeout(PATIENCE_MS)
        try:
            yield Browser(page, shots)
        finally:
            started.close()
