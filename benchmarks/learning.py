"""What does each method learn in the same number of minutes, next to the random network and to raw pixels?

    python benchmarks/learning.py demo_images --exp runs/learning
    python benchmarks/learning.py small/animals --methods swav deepclusterv2 --networks resnet18 --minutes 5
    python benchmarks/learning.py demo_images small/animals --exp runs/learning --write docs/results.md

A set is a folder with train/ and val/ and class sub-folders (demo.py and tools/make_small_set.py make some).
Every method trains every network on the pictures of train/, once a seed, by its own script and the recipe in
this file. A first run of one epoch tells how many epochs fit into --minutes; all seeds take as many. The
networks are judged on val/, which they did not see: weighted kNN against train/, a linear classifier
(logistic regression on standardised features of train/), and k-means of val/ with as many clusters as
classes. So are the random network each of them started from, that network once its batch norms have seen the
pictures of train/ (nothing else changed), and the pixels themselves. What is done is not done again: stop it
and call it again.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from commandline import Parser, add_machine, at_least, positive

CROPS = "--nmb_crops 2 --min_scale_crops 0.3 --max_scale_crops 1 --blur 0"
HEAD = "--hidden_mlp 512 --batch_size 64 --no-larc --base_lr 0.1 --final_lr 0.001 --warmup_epochs 0"
TWO_LEVEL = "--lr 0.01 --wd 0.00001 --batch_size 64 --reassignment 1"
# method -> script, its flags, the flag of the number of epochs. {size}: pixels, {k}: Subject.k.
RECIPES = {
    "deepcluster": ("main.py", "--image-size {size} --k {k} --lr 0.01 --batch 64", "--epochs"),
    "pic": ("main.py", "--image-size {size} --clustering PIC --lr 0.01 --batch 64", "--epochs"),
    "deepclusterv2": (
        "main_deepclusterv2.py",
        f"--size_crops {{size}} {CROPS} {HEAD} --jitter_strength 0.4 --nmb_prototypes {{k}} {{k}} {{k}}",
        "--epochs",
    ),
    "swav": (
        "main_swav.py",
        f"--size_crops {{size}} {CROPS} {HEAD} --jitter_strength 0 --nmb_prototypes 40"
        " --freeze_prototypes_niters 62",
        "--epochs",
    ),
    "deepercluster": (
        "main_deepercluster.py",
        f"--image-size {{size}} {TWO_LEVEL} --super_classes 8 --k {{k}} --dim_pca 256",
        "--nepochs",
    ),
    "rotnet": (
        "main_deepercluster.py",
        f"--image-size {{size}} {TWO_LEVEL} --super_classes 4 --k 1",
        "--nepochs",
    ),
}
# What one network wants otherwise: (method, architecture) -> flags that win over the recipe's.
SMALL_CROPS = "--size_crops 20 --min_scale_crops 0.4 --jitter_strength 0"
OTHERWISE = {("deepclusterv2", "resnet18s"): SMALL_CROPS, ("swav", "resnet18s"): SMALL_CROPS}
NETWORKS = {"alexnet": "conv5", "resnet18": "avgpool"}  # and the layer that is judged
LARGEST = 224  # pixels of a picture that is larger
SMALL = 48  # pixels: below, AlexNet's maps vanish and ResNet-18 takes its small stem
FIGURES_FILE = "figures.json"
TURNS = ("deepercluster", "rotnet")  # methods whose head tells turns; also judged by that
FIGURES = ("kNN", "linear", "NMI", "AMI")


def get_parser() -> Parser:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("sets", nargs="+", metavar="DIR", help="folders with train/ and val/")
    parser.add_argument("--methods", nargs="+", choices=RECIPES, default=list(RECIPES), help="(default: all)")
    parser.add_argument(
        "--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="(default: both)"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=at_least(0), default=[31, 32, 33], help="(default: 31 32 33)"
    )
    parser.add_argument("--minutes", type=positive, default=5, help="of training, each method and seed")
    parser.add_argument("--exp", default="exp_learning", help="folder of the runs (default: exp_learning)")
    parser.add_argument("--write", metavar="FILE", help="put the tables into this Markdown file")
    parser.add_argument(
        "--k-nearest", type=at_least(1), default=10, help="neighbours that vote (default: 10)"
    )
    add_machine(parser.add_argument_group("machine"))
    return parser


if __name__ == "__main__":
    ARGS = get_parser().parse_args()  # before the imports that take seconds

import itertools
import json
import subprocess
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from data import PlainView, central_crop, make_loader, to_input, turned
from eval_knn import Pixels
from evaluation.knn import cluster_figures, knn_accuracies, nearest, unit_features
from evaluation.labelled import open_train_val
from features import Pass
from models.inputs import Inputs
from models.network import Network
from models.weights import load
from util import Log, Progress, UserError, atomic_write, choose_device, run_main, write_json

ROOT = Path(__file__).resolve().parent.parent
PIXELS, RANDOM, ADAPTED = "pixels", "random network", "the same, batch norms adapted"
TEMPERATURE = 0.07  # of the neighbours' votes
STEPS = 200  # of the linear classifier, at most


@dataclass
class Subject:
    """One network on one set: what all its runs share."""

    folder: str
    train: PlainView
    val: PlainView
    network: str  # its name in NETWORKS
    arch: str  # the architecture that stands for it at this size
    size: int  # pixels
    exp: Path  # folder of its runs
    machine: list[str]  # the scripts' flags

    @property
    def name(self) -> str:
        return Path(self.folder).resolve().name

    @property
    def layer(self) -> str:
        return NETWORKS[self.network]

    @property
    def classes(self) -> int:
        return len(self.train.images.class_names)

    @property
    def k(self) -> int:
        """Ten clusters a class, of five images or more."""
        return min(10 * self.classes, len(self.train.images) // 5)


def main(args: argparse.Namespace) -> list[dict]:
    """Run and judge what is not there yet, print the tables; returns the figures, a dict a row and seed."""
    how = Pass(256, args.workers, choose_device(args.device), args.precision)
    machine = ["--workers", str(args.workers), "--precision", args.precision]
    machine += ["--device", args.device] if args.device else []
    log, all_rows = Log(), []
    for folder in args.sets:
        for network in args.networks:
            subject = open_subject(folder, network, Path(args.exp), machine)
            rows = []
            plain = [(PIXELS, args.seeds[0]), *itertools.product((RANDOM, ADAPTED), args.seeds)]
            for name, seed in plain:  # pixels know of no seed
                kept = subject.exp / name.replace(" ", "_") / f"{seed}.json"
                rows.append(judged(kept, name, "", subject, how, args.k_nearest, seed))
            for method in args.methods:
                epochs = how_many_epochs(method, subject, args.minutes, args.seeds[0], log)
                for seed in args.seeds:
                    exp = subject.exp / method / str(seed)
                    if not (exp / FIGURES_FILE).exists():
                        log(f"{subject.name}: {network} by {method}, seed {seed}, {epochs} epochs")
                        train(method, subject, epochs, exp, seed)
                    model = f"{exp}/checkpoint.pth.tar"
                    row = judged(exp / FIGURES_FILE, method, model, subject, how, args.k_nearest, seed)
                    rows.append(row | {"epochs": epochs, "minutes": minutes(exp)})
            title = f"{subject.name}: {subject.arch}, {subject.layer}, {subject.size} pixels"
            lines = [f"**{title}, {args.minutes:g} minutes of training**", "", *table(rows)]
            log("\n".join(lines))
            if args.write:
                write_between(Path(args.write), f"learning {subject.name} {network}", lines)
            all_rows += rows
    return all_rows


def open_subject(folder: str, network: str, exp: Path, machine: list[str]) -> Subject:
    """The set in a folder, for a network; its size is the shorter side of the smallest of some pictures."""
    splits = open_train_val(folder, 0, exp / "bad_images.txt")
    some = range(0, len(splits[0]), max(1, len(splits[0]) // 50))
    size = min(LARGEST, *(min(splits[0].decode(i).shape[-2:]) for i in some))
    arch = network
    if network == "resnet18" and size < SMALL:
        arch = "resnet18s"
    elif size < SMALL:
        size = 64
    train, val = (PlainView(images, central_crop(size)) for images in splits)
    where = exp / Path(folder).resolve().name / network
    return Subject(folder, train, val, network, arch, size, where, machine)


# ---------------------------------------------------------------------------------------- training


def command(method: str, subject: Subject, epochs: int) -> list[str]:
    """The method's script with its recipe for this network and set, but for --exp and --seed."""
    script, flags, of_epochs = RECIPES[method]
    flags = f"{flags} {OTHERWISE.get((method, subject.arch), '')}"
    flags = flags.format(size=subject.size, k=subject.k).split()
    images = f"{subject.folder}/train"
    return [
        script,
        images,
        "--arch",
        subject.arch,
        *flags,
        of_epochs,
        str(epochs),
        "--no-report",
        *subject.machine,
    ]


