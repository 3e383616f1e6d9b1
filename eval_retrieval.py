"""Instance retrieval on Oxford5k and Paris6k: R-MAC descriptors, mean average precision.

    python eval_retrieval.py --datasets DATASETS --eval Oxford --model exp/checkpoint.pth.tar --exp exp
    python eval_retrieval.py --datasets DATASETS --eval Paris --model pretrained --exp exp
    python eval_retrieval.py ... --gnd gnd_roxford5k.pkl               the revisited protocol too (70 queries)

DATASETS holds Oxford/ and Paris/, each with jpg/ (the images) and lab/ (the ground truth). One call does the
five stages, or --stage names one of them; what is finished is kept in --temp and not computed again:

    extract_train  regions of every image of the other data set      Paris_regions.npy   (for --eval Oxford)
    train_pca      their PCA-whitening                               Paris_pca.npz
    db_features    a descriptor for every image                      Oxford_database.npy
    q_features     a descriptor for every query                      Oxford_queries.npy
    eval           rank, score                                       EXP/results.json

Beside every .npy (float32) stands a .json with its settings, the names of the images and their row counts.

Descriptor and regions: Tolias, Sicre, Jegou, 'Particular object retrieval with integral max-pooling of CNN
activations', ICLR 2016. Average precision: the program of the Oxford group (Philbin et al., CVPR 2007).
"""

import argparse
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ground_truth import Query, check_known, list_database, read_queries, read_revisited
from ranking import REVISITED, rank, score
from rmac import PCA_DIM, Whitening, fit_whitening, region_descriptors, rmac
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.models import VGG16_Weights, vgg16
from torchvision.transforms.v2 import functional

import data
import evaluation
from features import fold_batch_norm, set_precision
from util import (
    Log,
    Progress,
    UserError,
    add_device_argument,
    atomic_write,
    choose_device,
    make_folder,
    run_main,
    write_json,
)

OTHER = {"Oxford": "Paris", "Paris": "Oxford"}  # the PCA is learnt on the other city
STAGES = ("extract_train", "train_pca", "db_features", "q_features", "eval")
PRETRAINED = "pretrained"
SCALES = (1.0, 2**-0.5, 0.5)  # --multires, as Radenovic, Tolias, Chum, TPAMI 2019, section 5.2
SMALLEST_SIDE = 16  # pixels: what the convolutions need; a smaller view is padded

# mAP in percent of a VGG-16 in the paper's table of instance retrieval: from memory, unverified.
PUBLISHED = {
    "Oxford": {"DeepCluster": 61.0, "ImageNet labels": 72.4, "random": 6.9},
    "Paris": {"DeepCluster": 72.0, "ImageNet labels": 81.5, "random": 22.0},
}


def get_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="eval_retrieval.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    group = parser.add_argument_group("what")
    group.add_argument(
        "--model",
        metavar="PATH",
        default=None,
        help="checkpoint (ours or the authors'), or 'pretrained' for torchvision's supervised VGG-16",
    )
    group.add_argument(
        "--eval", choices=list(OTHER), default="Oxford", help="data set to score (default: Oxford)"
    )
    group.add_argument("--stage", choices=(*STAGES, "all"), default="all", help="default: all")
    group.add_argument("--datasets", metavar="DIR", default=None, help="folder that holds Oxford/ and Paris/")
    group.add_argument("--oxford", metavar="DIR", default=None, help="default: DATASETS/Oxford")
    group.add_argument("--paris", metavar="DIR", default=None, help="default: DATASETS/Paris")
    group.add_argument(
        "--gnd",
        metavar="PKL",
        default=None,
        help="gnd_roxford5k.pkl or gnd_rparis6k.pkl: also score by the revisited protocol (easy, medium, "
        "hard); DATASET/lab may then be missing",
    )

    group = parser.add_argument_group("descriptor")
    group.add_argument("--S", type=int, default=1024, help="longer side of an image, pixels (default: 1024)")
    group.add_argument("--L", type=int, default=3, help="levels of regions (default: 3)")
    group.add_argument(
        "--multires",
        action="store_true",
        help="sum the descriptors at three scales: S, S/sqrt(2) and S/2 (the PCA is learnt at S)",
    )

    group = parser.add_argument_group("search")
    group.add_argument(
        "--aqe",
        type=int,
        default=0,
        metavar="K",
        help="average query expansion: search again with the mean of the query and its K best (default: 0)",
    )
    group.add_argument(
        "--dbe",
        type=int,
        default=0,
        metavar="K",
        help="add to every image of the database its K nearest neighbours (default: 0)",
    )

    group = parser.add_argument_group("files and machine")
    group.add_argument("--exp", default="exp", metavar="EXP", help="folder for results.json (default: exp)")
    group.add_argument("--temp", default=None, help="folder for descriptors (default: EXP/retrieval)")
    group.add_argument("--workers", type=int, default=4, help="number of data loading workers (default: 4)")
    add_device_argument(group)
    return parser


