"""Contact sheets: pictures in a grid with captions and row labels, as one picture."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data.scan import DRAWN
from util import atomic_write, make_folder

GAP = 4  # pixels between tiles and around the sheet
PAPER, INK = "white", "black"


def contact_sheet(
    tiles: Sequence[Image.Image | None],
    columns: int,
    captions: Sequence[str] = (),
    row_labels: Sequence[str] = (),
    title: str = "",
    font_size: int = 12,
    gap: int = GAP,
) -> Image.Image:
    """Tiles in rows of `columns`, left to right, top to bottom: an RGB picture.

    Every cell is as large as the largest tile; smaller tiles are centred in theirs, None leaves one empty.
    captions: a line under each tile (all or none); row_labels: a line left of each row; title: a line on top.
    Text that is wider than its place is shortened with an ellipsis. Raises ValueError for lists that do not
    fit together.
    """
    rows = math.ceil(len(tiles) / columns)
    if (captions and len(captions) != len(tiles)) or (row_labels and len(row_labels) != rows):
        raise ValueError(f"{len(tiles)} tiles, {len(captions)} captions, {len(row_labels)} labels do not fit")
    pictures = [tile for tile in tiles if tile is not None]
    width = max((tile.width for tile in pictures), default=1)
    height = max((tile.height for tile in pictures), default=1)
    font = ImageFont.load_default(font_size)
    line = font_size + 4
    left = gap + max((math.ceil(font.getlength(label)) + gap for label in row_labels), default=0)
    top = gap + (line if title else 0)
    step = height + (line if captions else 0) + gap  # from a row to the next
    sheet = Image.new("RGB", (left + columns * (width + gap), top + rows * step), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((gap, gap // 2), shorten(title, font, sheet.width - 2 * gap), INK, font)
    for row, label in enumerate(row_labels):
        draw.text((gap, top + row * step + height // 2), label, INK, font, anchor="lm")
    for i, tile in enumerate(tiles):
        x, y = left + i % columns * (width + gap), top + i // columns * step
        if tile is not None:
            sheet.paste(tile, (x + (width - tile.width) // 2, y + (height - tile.height) // 2))
        if captions:
            text = shorten(captions[i], font, width)
            draw.text((x + width // 2, y + height + line // 2), text, INK, font, anchor="mm")
    return sheet


def shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The text, or as much of it as fits into `width` pixels with an ellipsis at its end."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def square_columns(count: int) -> int:
    """Columns of a grid of `count` tiles that is as square as it can be, rather wide than high."""
    return max(1, math.ceil(math.sqrt(count)))


def folder_of_pictures(path: str | Path) -> Path:
    """Make the folder; where it is new, a mark keeps its pictures out of the images of a folder above it."""
    path = Path(path)
    new = not path.exists()
    make_folder(path)
    if new:
        (path / DRAWN).touch()
    return path


def save_picture(image: Image.Image, path: str | Path) -> None:
    """Write a picture in the format of its ending, beside `path` and renamed; JPEG at quality 95, 4:4:4."""
    path = Path(path)
    jpeg = path.suffix.lower() in (".jpg", ".jpeg")
    encoded = io.BytesIO()
    options = {"quality": 95, "subsampling": 0} if jpeg else {}
    image.save(encoded, "JPEG" if jpeg else path.suffix[1:].upper(), **options)
    with atomic_write(path, "wb") as file:
        file.write(encoded.getvalue())
