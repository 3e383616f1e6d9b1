"""Instance retrieval in five stages, each of which leaves its result in a folder for the next one.

Regions of the other city's images -> their PCA-whitening -> a descriptor an image -> one a query -> figures.
The rows of three of them are stores (evaluation/store.py): finished ones are not made again, unfinished ones
go on, and those of other settings or of images that were replaced since are refused.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from evaluation.ground_truth import Query
from evaluation.last_maps import Item, last_maps, stamps_digest
from evaluation.ranking import REVISITED, rank, score
from evaluation.rmac import (
    PCA_DIM,
    fit_whitening,
    read_whitening,
    region_descriptors,
    rmac,
    write_whitening,
)
from evaluation.store import Store, check_settings, load
from features import Pass, layer_shape
from models.network import Network
from util import Log, Progress, UserError

OTHER = {"Oxford": "Paris", "Paris": "Oxford"}  # the PCA is learnt on the other city
WAY_OUT = "use another --temp, or remove that file"


@dataclass(frozen=True)
class Setup:
    """What the stages work on, looked up and checked; what the asked-for stages do not read stays empty.

    settings: what the rows of every store depend on. queries: by what their store is called. names: the
    database of the revisited protocol.
    """

    city: str
    temp: Path
    log: Log
    how: Pass
    settings: dict[str, Any]
    scales: list[float]
    net: Network | None
    learning: dict[str, Path]  # name -> path of the images on which the PCA is learnt, the other city's
    database: dict[str, Path]
    queries: dict[str, list[Query]]
    names: list[str]
    aqe: int
    dbe: int

    def files(self, city: str, what: str) -> tuple[Path, Path]:
        """The rows of a store, and their index."""
        return self.temp / f"{city}_{what}.npy", self.temp / f"{city}_{what}.json"

    def pca(self) -> Path:
        return self.temp / f"{OTHER[self.city]}_pca.npz"


# ---------------------------------------------------------------------------------------- making rows


def extract_train(setup: Setup) -> None:
    """Region rows of every image of the other data set."""
    items = {name: Item(path) for name, path in setup.learning.items()}
    width = layer_shape(setup.net, setup.net.maps[-1], 64)[0]
    settings = setup.settings | images_settings(items)
    fill(setup, OTHER[setup.city], "regions", items, settings, setup.scales[:1], width, lambda rows: rows[0])


def train_pca(setup: Setup) -> None:
    """PCA-whitening of these rows, with their settings."""
    path, (rows, index) = setup.pca(), load_rows(setup, OTHER[setup.city], "regions", setup.settings)
    settings = {"dim": PCA_DIM, "regions": index["settings"]}
    if path.is_file() and read_whitening(path)[1] == settings:
        setup.log(f"train_pca: {path} is there already")
        return
    mean, matrix = fit_whitening(rows)
    write_whitening(path, mean, matrix, settings)
    setup.log(f"train_pca: {len(mean)} to {matrix.shape[1]} dimensions, from {len(rows)} regions")


def db_features(setup: Setup) -> None:
    """A descriptor for every image of the data set to score."""
    describe(setup, "database", {name: Item(path) for name, path in setup.database.items()})


def q_features(setup: Setup) -> None:
    """A descriptor for every query: the part of its image inside its box."""
    for what, queries in setup.queries.items():
        describe(setup, what, boxes(setup, queries))


def boxes(setup: Setup, queries: list[Query]) -> dict[str, Item]:
    return {query.name: Item(setup.database[query.image], query.box) for query in queries}


def describe(setup: Setup, what: str, items: dict[str, Item]) -> None:
    """R-MAC descriptors of items, at one scale or summed over three."""
    whitening, learnt = read_whitening(setup.pca())
    check_settings(setup.pca(), learnt["regions"], setup.settings, WAY_OUT)
    whitening = whitening.to(setup.how.device)
    settings = setup.settings | descriptor_settings(setup, items) | {"PCA": digest(learnt)}

    def reduce(region_rows: list[torch.Tensor]) -> torch.Tensor:
        total = torch.stack([rmac(rows, whitening) for rows in region_rows]).sum(dim=0)
        return F.normalize(total, dim=0)[None]

    width = whitening.matrix.shape[1]
    fill(setup, setup.city, what, items, settings, setup.scales, width, reduce)


def images_settings(items: dict[str, Item]) -> dict[str, Any]:
    """What tells the files of a store from others: names, boxes; sizes and times."""
    content = [(name, item.path.stem, item.box) for name, item in items.items()]
    state = stamps_digest(list(items.values()))
    return {"list of images": digest(content), "state of the images (sizes, times)": state}


def descriptor_settings(setup: Setup, items: dict[str, Item]) -> dict[str, Any]:
    return {"scales": setup.scales, **images_settings(items)}


def digest(content: Any) -> str:
    """Hex SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def fill(
    setup: Setup,
    city: str,
    what: str,
    items: dict[str, Item],
    settings: dict[str, Any],
    scales: Sequence[float],
    width: int,
    reduce: Callable[[list[torch.Tensor]], torch.Tensor],
) -> None:
    """Make a store, or the rest of it: region rows (R, C) of an item at every scale -> rows (n, width)."""
    (path, index), label = setup.files(city, what), f"{city} {what}"
    layer = setup.net.maps[-1]
    settings = settings | {"layer": layer}
    found = load(path, index, WAY_OUT)
    if found is not None:
        check_settings(index, found[1]["settings"], settings, WAY_OUT)
        setup.log(f"{label}: all {len(items)} are there already")
        return
    with Store(path, width, "float32", settings, WAY_OUT) as store:
        if store.done:
            setup.log(f"{label}: {store.done} of {len(items)} are there already")
        left = list(items.values())[store.done :]
        sizes = [max(round(setup.settings["S"] * scale), 1) for scale in scales]
        progress = Progress(len(left), label, log=setup.log)
        for maps in last_maps(setup.net, left, sizes, setup.how):
            rows = reduce([region_descriptors(each, setup.settings["L"]) for each in maps])
            store.append(rows.cpu().numpy())
            progress.update(1)
        progress.close()
        store.finish(index, names=list(items))


