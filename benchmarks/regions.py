"""R-MAC regions: how much faster all at once than one after the other?

    python benchmarks/regions.py                             # VGG-16's map of a photograph at S = 1024
    python benchmarks/regions.py --channels 256 --size 47 63 --device cuda

Both make the whole descriptor of a map (C, H, W) as the network hands it out, in channels_last memory: maxima
over the regions, L2, whitening, L2, sum, L2. They take turns in this process; the minimum of the rounds
counts. 'loop planes' is the loop over a map that lies channel by channel, which suits it better but is not
what the network hands out (the copy that it takes is not counted). The two descriptors must be equal up to
rounding, or the script fails.
"""

import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from commandline import Parser, at_least
from evaluation.rmac import PCA_DIM, Whitening, pool_regions, region_descriptors, regions, rmac


def get_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--channels", type=at_least(1), default=512)
    parser.add_argument("--size", type=at_least(1), nargs=2, default=[48, 64], metavar=("H", "W"))
    parser.add_argument("--levels", type=at_least(1), default=3)
    parser.add_argument("--rounds", type=at_least(1), default=20)
    parser.add_argument("--device", default="cpu")
    return parser


def loop_pool(activation: torch.Tensor, levels: int) -> torch.Tensor:
    """Maxima of one region after the other, (R, C)."""
    height, width = activation.shape[1:]
    boxes = regions(width, height, levels).tolist()
    return torch.stack([activation[:, y : y + h, x : x + w].amax((1, 2)) for x, y, w, h in boxes])


def loop_descriptor(activation: torch.Tensor, levels: int, whitening: Whitening) -> torch.Tensor:
    """The descriptor, one region after the other."""
    height, width = activation.shape[1:]
    total = torch.zeros(whitening.matrix.shape[1], device=activation.device)
    for x, y, w, h in regions(width, height, levels).tolist():
        row = F.normalize(activation[:, y : y + h, x : x + w].amax((1, 2)), dim=0)
        total += F.normalize((row - whitening.mean) @ whitening.matrix, dim=0)
    return F.normalize(total, dim=0)


def taken(call: Callable[[], torch.Tensor], device: torch.device) -> float:
    """Seconds of one call, its work on the device included."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@torch.inference_mode()
def main(args: Namespace) -> None:
    """Time both and print the table."""
    device, generator = torch.device(args.device), torch.Generator().manual_seed(0)
    maps = torch.rand(1, args.channels, *args.size, generator=generator).to(device)
    activation = maps.contiguous(memory_format=torch.channels_last)[0]
    matrix = torch.randn(args.channels, min(PCA_DIM, args.channels), generator=generator)
    whitening = Whitening(torch.rand(args.channels, generator=generator).to(device), matrix.to(device))
    planes = activation.contiguous()
    ways = {
        "maxima, loop": lambda: loop_pool(activation, args.levels),
        "maxima, loop planes": lambda: loop_pool(planes, args.levels),
        "maxima, ours": lambda: pool_regions(activation, args.levels),
        "descriptor, loop": lambda: loop_descriptor(activation, args.levels, whitening),
        "descriptor, ours": lambda: rmac(region_descriptors(activation, args.levels), whitening),
    }
    torch.testing.assert_close(ways["maxima, ours"](), ways["maxima, loop"](), rtol=0, atol=0)
    torch.testing.assert_close(ways["descriptor, ours"](), ways["descriptor, loop"](), rtol=1e-3, atol=1e-5)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            seconds[name].append(taken(way, device))
    count = len(regions(args.size[1], args.size[0], args.levels))
    shape = " x ".join(map(str, activation.shape))
    print(f"map {shape} on {device}, {count} regions, minimum of {args.rounds}")
    print(f"{'way':<20}{'ms':>9}{'ratio':>8}")
    for name, times in seconds.items():
        ratio = min(seconds[f"{name.split(',')[0]}, loop"]) / min(times)
        print(f"{name:<20}{1000 * min(times):>9.3f}{ratio:>8.1f}")


if __name__ == "__main__":
    main(get_parser().parse_args())
