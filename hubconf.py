"""Entry points for `torch.hub`: the networks, with weights from a file or a URL.

    net = torch.hub.load("/path/to/this/repository", "alexnet", source="local", weights="checkpoint.pth.tar")
    features = net.activations(images, ["fc7.pre"])["fc7.pre"]   # (B, 4096)

Images are RGB (B, 3, H, W), divided by 255 and normalised with ImageNet's mean (0.485, 0.456, 0.406) and
deviation (0.229, 0.224, 0.225). This repository's modules have everyday names (`util`, `data`): here they are
loaded under `deepcluster_hub`, so that those of the caller stay what they are. To save a network, save its
`state_dict()`: a pickle of the whole could be opened only where this file was loaded before.
"""

# Modules only, as torch.hub.list takes every name here that can be called for a network.
import collections.abc
import contextlib
import hashlib
import importlib
import os
import pathlib
import re
import sys
import types
import typing
import urllib.parse

import torch

dependencies = ["torch", "numpy"]

_ROOT = pathlib.Path(__file__).resolve().parent
_PREFIX = "deepcluster_hub"


def _entry(arch: str, what: str, sobel_first: bool) -> collections.abc.Callable[..., torch.nn.Module]:
    """The entry point of an architecture; sobel_first: whether it has Sobel filters unless told otherwise."""

    def build(
        weights: str | os.PathLike | None = None,
        sobel: bool | None = None,
        num_clusters: int | None = None,
        seed: int | None = None,
        progress: bool = True,
    ) -> torch.nn.Module:
        if weights is None:
            return _models().build(arch, sobel_first if sobel is None else sobel, num_clusters, seed).eval()
        net = _from_url(str(weights), progress) if _is_url(weights) else _weights().load(str(weights))
        outputs = net.top_layer.out_features if net.top_layer is not None else None
        for name, wanted, found in (
            ("arch", arch, net.arch),
            ("sobel", sobel, net.sobel is not None),
            ("num_clusters", num_clusters, outputs),
        ):
            if wanted is not None and wanted != found:
                raise ValueError(f"{weights}: its {name} is {found}, not {wanted}")
        return net

    build.__name__ = build.__qualname__ = arch
    build.__doc__ = f"""{what}, in eval mode.

    weights (str): a checkpoint file, or a URL, which is downloaded once into torch.hub's folder; ours or the
        authors'. Opened without running what is in it. None: random weights.
    sobel (bool): Sobel filters in front. None: as the weights say; where there are none, {sobel_first}.
    num_clusters (int): outputs of the head. None: as the weights say, or no head; the network then gives its
        features.
    seed (int): fixes the random weights.
    progress (bool): show a bar while downloading.
    """
    return build


alexnet = _entry("alexnet", "AlexNet with batch normalisation", sobel_first=True)
vgg16 = _entry("vgg16", "VGG-16, configuration D, with batch normalisation", sobel_first=True)
vgg16wide = _entry("vgg16wide", "VGG-16 in the geometry of DeeperCluster's networks", sobel_first=True)
vgg16folded = _entry("vgg16folded", "the same with Sobel folded into conv1, as fine-tuned", sobel_first=False)
resnet18 = _entry("resnet18", "ResNet-18", sobel_first=False)
resnet18s = _entry("resnet18s", "ResNet-18 with a stem for images of 28 to 64 pixels", sobel_first=False)
resnet50 = _entry("resnet50", "ResNet-50", sobel_first=False)
resnet50w2 = _entry("resnet50w2", "ResNet-50, twice as wide", sobel_first=False)
resnet50w4 = _entry("resnet50w4", "ResNet-50, four times as wide", sobel_first=False)
resnet50w5 = _entry("resnet50w5", "ResNet-50, five times as wide", sobel_first=False)


def _is_url(weights: str | os.PathLike) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]+://", str(weights), re.IGNORECASE) is not None


def _from_url(url: str, progress: bool) -> torch.nn.Module:
    """Download once and read. The file's name tells URLs apart: the authors' are all checkpoint.pth.tar."""
    folder = pathlib.Path(torch.hub.get_dir()) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    name = pathlib.PurePosixPath(urllib.parse.urlsplit(url).path).name
    path = folder / f"deepcluster-{hashlib.sha256(url.encode()).hexdigest()[:12]}-{name}"
    if path.is_file():
        return _weights().load(path)
    torch.hub.download_url_to_file(url, str(path), progress=progress)
    try:
        return _weights().load(path)
    except Exception:  # cut off, or no checkpoint: the next call has to download again
        path.unlink(missing_ok=True)
        raise


# ---------------------------------------------------------------------------------------- modules


def _models() -> types.ModuleType:
    return _load_modules("models", "models.weights")[0]


def _weights() -> types.ModuleType:
    return _load_modules("models", "models.weights")[1]


def _load_modules(*names: str) -> list[types.ModuleType]:
    """This repository's modules, whatever the caller has loaded under the same names."""
    if _is_ours(sys.modules.get(names[0])):  # the caller is this repository
        return [importlib.import_module(name) for name in names]
    if all(f"{_PREFIX}.{name}" in sys.modules for name in names):
        return [sys.modules[f"{_PREFIX}.{name}"] for name in names]
    with _only_ours():
        return [importlib.import_module(name) for name in names]


@contextlib.contextmanager
def _only_ours() -> collections.abc.Iterator[None]:
    """Within the block, names of this repository's files mean those; afterwards what they meant before.

    What was imported goes on as `deepcluster_hub.<name>`, under which classes can be pickled within the
    process and torch.compile and torch.export find their globals.
    """
    own = {path.stem for path in _ROOT.glob("*.py")}
    own |= {path.parent.name for path in _ROOT.glob("*/__init__.py")}
    theirs = {name: module for name, module in sys.modules.items() if name.split(".")[0] in own}
    for name in theirs:
        del sys.modules[name]
    sys.path.insert(0, str(_ROOT))
    try:
        yield
    finally:
        sys.path.remove(str(_ROOT))
        ours = [name for name in sys.modules if name.split(".")[0] in own]
        for name in ours:
            _rename(name, sys.modules.pop(name))
        sys.modules.update(theirs)


def _rename(name: str, module: types.ModuleType) -> None:
    """Register a module, and what it defines, under `deepcluster_hub`."""
    package = sys.modules.setdefault(_PREFIX, types.ModuleType(_PREFIX))
    package.__path__ = []  # a package, of which nothing more can be imported
    sys.modules[f"{_PREFIX}.{name}"] = module
    if "." not in name:
        setattr(package, name, module)
    module.__name__ = f"{_PREFIX}.{name}"
    for value in vars(module).values():
        if getattr(value, "__module__", None) == name:
            value.__module__ = module.__name__


def _is_ours(module: typing.Any) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and pathlib.Path(file).resolve().is_relative_to(_ROOT)
