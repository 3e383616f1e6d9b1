"""How much memory do extraction, PCA-whitening and L2 take beside the features themselves?

    python benchmarks/memory.py [--images 50000]

Features of 4096 units of N images by a small network through `features.extract_features`, then
`clustering.preprocess`, in a process of its own for each dtype. Printed: growth of the peak resident memory
over what the process held before (libraries and network loaded), in units of N * 4096 * 4 bytes. The plain
way holds the float32 features, Faiss's copy of them and the result: 2.1 units.
Goals: at most 1.25 with float32 features, below 0.65 with float16 ones. Linux only.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models.trunk import FEATURE, FEATURE_DIM, DeepClusterNet, conv_block

import clustering
import features

GOALS = {"float32": 1.25, "float16": 0.65}
BATCH = 256


def memory(name: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def batches(count: int):
    generator = torch.Generator().manual_seed(0)
    for start in range(0, count, BATCH):
        index = torch.arange(start, min(start + BATCH, count))
        yield torch.randint(0, 256, (len(index), 3, 8, 8), dtype=torch.uint8, generator=generator), index


def measure(dtype: str, count: int) -> None:
    classifier = [nn.Linear(16 * 16, FEATURE_DIM), nn.ReLU(), nn.Linear(FEATURE_DIM, FEATURE_DIM), nn.ReLU()]
    net = DeepClusterNet("small", conv_block(3, 16, 3, padding=1), classifier, 4, sobel=False, seed=0)
    # Directions of very different variance, as features have, and not a sphere.
    with torch.no_grad():
        net.classifier[2].weight.mul_(torch.logspace(2, 0, FEATURE_DIM)[:, None])
    device = torch.device("cpu")
    features.extract_features(net, batches(2 * BATCH), FEATURE, 2 * BATCH, device)  # libraries warm up
    clustering.preprocess(np.random.default_rng(0).standard_normal((600, 512), np.float32))
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = memory("VmRSS")
    rows, _ = features.extract_features(
        net, batches(count), FEATURE, count, device, dtype=np.dtype(dtype), progress=None
    )
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