def train(method: str, subject: Subject, epochs: int, exp: Path, seed: int) -> None:
    """Run the method's script into `exp`, or go on there. Raises UserError when it fails."""
    exp.mkdir(parents=True, exist_ok=True)
    script, *flags = command(method, subject, epochs)
    call = [
        sys.executable,
        str(ROOT / script),
        *flags,
        "--exp",
        str(exp),
        "--seed",
        str(seed),
        "--resume",
        "auto",
    ]
    with open(exp / "output.txt", "a") as output:
        output.write(" ".join(call) + "\n")
        output.flush()
        if subprocess.run(call, stdout=output, stderr=subprocess.STDOUT, check=False).returncode:
            raise UserError(f"{script} failed, see {exp}/output.txt")


def how_many_epochs(method: str, subject: Subject, budget: float, seed: int, log: Log) -> int:
    """How many epochs of a method fit into the budget (minutes), at least one; by a run of one epoch.

    What it found stands in epochs.json, and is taken from there: all seeds train equally long.
    """
    kept = subject.exp / method / "epochs.json"
    if not kept.exists():
        log(f"{subject.name}: {subject.network} by {method}, one epoch to see what it takes")
        timed = kept.parent / "one_epoch"
        train(method, subject, 1, timed, seed)
        write_json(kept, {"minutes an epoch": minutes(timed), "epochs": max(1, int(budget / minutes(timed)))})
    return json.loads(kept.read_text())["epochs"]