def main(args: argparse.Namespace) -> dict[str, Any] | None:
    """Do the stages that are asked for; returns the results, where there is something to score."""
    check_arguments(args)
    run = Retrieval(args)
    stages = STAGES if args.stage == "all" else (args.stage,)
    run.check_inputs(stages)
    results = None
    for stage in stages:
        results = getattr(run, stage)()
    return results


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse values that cannot work, in one line each."""
    for name, smallest in (("S", SMALLEST_SIDE), ("L", 1), ("aqe", 0), ("dbe", 0), ("workers", 0)):
        if getattr(args, name) < smallest:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least {smallest}")


# ---------------------------------------------------------------------------------------- images


@dataclass(frozen=True)
class Item:
    """An image to describe: whole, or only its box (x min, y min, x max, y max) in pixels of the file."""

    path: Path
    box: tuple[float, float, float, float] | None = None


def resized_view(item: Item, image: torch.Tensor, size: int) -> torch.Tensor:
    """Bring the longer side of (3, H, W) uint8 to `size`, then cut out the box of a query, scaled alike."""
    height, width = image.shape[1:]
    factor = size / max(height, width)
    shape = [max(1, round(height * factor)), max(1, round(width * factor))]
    image = functional.resize(image, shape)  # bilinear
    if item.box is None:
        return image
    left, top, right, bottom = (round(value * factor) for value in item.box)
    left, top, right, bottom = max(left, 0), max(top, 0), min(right, shape[1]), min(bottom, shape[0])
    if left >= right or top >= bottom:
        raise data.ImageError(item.path, f"the box {item.box} of its query holds no pixel")
    return image[:, top:bottom, left:right]


class Views(Dataset):
    """Item i: (uint8 views (3, H, W) of items[i], one for each size, i). Raises ImageError."""

    def __init__(self, items: Sequence[Item], sizes: Sequence[int]):
        self.items, self.sizes = items, sizes

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[list[torch.Tensor], int]:
        item = self.items[i]
        image = data.decode(item.path)
        return [resized_view(item, image, size) for size in self.sizes], i


Trunk = Callable[[torch.Tensor], torch.Tensor]  # normalised images (1, 3, H, W) -> map (1, C, h, w)


def open_trunk(path: str, device: torch.device) -> Trunk:
    """The convolutions of a checkpoint or of torchvision's VGG-16 ('pretrained'), up to the last ReLU."""
    if path == PRETRAINED:
        return pretrained_vgg16().to(device, memory_format=torch.channels_last)
    net = evaluation.open_network(path, []).eval()
    layer = f"conv{net.num_convs}"
    folded = fold_batch_norm(net).to(device, memory_format=torch.channels_last)
    return lambda x: folded.activations(x, [layer])[layer]


