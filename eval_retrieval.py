"""Instance retrieval on Oxford5k and Paris6k: R-MAC descriptors, mean average precision.

    python eval_retrieval.py --datasets DATASETS --eval Oxford --model exp/checkpoint.pth.tar --exp exp
    python eval_retrieval.py --datasets DATASETS --eval Paris --model pretrained --exp exp
    python eval_retrieval.py ... --gnd gnd_roxford5k.pkl               the revisited protocol too (70 queries)

DATASETS holds Oxford/ and Paris/, each with jpg/ (the images) and lab/ (the ground truth). One call does the
five stages, or --stage names one of them; what is finished is kept in --temp and not computed again, and a
killed stage goes on where it stopped (evaluation/store.py):

    extract_train  regions of every image of the other data set      Paris_regions.npy   (for --eval Oxford)
    train_pca      their PCA-whitening                               Paris_pca.npz
    db_features    a descriptor for every image                      Oxford_database.npy
    q_features     a descriptor for every query                      Oxford_queries.npy
    eval           rank, score                                       EXP/results.json

Beside every .npy (float32) stands a .json with its settings and the names of the images. What was made with
other settings, or from images that were replaced since, is refused.

Descriptor and regions: Tolias, Sicre, Jegou, 'Particular object retrieval with integral max-pooling of CNN
activations', ICLR 2016. Average precision: the program of the Oxford group (Philbin et al., CVPR 2007).
"""

import argparse

from commandline import Parser, add_exp, add_machine, at_least

STAGE_NAMES = ("extract_train", "train_pca", "db_features", "q_features", "eval")


def get_parser() -> Parser:
    """The flags of eval_retrieval.py; those that scripts share are in commandline.py."""
    parser = Parser(__doc__)
    group = parser.add_argument_group("what")
    group.add_argument(
        "--model",
        metavar="PATH",
        help="checkpoint (ours or the authors'), random:ARCH, or 'pretrained' for torchvision's supervised "
        "VGG-16; its last feature map is described",
    )
    group.add_argument("--eval", choices=("Oxford", "Paris"), default="Oxford", help="data set to score")
    group.add_argument("--stage", choices=(*STAGE_NAMES, "all"), default="all", help="which of the stages")
    group.add_argument("--datasets", metavar="DIR", help="folder that holds Oxford/ and Paris/")
    group.add_argument("--oxford", metavar="DIR", help="instead of DATASETS/Oxford")
    group.add_argument("--paris", metavar="DIR", help="instead of DATASETS/Paris")
    group.add_argument(
        "--gnd",
        metavar="PKL",
        help="gnd_roxford5k.pkl or gnd_rparis6k.pkl: also score by the revisited protocol (easy, medium, "
        "hard); DATASET/lab may then be missing",
    )
    add_descriptor(parser.add_argument_group("descriptor and search"))
    group = parser.add_argument_group("files and machine")
    add_exp(group, "results.json")
    group.add_argument("--temp", metavar="DIR", help="folder of descriptors, by default EXP/retrieval")
    add_machine(group)
    return parser


def add_descriptor(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--S",
        type=at_least(16),
        default=1024,
        metavar="PIXELS",
        help="longer side of an image; lower it where memory or time is short",
    )
    group.add_argument("--L", type=at_least(1), default=3, help="levels of regions")
    group.add_argument(
        "--multires",
        action="store_true",
        help="sum the descriptors at three scales: S, S/sqrt(2) and S/2 (the PCA is learnt at S)",
    )
    group.add_argument(
        "--aqe",
        type=at_least(0),
        default=0,
        metavar="K",
        help="average query expansion: search again with the mean of the query and its K best",
    )
    group.add_argument(
        "--dbe",
        type=at_least(0),
        default=0,
        metavar="K",
        help="add to every image of the database its K nearest neighbours",
    )


if __name__ == "__main__":
    ARGS = get_parser().parse_args()  # before the imports that take seconds

from pathlib import Path
from typing import Any

