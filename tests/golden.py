"""The golden run: digests of what DeepCluster computes on a CPU, to compare two versions of this repository.

    python tests/golden.py                                  check this checkout against tests/golden.json
    python tests/golden.py --root ../other --out other.json the digests of another checkout
    python tests/golden.py --record                         write tests/golden.json
    python tests/golden.py --v1                             check against what version 0.1 computed

Every case is a command line of main.py with the tiny network of the tests, in a process of its own with one
thread: k-means, PIC, half an epoch a clustering, float16 features, released sampling, shards, a run that is
resumed in the middle of an epoch, and two processes with distributed k-means. The last bits of a convolution
depend on the processor and on the libraries, so digests are comparable only between runs on one machine;
golden.json says what its machine was. --v1 lifts the limit that changed these runs since, that of whitened
dimensions by the number of images (clustering.most_dimensions), and compares with the digests of the code
before it was re-laid, in files/v1/golden.json.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
RECORDED, OF_V1 = HERE / "golden.json", HERE / "files" / "v1" / "golden.json"
CROPS = 60  # of six photographs
COMMON = (
    "--arch tiny --sobel --image-size 32 --k 8 --batch 16 --workers 0 --device cpu --lr 0.02 --epochs 3 "
    "--checkpoints 3 --no-report"
)
CASES = {
    "kmeans": "",
    "pic": "--clustering PIC",
    "reassign": "--reassign 0.5",
    "float16": "--feature-dtype float16",
    "released": "--sampling released",
    "shards": "",
    "resumed": "",
    "two": "--kmeans distributed --sync-bn",
}
LOGGED = (
    "epoch", "iteration", "loss", "loss_over_log_k", "clustering_loss", "pca_dims", "clusters",
    "nmi_previous", "ami_previous", "nmi_classes", "ami_classes",
)  # fmt: skip


def write_crops(folder: Path, pictures: Path) -> Path:
    """folder/<photograph>/<number>.png: ten crops of 48 pixels of each of six photographs."""
    for path in sorted(pictures.glob("*.jpg"))[:6]:
        (folder / path.stem).mkdir(parents=True)
        with Image.open(path) as picture:
            width, height = picture.size[0] - 48, picture.size[1] - 48
            for i in range(CROPS // 6):
                left, top = i * 37 % width, i * 53 % height
                crop = picture.convert("RGB").crop((left, top, left + 48, top + 48))
                crop.save(folder / path.stem / f"{i:02d}.png")
    return folder


def run_case(name: str, root: Path, images: Path, exp: Path) -> None:
    """The command line, or lines, of a case; its files lie in exp."""
    flags = [*COMMON.split(), *CASES[name].split(), "--exp", str(exp)]
    source = [str(images)]
    launcher = [sys.executable]
    if name == "two":
        launcher += "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    if name == "shards":
        pattern = images.parent / "crops-%06d.tar"
        make = [sys.executable, "-m", "tools.make_shards", str(images), str(pattern), "--size-mb", "0.1"]
        call(make, root)
        source = ["--shards", str(images.parent / "crops-*.tar")]
    program = [*launcher, "-m", "tests.tiny"]
    if name == "resumed":  # two epochs, then from the middle of the second one
        call([*program, *source, *flags, "--epochs", "2"], root)
        flags += ["--resume", str(exp / "checkpoints" / "checkpoint_2.pth.tar")]
    call([*program, *source, *flags], root)


def call(command: list[str], root: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def digest(*parts: bytes) -> str:
    """The first 16 hex digits of a SHA-256."""
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def of_tensors(state: dict[str, torch.Tensor]) -> str:
    """Names, shapes and bits of a state dict, in the order of the names."""
    parts = [f"{name} {tuple(value.shape)}".encode() + bits(value) for name, value in sorted(state.items())]
    return digest(*parts)


def bits(value: torch.Tensor) -> bytes:
    return np.ascontiguousarray(value.numpy()).tobytes()


def digests(exp: Path) -> dict[str, str]:
    """Weights, momentum, the network that was clustered, `clusters`, the list of assignments, the log."""
    saved = torch.load(exp / "checkpoint.pth.tar", weights_only=True)
    clustered = torch.load(exp / "clustering.pth.tar", weights_only=True)
    momentum = [state["momentum_buffer"] for _, state in sorted(saved["optimizer"]["state"].items())]
    log = [json.loads(line) for line in (exp / "log.jsonl").read_text().splitlines()]
    log = [[[name, record.get(name)] for name in LOGGED] for record in log]
    return {
        "weights": of_tensors(saved["state_dict"]),
        "momentum": digest(*map(bits, momentum)),
        "clustered network": of_tensors(clustered["state_dict"]),
        "clusters": digest((exp / "clusters").read_bytes()),
        "assignments.csv": digest((exp / "assignments.csv").read_bytes()),
        "log": digest(json.dumps(log, sort_keys=True).encode()),
    }


def machine() -> dict[str, str]:
    """What the bits depend on besides this repository."""
    return {
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "amx": str(bool(torch.cpu.get_capabilities().get("amx_bf16", False))),
        "vendor": processor(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }


def processor() -> str:
    """The model name of the processor, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def golden(root: Path, cases: list[str]) -> dict[str, dict[str, str]]:
    """{case: its digests} of the checkout at root."""
    folder = Path(tempfile.mkdtemp(prefix="golden"))
    try:
        images = write_crops(folder / "crops", root / "demo" / "pictures")
        found = {}
        for name in cases:
            run_case(name, root, images, folder / name)
            found[name] = digests(folder / name)
            print(name, " ".join(found[name].values()), flush=True)
        return found
    finally:
        shutil.rmtree(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description="Digests of what DeepCluster computes on a CPU")
    parser.add_argument("--root", type=Path, default=HERE.parent, help="the checkout to run")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--out", type=Path, help="write the digests there and compare with nothing")
    parser.add_argument("--record", action="store_true", help=f"write them to tests/{RECORDED.name}")
    parser.add_argument("--v1", action="store_true", help="compare with version 0.1")
    args = parser.parse_args()
    if args.v1:
        os.environ["WHITEN_ALL"] = "1"  # tests/tiny.py
    found = {"machine": machine(), "cases": golden(args.root.resolve(), args.cases)}
    target = RECORDED if args.record else args.out
    if target:
        target.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    recorded = json.loads((OF_V1 if args.v1 else RECORDED).read_text())
    if recorded["machine"] != found["machine"]:
        print(f"recorded on another machine: {recorded['machine']}, this is {found['machine']}")
    differ = [
        f"{case}: {what}"
        for case, values in found["cases"].items()
        for what, value in values.items()
        if recorded["cases"][case][what] != value
    ]
    print("\n".join(f"differs: {line}" for line in differ) or "equal, bit for bit")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
