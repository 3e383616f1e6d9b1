"""The protocols of the three papers as tables: each gives flags of an evaluation their values.

    deepcluster    Caron et al., ECCV 2018, as in the code of DeepCluster
    swav           Caron et al., NeurIPS 2020, as in the code of SwAV and DeepCluster-v2
    deepercluster  Caron et al., ICCV 2019, as in the code of DeeperCluster

A flag that the user gives wins. Nothing heavy is imported here: scripts ask while they parse.
"""

import argparse
from collections.abc import Callable
from typing import Any

from commandline import Parser

Preset = dict[str, Any]

# Of DeeperCluster's probes on VGG-16: conv1 to conv13.
IMAGENET_RATES = [0.005, 0.01, 0.03, 0.03, 0.03, 0.03, 0.02, 0.03, 0.03, 0.03, 0.02, 0.02, 0.02]
PLACES_RATES = [0.003, 0.005, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 0.03, 0.01, 0.01, 0.02]

# Linear probes. lr: a number, or a list for conv1, conv2 ...; weight_decay: its power of ten.
DEEPERCLUSTER = {
    "epochs": 100,
    "batch": 256,
    "lr": IMAGENET_RATES,
    "momentum": 0.9,
    "weight_decay": -5,
    "schedule": "bottou",
    "train_crop": "area",
    "pooling": "windows",
    "start": "uniform",
}
LINEAR: dict[str, Preset] = {
    "deepcluster": {
        "epochs": 90,
        "batch": 256,
        "lr": 0.01,
        "momentum": 0.9,
        "weight_decay": -4,
        "schedule": "bottou",
        "train_crop": "shift",
        "pooling": "grid",
        "start": "uniform",
    },
    "swav": {
        "epochs": 100,
        "batch": 256,
        "lr": 0.3,
        "momentum": 0.9,
        "weight_decay": -6,
        "schedule": "cosine",
        "train_crop": "area",
        "pooling": "global",
        "start": "normal",
    },
    "deepercluster": DEEPERCLUSTER,
    "deepercluster on Places205": DEEPERCLUSTER | {"lr": PLACES_RATES},
    "deepercluster on VOC07": DEEPERCLUSTER | {"epochs": 60, "batch": 128, "lr": 0.02},
}

# Classification on VOC07; wd: the weight decay itself.
DEEPERCLUSTER_VOC = {
    "nit": 150_000,
    "stepsize": 20_000,
    "lr": 0.003,
    "wd": 1e-5,
    "momentum": 0.9,
    "batch": 16,
    "train_crop": "area",
    "pessimistic_ties": True,
}
VOC: dict[str, Preset] = {
    "deepcluster": {
        "nit": 80_000,
        "stepsize": 5_000,
        "lr": 0.003,
        "wd": 1e-6,
        "momentum": 0.9,
        "batch": 16,
        "train_crop": "squares",
        "pessimistic_ties": False,
    },
    "deepercluster": DEEPERCLUSTER_VOC,
    "deepercluster, all layers": DEEPERCLUSTER_VOC | {"stepsize": 10_000, "wd": 1e-4},
}


def linear_protocol(flags: argparse.Namespace) -> str:
    """The name in LINEAR that the flags of eval_linear.py ask for."""
    if flags.protocol == "deepercluster":
        where = " on VOC07" if flags.vocdir else " on Places205" if flags.places else ""
        return f"deepercluster{where}"
    return flags.protocol


def voc_protocol(flags: argparse.Namespace) -> str:
    """The name in VOC that the flags of eval_voc_classif.py ask for."""
    return f"{flags.protocol}{'' if flags.fc6_8 or flags.protocol == 'deepcluster' else ', all layers'}"


class ProtocolParser(Parser):
    """A parser whose flags take their values from a table of protocols, unless they are given.

    choose: the name in `table` for flags that are parsed. What a protocol sets is not a default of argparse:
    the flags stand at None until the protocol is known.
    """

    def __init__(
        self, doc: str, table: dict[str, Preset], choose: Callable[[argparse.Namespace], str]
    ) -> None:
        super().__init__(doc)
        self.table, self.choose = table, choose

    def parse_args(self, line: Any = None, namespace: Any = None) -> argparse.Namespace:
        """As Parser does; then the protocol's values for the flags that were not given."""
        open_flags = {name: None for preset in self.table.values() for name in preset}
        found = super().parse_args(line, argparse.Namespace(**open_flags))
        for name, value in self.table[self.choose(found)].items():
            if getattr(found, name) is None:
                setattr(found, name, value)
        return found


def tell(name: str, preset: Preset, settings: dict[str, Any], but: tuple[str, ...] = ()) -> str:
    """The protocol's name and what the user changed of it, but for some flags: for log and results file."""
    other = [
        f"{flag} {shown(settings[flag])} instead of {shown(value)}"
        for flag, value in preset.items()
        if settings[flag] != value and flag not in but
    ]
    return f"{name}, but {', '.join(other)}" if other else name


def shown(value: Any) -> str:
    """A setting in words; of a rate for each layer, that it is one."""
    return "a rate for each layer" if isinstance(value, list) else str(value)
