"""The command lines: a parser whose mistakes are one line, checked numbers, the flags that scripts share.

Nothing heavy is imported here: a script parses first and imports torch afterwards, so that `--help` and a bad
flag are answered at once.
"""

import argparse
import math
import signal
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from util import fail, quit_at_once


class Parser(argparse.ArgumentParser):
    """argparse with each default shown, and with one line and exit code 2 for a mistake."""

    def __init__(self, doc: str, **options: Any) -> None:
        """doc: the script's docstring, shown above the flags."""
        super().__init__(description=doc, formatter_class=_Help, **options)

    def parse_args(self, args: Any = None, namespace: Any = None) -> argparse.Namespace:
        """As argparse does. Of the process's own command line Ctrl-C from here on is one line."""
        found = super().parse_args(args, namespace)
        if args is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, quit_at_once)  # until run_main: imports follow
        return found

    def error(self, message: str) -> NoReturn:
        fail(f"{self.prog}: {message.removeprefix('argument ')} (--help tells the flags)")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it stands, and the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default == argparse.SUPPRESS or action.nargs == 0:
            return action.help
        return super()._get_help_string(action)


def at_least(least: int) -> Callable[[str], int]:
    """A type of argparse: whole numbers from `least` on."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text}: must be a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {least}")
        return value

    return number


def within(low: float, high: float, open_ends: str = "") -> Callable[[str], float]:
    """A type of argparse: numbers from low to high; open_ends names the ends left out ("low", "high")."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text}: must be a number") from None
        inside = low <= value <= high and math.isfinite(value)
        if not inside or (value == low and "low" in open_ends) or (value == high and "high" in open_ends):
            left, right = "(" if "low" in open_ends else "[", ")" if "high" in open_ends else "]"
            raise argparse.ArgumentTypeError(f"{text}: must lie in {left}{low:g}, {high:g}{right}")
        return value

    return number


def positive(text: str) -> float:
    """A type of argparse: numbers above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text}: must be a positive number")
    return value


def power_of_ten(text: str) -> float:
    """A type of argparse: the exponent of a weight decay, such as -5 for 10**-5."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and -300 < value < 300):
        raise argparse.ArgumentTypeError(f"{text}: must be a power of ten such as -5, for 10**-5")
    return value


def cache_folder(text: str) -> str | None:
    """The folder of --crop-cache; None for the `off` of older command lines."""
    if text == "auto":
        raise argparse.ArgumentTypeError("auto: no folder is chosen any more, name one (or leave it out)")
    return None if text == "off" else text


def add_data(parser: argparse._ActionsContainer) -> None:
    """The images: DIR or --shards."""
    parser.add_argument("dir", metavar="DIR", nargs="?", help="a folder of images or a .txt file of paths")
    add_shards(parser, "DIR")
    add_all_splits(parser)
    add_bad_images(parser)


def add_all_splits(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--all-splits",
        action="store_true",
        help="take all of a DIR that holds train/ and val/, which is refused otherwise",
    )


def add_shards(parser: argparse._ActionsContainer, instead_of: str) -> None:
    parser.add_argument(
        "--shards",
        metavar="PATTERN",
        help=f"instead of {instead_of}: tar shards, e.g. 'train-{{000000..000146}}.tar' "
        "(tools/make_shards.py)",
    )


def add_bad_images(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--skip-bad-images",
        action="store_true",
        help="leave out files that cannot be decoded and folders that cannot be read, instead of stopping at "
        "their list",
    )


def add_exp(parser: argparse._ActionsContainer, what: str) -> None:
    """--exp, the folder of what."""
    parser.add_argument("--exp", default="exp", metavar="EXP", help=f"folder of {what}")


def add_run(parser: argparse._ActionsContainer) -> None:
    """What everything that trains has: its folder, how it goes on, its seed."""
    add_exp(parser, "the run: checkpoints, log, results")
    parser.add_argument(
        "--resume",
        metavar="PATH",
        nargs="?",
        const="auto",
        help="checkpoint of a run to continue exactly; auto: the furthest good one in EXP, or a new run "
        "where there is none",
    )
    add_seed(parser)
    parser.add_argument("--verbose", action="store_true", help="chatty")