def minutes(exp: Path) -> float:
    """What a run's epochs took, clustering and training."""
    lines = (exp / "log.jsonl").read_text().splitlines()
    return sum(json.loads(line)["seconds"]["total"] for line in lines) / 60


# ---------------------------------------------------------------------------------------- judging


def judged(kept: Path, name: str, model: str, subject: Subject, how: Pass, k: int, seed: int) -> dict:
    """The figures of one network, from the file `kept` where they are there; model: a method's checkpoint."""
    if not kept.exists():
        layer, net = subject.layer, Pixels(Inputs())
        if name != PIXELS:
            net = load(model or f"random:{subject.arch}", [layer], seed)
        net.to(how.device, memory_format=torch.channels_last)
        if name == ADAPTED:
            adapt(net, subject.train, how)
        kept.parent.mkdir(parents=True, exist_ok=True)
        turns = {"turns": turns_told(net, subject.val, how)} if name in TURNS else {}
        write_json(kept, figures(net, subject, how, k, seed) | turns)
    return {"network": name, "seed": seed} | json.loads(kept.read_text())


def adapt(net: Network, view: PlainView, how: Pass) -> None:
    """Let the statistics of the network's batch norms be those of the view's images; nothing else changes."""
    norms = [m for m in net.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    net.train()
    loader = make_loader(view, how.batch, how.workers, how.device, sampler=spread(len(view)))
    with torch.no_grad():
        for number, batch in enumerate(loader, 1):
            for norm in norms:
                norm.momentum = 1 / number  # the mean over batches, each counting as much
            net.activations(to_input(batch.views, how.device), [net.feature])  # behind all batch norms
    net.eval()


def spread(count: int) -> list[int]:
    """All indexes, shuffled, so that a batch holds images of all classes: folders lie one after another."""
    return np.random.default_rng(0).permutation(count).tolist()


def figures(net: Network | Pixels, subject: Subject, how: Pass, k: int, seed: int) -> dict[str, float]:
    """kNN accuracy, the linear classifier's accuracy, NMI and AMI, all on val/."""
    found = {}
    for split, view in (("train", subject.train), ("val", subject.val)):
        features, broken = unit_features(net, [subject.layer], view, how, Progress(len(view), split))
        if broken:
            raise UserError(f"{view.images.path(broken[0])}: cannot be decoded; take it out of the set")
        found[split] = features[subject.layer][0]
    classes = {"train": subject.train.images.classes, "val": subject.val.images.classes}
    near = nearest(found["val"], found["train"], k, how.device)
    knn = knn_accuracies(*near, classes["train"], classes["val"], [k], TEMPERATURE)
    clusters = cluster_figures(found["val"], classes["val"], subject.classes, seed, how.device)
    return {
        "kNN": next(iter(knn.values())),
        "linear": linear_accuracy(found["train"], classes["train"], found["val"], classes["val"]),
        "NMI": clusters["nmi"],
        "AMI": clusters["ami"],
    }


def turns_told(net: Network, view: PlainView, how: Pass) -> float:
    """How many of the view's images, in each of four turns, have their turn told by the head; chance is 0.25.

    The head's outputs are super-classes, four turns of one super-cluster after the other.
    """
    right = shown = 0
    for batch in make_loader(view, how.batch, how.workers, how.device):
        for turns in range(4):
            x = to_input(turned(batch.views, turns), how.device, net.inputs.mean, net.inputs.std)
            with torch.inference_mode():
                told = net.activations(x, ["logits"])["logits"].argmax(1) % 4
            right, shown = right + int((told == turns).sum()), shown + len(told)
    return right / shown


def linear_accuracy(x: np.ndarray, y: np.ndarray, x_val: np.ndarray, y_val: np.ndarray) -> float:
    """Accuracy on val of scikit-learn's logistic regression on the standardised features of train."""
    scale = StandardScaler().fit(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # by then accuracy has long stopped changing
        model = LogisticRegression(C=0.01, max_iter=STEPS).fit(scale.transform(x), y)
    return float((model.predict(scale.transform(x_val)) == y_val).mean())


# ---------------------------------------------------------------------------------------- what is printed


def table(rows: list[dict]) -> list[str]:
    """Lines of a Markdown table: mean and range over seeds, and the mean's gain over the random network's."""
    lines = ["| | epochs, minutes | " + " | ".join(FIGURES) + " |", "| --- " * (2 + len(FIGURES)) + "|"]
    names = list(dict.fromkeys(row["network"] for row in rows))
    start = {f: np.mean([row[f] for row in rows if row["network"] == RANDOM]) for f in FIGURES}
    for name in names:
        mine = [row for row in rows if row["network"] == name]
        cells = []
        for figure in FIGURES:
            values = [row[figure] for row in mine]
            cell = f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"
            if name not in (PIXELS, RANDOM):
                cell += f" {np.mean(values) - start[figure]:+.3f}"
            cells.append(cell)
        took = "-"
        if "epochs" in mine[0]:
            took = f"{mine[0]['epochs']}, {np.mean([row['minutes'] for row in mine]):.1f}"
        lines.append(f"| {name} | {took} | " + " | ".join(cells) + " |")
    for name in TURNS:
        told = [row["turns"] for row in rows if row["network"] == name]
        if told:
            spread = f"{np.mean(told):.3f} ({min(told):.3f} to {max(told):.3f})"
            lines += ["", f"Turns told by {name}: {spread}, chance 0.25."]
    return lines


def write_between(path: Path, name: str, lines: list[str]) -> None:
    """Replace what stands between the two markers of `name` in a Markdown file, or add both at its end."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    text = path.read_text(encoding="utf-8")
    block = "\n".join([begin, *lines, end])
    if begin in text:
        before, rest = text.split(begin, 1)
        text = before + block + rest.split(end, 1)[1]
    else:
        text = text.rstrip("\n") + "\n\n" + block + "\n"
    with atomic_write(path) as file:
        file.write(text)


if __name__ == "__main__":
    run_main(main, ARGS)
