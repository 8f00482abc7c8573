"""The picture as PNG: the same strips and colours as on the page, drawn with Pillow."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from cachefs.cache.residency import STATES
from cachefs.page.cells import AGE_STEPS, AGES, CELLS, COLOURS, EMPTY, QUARTERS
from cachefs.units import format_size

NAMED_MOST = 200  # files with their names; more are drawn all at once
BACK, TEXT, QUIET, TRACK = "#14171c", "#d7dae0", "#8b93a1", "#20252d"
MARGIN, HEAD = 12, 46
OLD_SECONDS = 3600.0  # and older: as pale as it gets


class File(NamedTuple):
    """One strip as `Picture` encodes it."""

    node: int
    path: str | None
    size: int
    cached_bytes: int
    dirty_bytes: int
    page_hits: int
    page_misses: int
    hits_per_second: float
    cells: str
    ages: str
    cell_pages: int
    time_seconds: float


def draw(facts: Mapping[str, Any], files: Sequence[File]) -> Image.Image:
    """The whole picture: a row a file while they are few, else columns of thin strips."""
    now = float(facts["time_seconds"])
    files = sorted(files, key=lambda file: (file.path is None, file.path or ""))
    image = _named(files, now) if len(files) <= NAMED_MOST else _all_at_once(files, now)
    _head(image, facts, len(files))
    return image


def _named(files: Sequence[File], now: float) -> Image.Image:
    name_width, size_width, row, cell = 300, 150, 18, 5
    width = 2 * MARGIN + name_width + CELLS * cell + size_width
    image = Image.new("RGB", (width, HEAD + row * max(1, len(files)) + MARGIN), BACK)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    for at, file in enumerate(files):
        x, y = MARGIN + name_width, HEAD + at * row
        name = f"(removed, inode {file.node})" if file.path is None else file.path
        pen.text((MARGIN, y + 1), _shortened(pen, font, name, name_width - 10), TEXT, font)
        pen.text((x + CELLS * cell + 10, y + 1), f"{format_size(file.cached_bytes)} of {format_size(file.size)}", QUIET, font)
        pen.rectangle((x, y + 2, x + max(1, len(file.cells) * cell) - 1, y + row - 3), TRACK)
        for i in range(len(file.cells)):
            if (shown := _cell(file, i, now)) is not None:
                colour, share = shown
                top = y + row - 3 - max(1, round((row - 4) * share)) + 1
                pen.rectangle((x + i * cell, top, x + (i + 1) * cell - 1, y + row - 3), colour)
    return image


def _all_at_once(files: Sequence[File], now: float) -> Image.Image:
    strip, row = CELLS + 6, 4
    columns = max(1, round(math.sqrt(len(files) * row / strip * 1.6)))
    rows = -(-len(files) // columns)
    image = Image.new("RGB", (2 * MARGIN + columns * strip, HEAD + rows * row + MARGIN), BACK)
    pen = ImageDraw.Draw(image)
    for at, file in enumerate(files):
        x, y = MARGIN + at // rows * strip, HEAD + at % rows * row
        pen.rectangle((x, y, x + len(file.cells) - 1, y + row - 2), TRACK)
        for i in range(len(file.cells)):
            if (shown := _cell(file, i, now)) is not None:
                pen.line((x + i, y, x + i, y + row - 2), _mix(shown[0], 0.4 + 0.6 * shown[1]))
    return image


def _head(image: Image.Image, facts: Mapping[str, Any], files: int) -> None:
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    used = f"{format_size(facts['resident_bytes'])} of {format_size(facts['capacity_bytes'])} cached"
    title = f"cachefs {facts['mountpoint']}: {used}, {files} files, {facts['policy']}"
    pen.text((MARGIN, 5), _shortened(pen, font, title, image.width - 2 * MARGIN), TEXT, font)
    x = MARGIN
    for state, colour in zip(STATES, COLOURS, strict=True):
        pen.rectangle((x, 28, x + 9, 37), colour)
        pen.text((x + 14, 25), state, QUIET, font)
        x += 28 + round(pen.textlength(state, font))


def _cell(file: File, i: int, now: float) -> tuple[tuple[int, int, int], float] | None:
    """Colour and share of a cell; None if nothing is there."""
    if file.cells[i] == EMPTY:
        return None
    state, quarter = divmod(ord(file.cells[i]) - ord("A"), QUARTERS)
    step = AGES.index(file.ages if len(file.ages) == 1 else file.ages[i])
    age_seconds = 2 ** (step / AGE_STEPS) - 1 + max(0.0, now - file.time_seconds)
    old = min(1.0, math.log2(1 + age_seconds) / math.log2(1 + OLD_SECONDS))
    return _mix(_rgb(COLOURS[state]), 1 - 0.65 * old), (quarter + 1) / QUARTERS


def _mix(colour: tuple[int, int, int], alpha: float) -> tuple[int, int, int]:
    red, green, blue = (round(alpha * top + (1 - alpha) * back) for top, back in zip(colour, _rgb(TRACK), strict=True))
    return red, green, blue


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _shortened(pen: ImageDraw.ImageDraw, font: Any, text: str, width: int) -> str:
    """The text, or as much of its end as fits."""
    if pen.textlength(text, font) <= width:
        return text
    while text and pen.textlength("..." + text, font) > width:
        text = text[max(1, len(text) // 20) :]
    return "..." + text