def add_seed(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--seed", type=at_least(0), default=31, help="random seed")


OWN_SIZE = " (default: as in the checkpoint, else 224)"  # of --image-size, where a network is evaluated


def add_image_size(parser: argparse._ActionsContainer, default: int | None = 224, note: str = "") -> None:
    """--image-size; note: what the help says besides."""
    parser.add_argument(
        "--image-size",
        type=at_least(16),
        default=default,
        metavar="PIXELS",
        help=f"side of the crops; the shorter side is first resized to 256/224 of it{note}",
    )


PRECISIONS = ("fp32", "tf32", "bf16", "fp16")


def add_machine(parser: argparse._ActionsContainer, precision: str | None = "fp32") -> None:
    """How it is computed: workers, device, precision."""
    parser.add_argument(
        "--workers", type=at_least(0), default=4, help="data loading workers of each process; more than "
        "cores do not help"
    )  # fmt: skip
    add_device(parser)
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=precision,
        help="arithmetic of the convnet: fp32 is exact; tf32 and fp16 (CUDA) and bf16 (CUDA, CPUs with "
        "AVX512-BF16 or AMX) are faster and give a slightly different run",
    )


def add_device(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--device", metavar="DEVICE", help="cpu, cuda or cuda:<n> (default: cuda if there is one, else cpu)"
    )


def add_model(parser: argparse._ActionsContainer) -> None:
    """--model, the network that is looked at."""
    parser.add_argument("--model", required=True, metavar="MODEL", help="checkpoint of the network")


def add_map(parser: argparse._ActionsContainer) -> None:
    """Which feature map of a network."""
    parser.add_argument(
        "--conv", type=at_least(1), default=1, metavar="CONV", help="convolutional layer, from 1"
    )
    parser.add_argument(
        "--layer",
        metavar="NAME",
        help="instead of --conv: any feature map of the network, such as layer3 of a ResNet",
    )


def add_network(group: argparse._ActionsContainer, arch: str = "alexnet") -> None:
    """What is trained: architecture, Sobel, weights to start from, size of the images."""
    group.add_argument(
        "--arch",
        "-a",
        default=arch,
        metavar="ARCH",
        help="CNN architecture: alexnet, vgg16, resnet18, resnet18s (for images of 28 to 64 pixels), "
        "resnet50, resnet50w2, resnet50w4, resnet50w5",
    )
    group.add_argument(
        "--sobel",
        action="store_true",
        help="Sobel filtering in front: edges, no colour; try "
        "without where colour matters or clusters collapse",
    )
    group.add_argument(
        "--init",
        metavar="PATH",
        help="take the weights (not the head, not the optimiser) from this checkpoint",
    )
    add_image_size(group)


def add_method_files(group: argparse._ActionsContainer) -> None:
    """What the methods read and write besides their images."""
    add_run(group)
    group.add_argument(
        "--checkpoints", type=at_least(1), default=25000, help="how many iterations between two checkpoints"
    )
    group.add_argument("--no-report", action="store_true", help="no report and no gallery at the end")
    group.add_argument("--tensorboard", action="store_true", help="also write EXP/tensorboard")


def add_crop_cache(group: argparse._ActionsContainer) -> None:
    """Of the methods that extract the features of all images again and again."""
    group.add_argument(
        "--crop-cache",
        type=cache_folder,
        metavar="FOLDER",
        help="keep the exact central crops in a file there, so "
        "that feature passes after the first do not decode (150 KB an image at 224 pixels)",
    )


def add_method_machine(group: argparse._ActionsContainer) -> None:
    """How the methods are computed."""
    add_machine(group)
    group.add_argument(
        "--scaled-decoding",
        action="store_true",
        help="decode JPEGs of 1024 pixels or more at a fraction of their size: faster, other pixels",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the training step; takes a C++ compiler, and gains nothing on a CPU",
    )


