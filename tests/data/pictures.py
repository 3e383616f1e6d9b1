"""Pictures that the tests of this folder share."""

from pathlib import Path

import numpy as np
import skimage
import sklearn.datasets
import torch
from PIL import Image

PHOTOS = [
    *(
        Path(skimage.__file__).parent / "data" / name
        for name in ("astronaut.png", "coffee.png", "chelsea.png")
    ),
    *(Path(sklearn.datasets.__file__).parent / "images" / name for name in ("china.jpg", "flower.jpg")),
]


def touch_images(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), (10, 20, 30)).save(root / name, "PNG")
    return root


def array(tensor: torch.Tensor) -> np.ndarray:
    """(3, H, W) tensor -> (H, W, 3) integers that can be subtracted."""
    return tensor.permute(1, 2, 0).numpy().astype(int)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)
