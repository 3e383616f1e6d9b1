"""Contact sheets: where tiles, captions and labels land, and what cannot be laid out."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from util import UserError
from visu import sheet

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def flat(colour, width=10, height=8):
    return Image.new("RGB", (width, height), colour)


def boxes(picture: Image.Image, colour) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of all pixels of a colour; right and bottom exclusive."""
    rows, columns = np.nonzero((np.asarray(picture) == colour).all(axis=2))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_tiles_go_left_to_right_then_down():
    made = sheet.contact_sheet([flat(RED), flat(GREEN), flat(BLUE)], columns=2, gap=3)
    assert made.size == (3 + 2 * 13, 3 + 2 * 11)
    assert boxes(made, RED) == (3, 3, 13, 11)
    assert boxes(made, GREEN) == (16, 3, 26, 11)
    assert boxes(made, BLUE) == (3, 14, 13, 22)
    assert made.getpixel((20, 18)) == (255, 255, 255)  # the cell that no tile fills


def test_smaller_tiles_are_centred_and_none_leaves_its_cell_empty():
    made = sheet.contact_sheet([flat(RED), None, flat(BLUE, 4, 4)], columns=3, gap=1)
    assert boxes(made, BLUE) == (1 + 2 * 11 + 3, 1 + 2, 1 + 2 * 11 + 7, 1 + 6)
    assert (np.asarray(made)[:, 12:22] == 255).all()


def test_labels_are_left_of_their_row_and_captions_under_their_tile():
    tiles = [flat(RED, 40, 30), flat(BLUE, 40, 30)]
    made = np.asarray(sheet.contact_sheet(tiles, 1, ["7", "8"], ["first", "second"], title="t", gap=4))
    left = boxes(Image.fromarray(made), RED)[0]
    dark = (made.max(axis=2) < 100) & (made.sum(axis=2) < 200)
    for colour in (RED, BLUE):
        _, top, _, bottom = boxes(Image.fromarray(made), colour)
        assert dark[top:bottom, :left].any()  # the label
        assert dark[bottom : bottom + 16, left : left + 40].any()  # the caption
    assert dark[: boxes(Image.fromarray(made), RED)[1]].any()  # the title


def test_long_text_is_shortened_to_its_place():
    font = ImageFont.load_default(12)
    short = sheet.shorten("a name that is much too long for it", font, 60)
    assert short.endswith("…") and 40 < font.getlength(short) <= 60
    assert sheet.shorten("short", font, 60) == "short"


def test_lists_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        sheet.contact_sheet([flat(RED)] * 3, 2, captions=["one"])
    with pytest.raises(ValueError, match="do not fit"):
        sheet.contact_sheet([flat(RED)] * 3, 2, row_labels=["one"])


@pytest.mark.parametrize("name", ["a.png", "a.jpeg", "a.jpg"])
def test_pictures_are_written_in_the_format_of_their_ending(tmp_path, name):
    sheet.save_picture(flat(RED, 16, 16), tmp_path / name)
    with Image.open(tmp_path / name) as back:
        assert back.format == ("PNG" if name.endswith("png") else "JPEG")
        assert np.abs(np.asarray(back, int) - RED).max() <= 2
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_picture_that_cannot_be_written_is_a_users_error(tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        sheet.save_picture(flat(RED), tmp_path / "missing" / "a.png")
