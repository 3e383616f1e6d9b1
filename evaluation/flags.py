"""The flags that evaluations share; imports nothing that takes seconds, as commandline.py."""

import argparse

from commandline import at_least


def add_labels(parser: argparse._ActionsContainer, splits: bool = True) -> None:
    """--labels, where images lie in no class folders; splits: it tells train and val apart too."""
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help="take the classes from this CSV file instead of from class sub-folders: a line `path,label` or "
        "`path,label,split` at its top, then a line an image; paths start from the folder of the images or "
        "are absolute; split is train or val"
        + (", and without it paths begin with train/ or val/" if splits else ", and may be left out"),
    )


def add_bootstrap(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--bootstrap",
        type=at_least(0),
        default=1000,
        metavar="N",
        help="times that the images are drawn again for the 95 %% intervals of clusterings; fewer are "
        "quicker and rougher, 0: no intervals",
    )
