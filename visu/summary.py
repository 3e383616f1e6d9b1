"""A run in words: its last numbers, what went wrong, its settings."""

import shlex
from typing import Any

from training.logs import advice, flags_of
from visu.pages import printable
from visu.records import Records, log_k, value

# Settings that one asks for first, in this order; a method has some of them.
ASKED = (
    "arch", "sobel", "clustering", "nmb_cluster", "nmb_prototypes", "lr", "base_lr", "wd", "batch",
    "batch_size", "image_size", "nmb_crops", "temperature", "epsilon", "reassign", "seed",
)  # fmt: skip
ASKED_NEXT = ("epochs", "sampling", "init", "precision", "dir", "shards")  # in the page only
ALIASES = {"k": "nmb_cluster", "a": "arch"}  # other spellings of flags


def words(records: Records, config: dict[str, Any]) -> list[str]:
    """The last numbers as sentences."""
    last, n = records[-1], value(config, "images", "number")
    sentences = [progress_so_far(records, config)]
    loss, guess = value(last, "loss"), log_k(last)
    if loss is not None:
        of_guess = f", {loss / guess:.0%} of log k = {guess:.3f}, what guessing gives" if guess else ""
        sentences.append(f"The training loss is {loss:.3f}{of_guess}.")
    k, filled, low, middle, high = (
        value(last, "clusters", name) for name in ("number", "nonempty", "min", "median", "max")
    )
    if None not in (k, filled, low, middle, high):
        share = f" ({high / n:.1%} of the images)" if n else ""
        sentences.append(
            f"{filled:,.0f} of {k:,.0f} clusters are filled, with {low:,.0f} to {high:,.0f} images{share}, "
            f"median {middle:,g}."
        )
    for what, name in (("previous", "the previous epoch"), ("classes", "the classes")):
        nmi, ami = value(last, f"nmi_{what}"), value(last, f"ami_{what}")
        if nmi is not None and ami is not None:
            sentences.append(f"Agreement with {name}: NMI {nmi:.3f}, AMI {ami:.3f}.")
    total = value(last, "seconds", "total")
    parts = {name: value(last, "seconds", name) or 0.0 for name in last["seconds"]} if total else {}
    parts.pop("total", None)
    if parts:
        longest = max(parts, key=parts.get)
        name = "training" if longest == "train" else printable(longest)
        sentences.append(f"The epoch took {duration(total)}, {parts[longest] / total:.0%} of it {name}.")
    return sentences


def progress_so_far(records: Records, config: dict[str, Any]) -> str:
    """How many epochs there are, of how many, on what."""
    n = value(config, "images", "number")
    planned = (value(config, "args", "epochs") or 0) - (value(config, "args", "start_epoch") or 0)
    done = f"{len(records)} epoch{'' if len(records) == 1 else 's'}"
    done += f" of {planned:.0f}" if planned > len(records) else ""
    images = f" on {n:,.0f} images" if n else ""
    return f"{done} done{images}; the last is epoch {records[-1]['epoch']}."


def warnings_of(records: Records, config: dict[str, Any]) -> list[str]:
    """What went wrong, plainly: collapse, empty clusters, a loss at log k or far above."""
    n, last = value(config, "images", "number"), records[-1]
    largest, number = value(last, "clusters", "max"), value(last, "clusters", "number")
    rate, k = flags_of(config.get("args", {}))
    found = []
    if number == 1:
        found.append("there is only one cluster: all images have the same label, nothing can be learnt.")
    elif n and largest and largest > n / 2:
        found.append(
            f"collapse: the largest cluster holds {largest:,.0f} of {n:,.0f} images. Try a lower {rate}, "
            f"another {k}, or colour instead of --sobel."
        )
    elif n and any((value(record, "clusters", "max") or 0) > n / 2 for record in records):
        found.append("in an earlier epoch one cluster held more than half of the images (collapse).")
    filled = value(last, "clusters", "nonempty")
    if number and filled is not None and filled < 0.9 * number:
        found.append(
            f"{number - filled:,.0f} of {number:,.0f} clusters are empty: {k} is too large for these images."
        )
    loss, guess = value(last, "loss"), log_k(last)
    if loss is not None and guess and value(last, "loss_over_log_k") is not None:
        warning = advice(last["epoch"], loss, guess, config.get("args", {}))
        found += [f"{warning}."] if warning else []
    return found


def duration(seconds: float) -> str:
    """`49.7 s`, `12.4 min`, `3.1 h`."""
    unit, size = next((u, s) for u, s in (("h", 3600), ("min", 60), ("s", 1)) if seconds >= 2 * s or s == 1)
    return f"{seconds / size:.1f} {unit}"


# ---------------------------------------------------------------------------------------- settings


def settings_line(records: Records, config: dict[str, Any]) -> str:
    """The settings that one asks for first, for the picture.

    Without a number of clusters that the run's clustering did not go by.
    """
    args = config.get("args", {})
    made = value(records[-1], "clusters", "number")
    names = [name for name in ASKED if args.get(name) not in (None, False)]
    if made is not None and args.get("nmb_cluster") != made and "nmb_cluster" in names:
        names.remove("nmb_cluster")
    shown = [f"{name} {show(args[name])}" for name in names]
    return "Settings: " + ", ".join(shown) if shown else ""


def given_settings(config: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of the settings that one asks for first, and of those that the command names."""
    args = config.get("args", {})
    flags = [
        str(word).split("=")[0].lstrip("-") for word in config.get("command", []) if str(word)[:1] == "-"
    ]
    given = {ALIASES.get(flag, flag.replace("-", "_")) for flag in flags}
    asked = [name for name in (*ASKED, *ASKED_NEXT) if name in args and args[name] is not None]
    names = [*asked, *(name for name in args if name in given and name not in asked)]
    rows = [(printable(name), show(args[name])) for name in names]
    if "number" in config.get("images", {}):
        rows.append(("images", f"{value(config, 'images', 'number') or 0:,.0f}"))
    return rows


def other_settings(config: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of everything else in config.json."""
    shown = {name for name, _ in given_settings(config)}
    rows = [(printable(n), show(v)) for n, v in config.get("args", {}).items() if printable(n) not in shown]
    classes = config.get("images", {}).get("classes")
    if "images" in config:
        rows.append(("classes", f"{len(classes):,}" if isinstance(classes, list) and classes else "none"))
    rows += [("device", show(config["device"]))] if "device" in config else []
    rows += [(f"{printable(n)} version", show(v)) for n, v in config.get("versions", {}).items()]
    if config.get("command"):
        rows.append(("command", printable(shlex.join(map(str, config["command"])))))
    return rows


def show(setting: Any) -> str:
    """A setting as people write it."""
    if setting is None or isinstance(setting, bool):
        return {None: "-", True: "yes", False: "no"}[setting]
    return printable(str(setting))
