"""How much memory do extraction, PCA-whitening and L2 take beside the features themselves?

    python benchmarks/memory.py [--images 50000]

Features of 4096 units of N images by a small network through `features.extract_features`, then
`clustering.preprocess`, in a process of its own for each dtype. Printed: growth of the peak resident memory
over what the process held before (libraries and network loaded), in units of N * 4096 * 4 bytes. The plain
way holds the float32 features, Faiss's copy of them and the result: 2.1 units.
Goals: at most 1.25 with float32 features, at most 0.7 with float16 ones. Linux only.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import clustering
from features import Pass, extract_features
from models.flat import conv_block, flat

GOALS = {"float32": 1.25, "float16": 0.7}
FEATURE, FEATURE_DIM = "fc7.pre", 4096


def memory(name: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


class Noise(Dataset):
    """Images of 8 x 8 pixels that lie nowhere, as a view of the data has them."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        generator = torch.Generator().manual_seed(i)
        return torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=generator), i


def measure(dtype: str, count: int) -> None:
    classifier = [nn.Linear(16 * 16, FEATURE_DIM), nn.ReLU(), nn.Linear(FEATURE_DIM, FEATURE_DIM), nn.ReLU()]
    net = flat("small", conv_block(3, 16, kernel=3, padding=1), classifier, 4, False, 0)
    # Directions of very different variance, as features have, and not a sphere.
    with torch.no_grad():
        net.get_submodule("classifier.2").weight.mul_(torch.logspace(2, 0, FEATURE_DIM)[:, None])
    how = Pass(256, 0, torch.device("cpu"))
    extract_features(net, FEATURE, Noise(512), how)  # libraries warm up
    clustering.preprocess(np.random.default_rng(0).standard_normal((600, 512), np.float32))
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = memory("VmRSS")
    rows, _ = extract_features(net, FEATURE, Noise(count), how, dtype=getattr(np, dtype))
    extracted = memory("VmHWM") - before
    _, x = clustering.preprocess(rows)
    unit = count * FEATURE_DIM * 4
    peak = (memory("VmHWM") - before) / unit
    goal = GOALS[dtype]
    print(
        f"{dtype:<8} extraction {extracted / unit:.3f}  with PCA and L2 {peak:.3f}  (goal {goal}: "
        f"{'met' if peak <= goal else 'missed'})  -> {x.shape[0]} x {x.shape[1]}",
        flush=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=50000)
    parser.add_argument("--dtype", choices=list(GOALS), help="measure only this one, in this process")
    args = parser.parse_args()
    if args.dtype:
        measure(args.dtype, args.images)
    else:
        print(f"N = {args.images}, D = {FEATURE_DIM}: peak memory in units of N * D * 4 bytes", flush=True)
        for name in GOALS:
            command = [sys.executable, __file__, "--images", str(args.images), "--dtype", name]
            subprocess.run(command, check=True)
