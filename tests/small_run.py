"""A run of main.py with the tiny network on a few crops of the demo's photographs, in two seconds."""

from pathlib import Path

from PIL import Image

import main

PICTURES = Path(main.__file__).parent / "demo" / "pictures"
SIZE = 32


def write_crops(folder, pictures=4, each=12, side=48, first=0):
    """folder/<picture>/<number>.jpg: `each` crops of some of the photographs, from the number `first` on."""
    for path in sorted(PICTURES.glob("*.jpg"))[:pictures]:
        (folder / path.stem).mkdir(parents=True)
        with Image.open(path) as picture:
            width, height = picture.size[0] - side, picture.size[1] - side
            for i in range(first, first + each):
                left, top = i * 37 % width, i * 53 % height
                crop = picture.convert("RGB").crop((left, top, left + side, top + side))
                crop.save(folder / path.stem / f"{i:02d}.jpg")
    return folder


def train(images, exp, *flags):
    """Two epochs; exp."""
    common = (
        f"--arch tiny --image-size {SIZE} --k 5 --batch 16 --workers 0 --device cpu --epochs 2 --no-report"
    )
    arguments = [str(images), "--exp", str(exp), *common.split(), *map(str, flags)]
    main.main(main.get_parser().parse_args(arguments))
    return exp