def load_rows(
    setup: Setup, city: str, what: str, wanted: dict[str, Any]
) -> tuple[np.ndarray, dict[str, Any]]:
    """(rows, index) of a finished store that was made with the settings `wanted`."""
    path, index = setup.files(city, what)
    found = load(path, index, WAY_OUT)
    if found is None:
        stage = {"regions": "extract_train", "database": "db_features"}.get(what, "q_features")
        raise UserError(f"{path} is missing or not finished: run --stage {stage} first")
    check_settings(index, found[1]["settings"], wanted, WAY_OUT)
    return found


# ---------------------------------------------------------------------------------------- scoring


def evaluate(setup: Setup) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rank the database for each query and score the rankings: (results by protocol, settings)."""
    items = {name: Item(path) for name, path in setup.database.items()}
    wanted = setup.settings | descriptor_settings(setup, items)
    database, index = load_rows(setup, setup.city, "database", wanted)
    place = {name: i for i, name in enumerate(index["names"])}
    same = {name: index["settings"][name] for name in ("model", "PCA")}
    results: dict[str, Any] = {}
    for what, queries in setup.queries.items():
        wanted = setup.settings | same | descriptor_settings(setup, boxes(setup, queries))
        rows, _ = load_rows(setup, setup.city, what, wanted)
        names = setup.names if what == "revisited_queries" else list(place)
        among = database[[place[name] for name in names]]
        rankings = [[names[i] for i in order] for order in rank(rows, among, setup.aqe, setup.dbe)]
        protocols = REVISITED if what == "revisited_queries" else ("classic",)
        results |= {protocol: score(queries, rankings, protocol) for protocol in protocols}
    return results, index["settings"]


STAGES: dict[str, Callable[[Setup], Any]] = {
    "extract_train": extract_train,
    "train_pca": train_pca,
    "db_features": db_features,
    "q_features": q_features,
    "eval": evaluate,
}