@torch.inference_mode()
def activation(trunk: Trunk, view: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 view (3, H, W) -> map (C, h, w); a view below SMALLEST_SIDE is padded to the right and below."""
    x = data.normalise(view.to(device, non_blocking=True)[None])
    missing = [max(SMALLEST_SIDE - side, 0) for side in (x.shape[3], x.shape[2])]
    if any(missing):
        x = F.pad(x, (0, missing[0], 0, missing[1]))
    return trunk(x.contiguous(memory_format=torch.channels_last))[0]


def pretrained_vgg16() -> torch.nn.Module:
    """Torchvision's VGG-16 trained with ImageNet's labels, up to the last ReLU before the last pooling."""
    weights = VGG16_Weights.IMAGENET1K_V1
    try:
        net = vgg16(weights=weights, progress=False)
    except (OSError, RuntimeError, HTTPException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise UserError(
            f"--model {PRETRAINED}: torchvision's VGG-16 cannot be had here ({reason}); "
            f"put {weights.url} into {folder}, or give a checkpoint"
        ) from error
    return net.features[:-1].eval()


def model_digest(path: str) -> str:
    """What identifies the weights: the hex SHA-256 of the file."""
    if path == PRETRAINED:
        return str(VGG16_Weights.IMAGENET1K_V1)
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint file")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------- stores


class Store:
    """Rows of float32 for a list of names: NAME.npy and NAME.json, made image by image.

    Until all images are there each has its own file in NAME.parts/, so that a run that was killed goes on
    where it stopped. `settings` say what the rows depend on: those of other settings are refused.
    """

    def __init__(self, stem: Path):
        self.array_path, self.index_path = Path(f"{stem}.npy"), Path(f"{stem}.json")
        self.parts = Path(f"{stem}.parts")

    @property
    def finished(self) -> bool:
        return self.array_path.is_file() and self.index_path.is_file()

    def open(self, settings: dict[str, Any], names: list[str]) -> list[int]:
        """Get ready to take rows for these names; returns which images are still to be done."""
        self.settings, self.names = settings, names
        if self.finished:
            check_settings(self.index_path, read_json(self.index_path)["settings"], settings)
            return []
        mark = make_folder(self.parts) / "settings.json"
        if mark.is_file():
            check_settings(mark, read_json(mark), settings)
        else:
            write_json(mark, settings)
        return [i for i in range(len(names)) if not self._part(i).is_file()]

    def _part(self, i: int) -> Path:
        return self.parts / f"{i:06d}.npy"

    def put(self, i: int, rows: np.ndarray) -> None:
        """The rows (R, d) of image i, safely on the disk."""
        with atomic_write(self._part(i), "wb") as file:
            np.save(file, rows.astype(np.float32, copy=False))

    def close(self) -> None:
        """All images are there: write them as one array and its index, and drop the parts."""
        if not self.finished:
            parts = [np.load(self._part(i), allow_pickle=False) for i in range(len(self.names))]
            with atomic_write(self.array_path, "wb") as file:
                np.save(file, np.concatenate(parts))
            index = {"settings": self.settings, "names": self.names, "rows": [len(part) for part in parts]}
            write_json(self.index_path, index)
        shutil.rmtree(self.parts, ignore_errors=True)

    def load(self, stage: str) -> tuple[np.ndarray, dict[str, Any]]:
        """(rows (N, d) float32 as a memory map, index); `stage` is what makes them where they are missing."""
        if not self.finished:
            raise UserError(f"{self.array_path} is missing or not finished: run --stage {stage} first")
        try:
            rows = np.load(self.array_path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError) as error:
            raise UserError(f"{self.array_path}: not a .npy file ({error}); remove it") from error
        return rows, read_json(self.index_path)


def check_settings(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse what was computed with other settings; only those in `wanted` count."""
    for name, value in wanted.items():
        if found.get(name) != value:
            was, now = (f" {x}" if isinstance(x, int | float) else "" for x in (found.get(name), value))
            what = f"{name}{was}, now{now}" if was and now else f"another {name}"
            raise UserError(f"{path}: was made with {what}; use another --temp, or remove that file")


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not the index that this program writes; remove it")
    return content


def digest(content: Any) -> str:
    """Hex SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


# ---------------------------------------------------------------------------------------- the stages


class Retrieval:
    """The five stages; each opens what it needs and leaves its result in the folder `temp`."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = choose_device(args.device)
        self.precision = set_precision("fp32", self.device)
        self.temp = make_folder(args.temp or Path(args.exp) / "retrieval")
        self.log = Log(self.temp / "retrieval.log")

    # -- inputs

    def folder(self, city: str) -> Path:
        """Where a data set lies: --oxford, --paris, or inside --datasets."""
        named = {"Oxford": self.args.oxford, "Paris": self.args.paris}[city]
        if named is None and self.args.datasets is None:
            raise UserError(
                f"where is {city}? give --datasets DIR (it holds Oxford/ and Paris/) or --{city.lower()}"
            )
        folder = Path(named or Path(self.args.datasets) / city)
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder (expected {city}'s lab/ and jpg/ in it)")
        return folder

    @cached_property
    def database(self) -> dict[str, Path]:
        return list_database(self.folder(self.args.eval))

    @cached_property
    def other_database(self) -> dict[str, Path]:
        return list_database(self.folder(OTHER[self.args.eval]))

    @cached_property
    def queries(self) -> list[Query]:
        """The queries of lab/; none where only the revisited protocol is there."""
        folder = self.folder(self.args.eval)
        if self.args.gnd and not (folder / "lab").is_dir():
            return []
        return read_queries(folder, self.database)

    @cached_property
    def revisited(self) -> tuple[list[str], list[Query]]:
        """Database and queries of --gnd; empty without it."""
        return read_revisited(Path(self.args.gnd), self.database) if self.args.gnd else ([], [])

    @cached_property
    def trunk(self) -> Trunk:
        return open_trunk(self.args.model, self.device)

    @cached_property
    def trunk_settings(self) -> dict[str, Any]:
        """What the rows of every store depend on."""
        settings = {"S": self.args.S, "L": self.args.L}
        return settings | ({"model": model_digest(self.args.model)} if self.args.model else {})

    def check_inputs(self, stages: Sequence[str]) -> None:
        """Open everything that these stages read, so that a mistake shows before hours of work."""
        if not self.args.model and {"extract_train", "db_features", "q_features"} & set(stages):
            raise UserError("--model is missing: give a checkpoint, or 'pretrained' for torchvision's VGG-16")
        _ = self.trunk_settings
        if "extract_train" in stages:
            _ = self.other_database
        if "db_features" in stages:
            _ = self.database
        if {"q_features", "eval"} & set(stages):
            _ = self.queries, self.revisited

    def store(self, city: str, what: str) -> Store:
        return Store(self.temp / f"{city}_{what}")

    # -- stages

    def extract_train(self) -> None:
        """Region rows of every image of the other data set."""
        city, images = OTHER[self.args.eval], self.other_database
        settings = self.trunk_settings | {"data set": city, "images": digest(list(images))}
        items = [Item(path) for path in images.values()]

        def reduce(region_rows: list[torch.Tensor]) -> torch.Tensor:
            return region_rows[0]

        self.describe(city, "regions", settings, list(images), items, [self.args.S], reduce)

    def train_pca(self) -> None:
        """PCA-whitening of these rows: Paris_pca.npz with its settings beside it."""
        city = OTHER[self.args.eval]
        rows, index = self.store(city, "regions").load("extract_train")
        check_settings(self.store(city, "regions").index_path, index["settings"], self.trunk_settings)
        path, mark = self.temp / f"{city}_pca.npz", self.temp / f"{city}_pca.json"
        settings = {"dim": PCA_DIM, "regions": index["settings"]}
        if path.is_file() and mark.is_file() and read_json(mark) == settings:
            self.log(f"train_pca: {path} is there already")
            return
        mark.unlink(missing_ok=True)  # the old PCA is not valid while the new one is written
        mean, matrix = fit_whitening(rows)
        with atomic_write(path, "wb") as file:
            np.savez(file, mean=mean, matrix=matrix)
        write_json(mark, settings)
        self.log(
            f"train_pca: {len(mean)} to {matrix.shape[1]} dimensions, from {len(rows)} regions of {city}"
        )

    def load_pca(self) -> tuple[Whitening, dict[str, Any]]:
        """The PCA of the other data set, on the device, and its settings."""
        city = OTHER[self.args.eval]
        path, mark = self.temp / f"{city}_pca.npz", self.temp / f"{city}_pca.json"
        if not (path.is_file() and mark.is_file()):
            raise UserError(f"{path} is missing: run --stage train_pca first")
        settings = read_json(mark)
        check_settings(mark, settings.get("regions", {}), self.trunk_settings)
        with np.load(path, allow_pickle=False) as saved:
            mean, matrix = (torch.from_numpy(saved[key]).float() for key in ("mean", "matrix"))
        return Whitening(mean.to(self.device), matrix.to(self.device)), settings

    def db_features(self) -> None:
        """A descriptor for every image of the data set to score."""
        items = [Item(path) for path in self.database.values()]
        self.descriptors("database", list(self.database), items)

    def q_features(self) -> None:
        """A descriptor for every query: the part of its image inside its box."""
        for what, queries in (("queries", self.queries), ("revisited_queries", self.revisited[1])):
            if queries:
                items = [Item(self.database[query.image], query.box) for query in queries]
                self.descriptors(what, [query.name for query in queries], items)

    def descriptors(self, what: str, names: list[str], items: list[Item]) -> None:
        """R-MAC descriptors of `items` into the store `what`, at one scale or summed over three."""
        whitening, pca = self.load_pca()
        scales = SCALES if self.args.multires else SCALES[:1]
        images = digest([names, [(item.path.stem, item.box) for item in items]])
        settings = self.trunk_settings | {"scales": list(scales), "images": images, "PCA": digest(pca)}

        def reduce(region_rows: list[torch.Tensor]) -> torch.Tensor:
            total = torch.stack([rmac(rows, whitening) for rows in region_rows]).sum(dim=0)
            return F.normalize(total, dim=0)[None]

        sizes = [max(round(self.args.S * scale), 1) for scale in scales]
        self.describe(self.args.eval, what, settings, names, items, sizes, reduce)

    @torch.inference_mode()
    def describe(
        self,
        city: str,
        what: str,
        settings: dict[str, Any],
        names: list[str],
        items: list[Item],
        sizes: list[int],
        reduce: Callable[[list[torch.Tensor]], torch.Tensor],
    ) -> None:
        """Fill a store: for each item the region rows (R, C) at every size, reduced to its rows (n, d).

        One image a batch, for their sizes differ; workers decode and resize ahead.
        """
        store, label = self.store(city, what), f"{city} {what}"
        todo = store.open(settings, names)
        if len(todo) < len(items):
            self.log(f"{label}: {len(items) - len(todo)} of {len(items)} are there already")
        if todo:
            loader = DataLoader(
                Views([items[i] for i in todo], sizes),
                batch_size=None,
                num_workers=min(self.args.workers, len(todo)),
                pin_memory=self.device.type == "cuda",
                worker_init_fn=data.init_worker,
            )
            trunk, progress = self.trunk, Progress(len(todo), label, log=self.log)
            with self.precision:
                for views, i in loader:
                    maps = (activation(trunk, view, self.device) for view in views)
                    rows = reduce([region_descriptors(each, self.args.L) for each in maps])
                    store.put(todo[i], rows.cpu().numpy())
                    progress.update(1)
            progress.close()
        store.close()

    def load_descriptors(self, what: str, stage: str) -> tuple[np.ndarray, dict[str, Any]]:
        """Rows of a store of the data set to score, with the settings of this call."""
        store = self.store(self.args.eval, what)
        rows, index = store.load(stage)
        scales = list(SCALES if self.args.multires else SCALES[:1])
        check_settings(store.index_path, index["settings"], self.trunk_settings | {"scales": scales})
        return np.array(rows), index

    def eval(self) -> dict[str, Any]:
        """Rank the database for each query and score the rankings; prints and writes EXP/results.json."""
        database, index = self.load_descriptors("database", "db_features")
        place = {name: i for i, name in enumerate(index["names"])}
        results: dict[str, Any] = {}
        if self.queries:
            rankings = self.rankings("queries", self.queries, database, index, list(place))
            results["classic"] = score(self.queries, rankings, "classic")
        names, queries = self.revisited
        if queries:
            check_known(self.store(self.args.eval, "database").index_path, names, set(place))
            rows = database[[place[name] for name in names]]
            rankings = self.rankings("revisited_queries", queries, rows, index, names)
            results |= {protocol: score(queries, rankings, protocol) for protocol in REVISITED}
        self.report(results, index["settings"], len(database))
        return results

    def rankings(
        self, what: str, queries: list[Query], database: np.ndarray, index: dict[str, Any], names: list[str]
    ) -> list[list[str]]:
        """Names of the database (rows (N, d)), best first, for each query."""
        rows, query_index = self.load_descriptors(what, "q_features")
        path = self.store(self.args.eval, what).index_path
        check_settings(path, query_index["settings"], {"PCA": index["settings"]["PCA"]})
        check_settings(path, query_index["settings"], {"model": index["settings"]["model"]})
        if query_index["names"] != [query.name for query in queries]:
            raise UserError(f"{path}: made for other queries; remove it and run --stage q_features")
        orders = rank(rows, database, self.args.aqe, self.args.dbe)
        return [[names[i] for i in order] for order in orders]

    def report(self, results: dict[str, Any], settings: dict[str, Any], images: int) -> None:
        """The protocol, the figures and the published ones."""
        args = self.args
        protocol = {
            "data set": args.eval,
            "images": images,
            "queries": ", ".join(f"{name} {result['queries']}" for name, result in results.items()),
            "model": args.model or settings["model"][:12],
            "layer": "last convolution after its ReLU, frozen",
            "S": settings["S"],
            "L": settings["L"],
            "scales": " ".join(f"{scale:.3g}" for scale in settings["scales"]),
            "PCA": f"whitening {PCA_DIM} learnt on {OTHER[args.eval]}",
            "query expansion": args.aqe,
            "database expansion": args.dbe,
            "figures": "percent",
        }
        evaluation.report(args.exp, f"eval_retrieval_{args.eval}", protocol, results)
        for name, result in results.items():
            extra = "" if name == "classic" else f"  mP@10 {result['mP@10']:.2f}"
            self.log(f"{args.eval} {name}: mAP {result['mAP']:.2f}{extra}  ({result['queries']} queries)")
        published = ", ".join(f"{name} {value}" for name, value in PUBLISHED[args.eval].items())
        self.log(f"published, VGG-16, classic mAP (from memory, unverified): {published}")


if __name__ == "__main__":
    run_main(main, get_parser().parse_args())