def add_multicrop(parser: argparse.ArgumentParser) -> None:
    """Images, network and crops of SwAV and DeepCluster-v2."""
    add_data(parser)
    parser.add_argument("--data_path", dest="dir", metavar="DIR", default=argparse.SUPPRESS, help="DIR too")
    group = parser.add_argument_group("network")
    group.add_argument("--arch", default="resnet50", metavar="ARCH", help="CNN architecture; as of main.py")
    group.add_argument("--sobel", action="store_true", help="Sobel filtering in front")
    group.add_argument("--init", metavar="PATH", help="take the weights of the network from this checkpoint")
    group.add_argument(
        "--hidden_mlp", type=at_least(0), default=2048, help="units of the projection head, 0: a linear layer"
    )
    group.add_argument("--feat_dim", type=at_least(1), default=128, help="numbers of an embedding")
    group = parser.add_argument_group("crops")
    lists = {"nargs": "+", "metavar": "N"}
    group.add_argument(
        "--nmb_crops", type=at_least(1), default=[2], help="crops of each group, e.g. 2 6", **lists
    )
    group.add_argument(
        "--size_crops", type=at_least(16), default=[224], help="pixels of each group, e.g. 224 96", **lists
    )
    area = within(0, 1, "low")
    group.add_argument(
        "--min_scale_crops", type=area, default=[0.14], help="smallest share of the area, by group", **lists
    )
    group.add_argument(
        "--max_scale_crops", type=area, default=[1.0], help="largest share of the area, by group", **lists
    )
    group.add_argument(
        "--crops_for_assign",
        type=at_least(0),
        default=[0, 1],
        help="crops that images are assigned by",
        **lists,
    )
    group.add_argument(
        "--jitter_strength",
        type=within(0, 2),
        default=1.0,
        help="of the change of colours; lower it for small images or where colour matters, 0: none",
    )
    group.add_argument("--blur", type=within(0, 1), default=0.5, help="share of the crops that are blurred")


def add_multicrop_training(parser: argparse.ArgumentParser, freeze: int) -> None:
    """Training, files and machine of SwAV and DeepCluster-v2; freeze: default of the iterations."""
    group = parser.add_argument_group("training")
    group.add_argument(
        "--temperature", type=positive, default=0.1, help="of the loss; raise it (0.5) when it stays at ln K"
    )
    group.add_argument("--epochs", type=at_least(1), default=100, help="number of total epochs to run")
    group.add_argument("--batch_size", type=at_least(1), default=64, help="images of one process in a step")
    group.add_argument(
        "--base_lr", type=positive, default=4.8, help="learning rate, of a global batch of 4096: scale it"
    )
    group.add_argument("--final_lr", type=within(0, 1e9), default=0.0, help="learning rate at the end")
    group.add_argument("--wd", type=within(0, 1), default=1e-6, help="weight decay (itself, not its power)")
    group.add_argument("--warmup_epochs", type=at_least(0), default=10, help="epochs of rising learning rate")
    group.add_argument(
        "--start_warmup", type=within(0, 1e9), default=0.0, help="learning rate it starts from"
    )
    group.add_argument(
        "--freeze_prototypes_niters",
        type=at_least(0),
        default=freeze,
        help="iterations in which prototypes are not trained; more against a collapse",
    )
    group.add_argument(
        "--larc",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="layer-wise rates around SGD; --no-larc: plain SGD, for small networks and batches",
    )
    group.add_argument(
        "--sync_bn",
        choices=("pytorch", "apex", "none"),
        default="pytorch",
        help="batch norm over all processes (both words), or of each alone",
    )
    group = parser.add_argument_group("files")
    add_method_files(group)
    group.add_argument("--dump_path", dest="exp", metavar="EXP", default=argparse.SUPPRESS, help="--exp too")
    group.add_argument(
        "--checkpoint_freq", type=at_least(1), default=25, help="epochs between two checkpoints that are kept"
    )
    group = parser.add_argument_group("machine")
    add_method_machine(group)
    group.add_argument(
        "--use_fp16", type=word, action=UseFp16, default=argparse.SUPPRESS, metavar="BOOL",
        help="true: --precision fp16, CUDA only; a --precision behind it wins",
    )  # fmt: skip
    parser.set_defaults(workers=10)
    add_old_flags(group, OLD_FLAGS)


class UseFp16(argparse.Action):
    """--use_fp16 true is --precision fp16, and false takes that back: of both flags the last one counts."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, value: Any, option: Any = None) -> None:
        if value or namespace.precision == "fp16":
            namespace.precision = "fp16" if value else "fp32"


def add_old_flags(parser: argparse._ActionsContainer, names: Iterable[str]) -> None:
    """Flags of the authors' command lines that are accepted and change nothing, as a run says."""
    for name in names:
        parser.add_argument(name, metavar="X", help=argparse.SUPPRESS)


# Of SwAV's and DeepCluster-v2's.
OLD_FLAGS = (
    "--dist_url", "--world_size", "--rank", "--local_rank", "--syncbn_process_group_size", "--use_pil_blur",
    "--improve_numerical_stability",
)  # fmt: skip


def word(text: str) -> bool:
    """A type of argparse: on, true, 1 or off, false, 0, in any case."""
    known = {"on": True, "true": True, "1": True, "off": False, "false": False, "0": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"{text}: give true or false")
    return known[text.lower()]