from evaluation.ground_truth import list_database, read_queries, revisited_truth
from evaluation.last_maps import model_digest, open_model
from evaluation.results import report
from evaluation.retrieval import OTHER, STAGES, Setup
from evaluation.rmac import PCA_DIM
from features import Pass
from formats import safe_pickle
from util import Log, UserError, choose_device, make_folder, run_main, set_precision

SCALES = (1.0, 2**-0.5, 0.5)  # --multires, as Radenovic, Tolias, Chum, TPAMI 2019, section 5.2
NEEDS_NETWORK = {"extract_train", "db_features", "q_features"}


def main(args: argparse.Namespace) -> dict[str, Any] | None:
    """Do the stages that are asked for; returns the results, where there is something to score."""
    stages = STAGE_NAMES if args.stage == "all" else (args.stage,)
    setup = look_up(args, set(stages))
    found = None
    for stage in stages:
        found = STAGES[stage](setup)
    if found is None:
        return None
    results, settings = found
    tell(args, setup, results, settings)
    return results


def look_up(args: argparse.Namespace, stages: set[str]) -> Setup:
    """Open everything that these stages read, so that a mistake shows before hours of work."""
    device = choose_device(args.device)
    set_precision(args.precision, device)  # refused here where the device lacks it
    settings = {"S": args.S, "L": args.L, "precision": args.precision}
    net = open_model(args.model, device) if stages & NEEDS_NETWORK else None
    if args.model:
        settings["model"] = model_digest(args.model)
    learning = list_database(folder_of(args, OTHER[args.eval])) if "extract_train" in stages else {}
    database, queries, names = {}, {}, []
    if stages & {"db_features", "q_features", "eval"}:
        folder = folder_of(args, args.eval)
        database = list_database(folder)
        if not args.gnd or (folder / "lab").is_dir():
            queries["queries"] = read_queries(folder, database)
        if args.gnd:
            content = safe_pickle.load(args.gnd, encoding="latin1")
            names, queries["revisited_queries"] = revisited_truth(args.gnd, content, database)
    temp = make_folder(args.temp or Path(args.exp) / "retrieval")
    return Setup(
        args.eval,
        temp,
        Log(temp / "retrieval.log"),
        Pass(1, args.workers, device, args.precision),
        settings,
        list(SCALES if args.multires else SCALES[:1]),
        net,
        learning,
        database,
        queries,
        names,
        args.aqe,
        args.dbe,
    )


def folder_of(args: argparse.Namespace, city: str) -> Path:
    """Where a data set lies: --oxford, --paris, or inside --datasets."""
    named = {"Oxford": args.oxford, "Paris": args.paris}[city]
    if named is None and args.datasets is None:
        raise UserError(
            f"where is {city}? give --datasets DIR (it holds Oxford/ and Paris/) or --{city.lower()}"
        )
    folder = Path(named or Path(args.datasets) / city)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder (expected {city}'s lab/ and jpg/ in it)")
    return folder


def tell(args: argparse.Namespace, setup: Setup, results: dict[str, Any], settings: dict[str, Any]) -> None:
    """The protocol and the figures."""
    protocol = {
        "data set": args.eval,
        "images": len(setup.database),
        "queries": ", ".join(f"{name} {result['queries']}" for name, result in results.items()),
        "model": args.model or settings["model"][:12],
        "layer": f"{settings['layer']}, frozen",
        "S": settings["S"],
        "L": settings["L"],
        "scales": " ".join(f"{scale:.3g}" for scale in settings["scales"]),
        "PCA": f"whitening {PCA_DIM} learnt on {OTHER[args.eval]}",
        "query expansion": args.aqe,
        "database expansion": args.dbe,
        "precision": settings["precision"],
        "figures": "percent",
    }
    report(args.exp, f"eval_retrieval_{args.eval}", protocol, results)
    for name, result in results.items():
        extra = "" if name == "classic" else f"  mP@10 {result['mP@10']:.2f}"
        setup.log(f"{args.eval} {name}: mAP {result['mAP']:.2f}{extra}  ({result['queries']} queries)")


if __name__ == "__main__":
    run_main(main, ARGS)
