import pytest
from PIL import Image

from tests.data.pictures import PHOTOS


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    return Image.open(PHOTOS[1]).convert("RGB").crop((40, 30, 231, 173))  # 191 x 143, odd on purpose
