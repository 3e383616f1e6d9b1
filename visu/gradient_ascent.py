"""What does a filter look for? Pictures that activate it, found by gradient ascent.

    python visu/gradient_ascent.py --model exp/checkpoint.pth.tar --conv 5 --exp exp/ascent
    python visu/gradient_ascent.py --model exp/checkpoint.pth.tar --conv 1 --filters 0 5 17 --exp exp/ascent

For every filter of convolution N: from noise, maximise the log-softmax of the filter's mean activation among
the filters of the layer, minus wd * ||x||^2, and blur now and then (Yosinski, Clune, Nguyen, Fuchs and
Lipson, 'Understanding Neural Networks Through Deep Visualization', 2015; the loss is the paper's). Writes
EXP/conv<N>/layer<N>-channel<c>.jpeg, and all of them on one sheet, EXP/conv<N>/layer<N>.jpeg.
"""

import argparse
import contextlib
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import gaussian_filter1d
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from models.trunk import make_sobel

import data
import evaluation
import models
import util
from features import fold_batch_norm, set_precision
from models import DeepClusterNet
from util import UserError
from visu import sheet

NOISE_MEAN, NOISE_STD = 128.0, 20.0  # of the start, on the scale of pixels, 0..255
PICTURE_STD = 0.1  # contrast of the picture around 0.5, on the scale 0..1
# Images that the network sees at a time. The last bits of a convolution depend on the size of its batch, and
# an ascent of a thousand steps makes them visible; so this size is fixed and --batch only says how many
# such groups are under way. Larger groups are no faster on a CPU, which works at several of them, one a core.
GROUP = {"cpu": 1, "cuda": 32}
SHEET_TILE = 112  # pixels of a picture on the contact sheet


@dataclass(frozen=True)
class Settings:
    """One ascent: the flags of the command line, and where it starts.

    lr: length (L2) of a step in the space of the network's input; noise: std of the start on the scale of
    pixels; normalised: whether the start is brought into the network's space by ImageNet's mean and std, or
    handed to it in 0..255 as the authors' code did.
    """

    lr: float = 3.0
    wd: float = 1e-5
    sig: float = 0.3
    step: int = 5
    niter: int = 1000
    idim: int = 224
    noise: float = NOISE_STD
    normalised: bool = False


def preset(conv: int, num_convs: int, sobel: bool, idim: int) -> Settings:
    """What works for convolution `conv` of `num_convs`: from nearly grey, steps relative to pixels' scale.

    The start has a tenth of the noise, so that none of it is left in the picture. A step is a tenth of the
    norm that the whole noise has there, three tenths in colour: Sobel amplifies fine detail, and with longer
    steps the ascent jumps to and fro across the ridge. Deep layers get more blur, which leaves them the
    coarse shapes that they see; less where Sobel has to work on what is left. No weight decay: 1e-5 outweighs
    the gradient of filters with small activations and pulls their pictures to grey, and the blur is enough.
    """
    depth = (conv - 1) / max(1, num_convs - 1)  # 0 for the first, 1 for the last
    noise_norm = NOISE_STD / 255 / statistics.mean(data.IMAGENET_STD) * math.sqrt(3) * idim
    return Settings(
        lr=(0.1 if sobel else 0.3) * noise_norm,
        wd=0.0,
        sig=0.3 + (0.1 if sobel else 0.2) * depth,
        step=5,
        niter=300,
        idim=idim,
        noise=NOISE_STD / 10,
        normalised=True,
    )


@dataclass(frozen=True)
class Ascent:
    """What came out for one filter.

    picture: (idim, idim, 3) uint8; noise, end: the filter's mean activation after the ReLU in noise of std
    20, whatever the start was, and in the result; layer: the mean over all filters of the layer in that
    noise; even: the filter's activation in the result brought to the contrast and the mean of that noise.
    """

    channel: int
    picture: np.ndarray
    noise: float
    layer: float
    end: float
    even: float

    @property
    def growth(self) -> float:
        """How many times the filter's activation grew from the noise; infinite for one dead there."""
        if self.noise > 0:
            return self.end / self.noise
        return math.inf if self.end > 0 else 0.0

    @property
    def strict_growth(self) -> float:
        """The same over the larger of the filter's and the layer's average activation in the noise."""
        return self.end / max(self.noise, self.layer, 1e-30)

    @property
    def even_growth(self) -> float:
        """Strict growth at the contrast of the noise: what the pattern adds, without larger pixel values."""
        return self.even / max(self.noise, self.layer, 1e-30)


# ------------------------------------------------------------------------------- command line


def get_parser() -> argparse.ArgumentParser:
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="gradient_ascent.py", description="Gradient ascent visualisation: what does a filter look for?"
    )
    group = parser.add_argument_group("what to look at")
    group.add_argument("--model", required=True, metavar="MODEL", help="checkpoint of the network")
    group.add_argument(
        "--arch",
        choices=sorted(models.ARCHITECTURES),
        help="architecture, checked against the checkpoint's own word (default: what the checkpoint says)",
    )
    group.add_argument(
        "--conv", type=int, default=1, metavar="CONV", help="convolutional layer, from 1 (default: 1)"
    )
    group.add_argument(
        "--filters", type=int, nargs="+", metavar="C", help="channels, from 0 (default: all of the layer)"
    )
    group.add_argument("--exp", default="exp", metavar="EXP", help="path to results (default: exp)")
    group = parser.add_argument_group("ascent")
    group.add_argument(
        "--preset",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="start from faint noise in the network's input space, with lr, wd, sig and niter that suit the "
        "layer; each of these flags that is given wins. --no-preset: the defaults below, from noise in "
        "0..255 (default: --preset)",
    )
    group.add_argument(
        "--lr",
        type=float,
        metavar="LR",
        help="learning rate: length of a step, as the gradient is divided by its norm "
        f"(default: {defaults.lr:g})",
    )
    group.add_argument(
        "--wd", type=float, metavar="WD", help="weight decay, times the squared norm of x (default: 10^-5)"
    )
    group.add_argument(
        "--sig",
        type=float,
        metavar="SIG",
        help=f"gaussian blur, sigma in pixels; 0: none (default: {defaults.sig:g})",
    )
    group.add_argument(
        "--step",
        type=int,
        metavar="STEP",
        help=f"number of iter between gaussian blurs (default: {defaults.step})",
    )
    group.add_argument(
        "--niter",
        type=int,
        metavar="NITER",
        help=f"total number of iterations (default: {defaults.niter})",
    )
    group.add_argument(
        "--idim",
        type=int,
        default=defaults.idim,
        metavar="IDIM",
        help=f"size of input image (default: {defaults.idim})",
    )
    group.add_argument("--seed", type=int, default=31, help="random seed of the noise (default: 31)")
    group = parser.add_argument_group("machine and output")
    group.add_argument(
        "--batch",
        type=int,
        default=96,
        help="filters optimised together; the pictures do not depend on it (default: 96)",
    )
    util.add_device_argument(group)
    return parser


def main(args: argparse.Namespace) -> list[Ascent]:
    check_arguments(args)
    device, log = util.choose_device(args.device), util.Log()
    net = evaluation.open_network(args.model, [])
    channels = choose_channels(args, net)
    settings = choose_settings(args, net)
    folder = util.make_folder(Path(args.exp) / f"conv{args.conv}")
    log(
        f"{net.arch} conv{args.conv}, {len(channels)} filters at {settings.idim} pixels: "
        f"lr {settings.lr:.3g}, wd {settings.wd:g}, sig {settings.sig:.3g}, step {settings.step}, "
        f"niter {settings.niter}, start {'normalised' if settings.normalised else 'in 0..255'}"
    )
    progress = util.Progress(len(channels), f"conv{args.conv}", unit="filters", log=log)
    results = []
    for result in ascend_layer(net, args.conv, channels, settings, args.seed, args.batch, device):
        picture = Image.fromarray(result.picture)
        sheet.save_picture(picture, folder / f"layer{args.conv}-channel{result.channel}.jpeg")
        results.append(result)
        progress.update()
    progress.close()
    overview = folder / f"layer{args.conv}.jpeg"
    sheet.save_picture(layer_sheet(results, f"{net.arch} conv{args.conv}"), overview)
    log(summary(args.conv, results))
    log(f"pictures in {folder}, all on one sheet in {overview}")
    return results


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse values that cannot work, in one line each."""
    smallest = {"conv": 1, "step": 1, "niter": 1, "batch": 1, "seed": 0, "sig": 0, "wd": 0, "idim": 16}
    for name, least in smallest.items():
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value >= least):
            raise UserError(f"--{name} {value}: must be at least {least}")
    if args.lr is not None and not (math.isfinite(args.lr) and args.lr > 0):
        raise UserError(f"--lr {args.lr}: must be a positive number")


def choose_channels(args: argparse.Namespace, net: DeepClusterNet) -> list[int]:
    """The channels to visualise, each once; UserError for an arch, layer or channel that the net lacks."""
    if args.arch and args.arch != net.arch:
        raise UserError(f"--arch {args.arch}: {args.model} holds {net.arch}; leave --arch out")
    if args.conv > net.num_convs:
        raise UserError(f"--conv {args.conv}: {net.arch} has convolutions 1 to {net.num_convs}")
    count = width(net, args.conv)
    channels = list(range(count)) if args.filters is None else list(dict.fromkeys(args.filters))
    for channel in channels:
        if not 0 <= channel < count:
            raise UserError(
                f"--filters {channel}: conv{args.conv} of {net.arch} has filters 0 to {count - 1}"
            )
    return channels


def width(net: DeepClusterNet, conv: int) -> int:
    """Number of filters of convolution `conv`."""
    return [layer for layer in net.features if isinstance(layer, nn.Conv2d)][conv - 1].out_channels


def choose_settings(args: argparse.Namespace, net: DeepClusterNet) -> Settings:
    """The preset of the layer, or the plain defaults, with the flags that the user gave."""
    base = Settings(idim=args.idim)
    if args.preset:
        base = preset(args.conv, net.num_convs, net.sobel is not None, args.idim)
    given = {name: getattr(args, name) for name in ("lr", "wd", "sig", "step", "niter")}
    return replace(base, **{name: value for name, value in given.items() if value is not None})


# ------------------------------------------------------------------------------- the ascent


def ascend_layer(
    net: DeepClusterNet,
    conv: int,
    channels: Sequence[int],
    settings: Settings,
    seed: int,
    batch: int,
    device: torch.device,
) -> Iterator[Ascent]:
    """The ascents of these channels of convolution `conv`, in their order, `batch` of them at a time.

    net is in eval mode: batch norm uses its running statistics, so that images do not see each other. Each
    picture depends on (weights, seed, conv, channel, settings) and the kind of device only: not on batch, the
    other channels, or the number of cores. On a CPU that is exact; on a GPU as far as cuDNN repeats itself.
    """
    set_precision("fp32", device)
    net = prepare(net).to(device)
    group = GROUP[device.type]

    def run(members: Sequence[int]) -> list[Ascent]:
        full = [*members, *[members[-1]] * (group - len(members))]  # always the same size
        return ascend(net, conv, full, settings, seed, device)[: len(members)]

    cores = torch.get_num_threads() if device.type == "cpu" else 1
    for start in range(0, len(channels), batch):
        together = channels[start : start + batch]
        groups = [together[i : i + group] for i in range(0, len(together), group)]
        with one_thread_each(cores) as pool:
            for results in pool.map(run, groups):
                yield from results


@contextlib.contextmanager
def one_thread_each(cores: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of `cores` threads in each of which torch computes on one; torch's setting is put back after.

    A core an image wastes less than all cores on one image, and the sums do not depend on their number.
    """
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def ascend(
    net: DeepClusterNet,
    conv: int,
    channels: Sequence[int],
    settings: Settings,
    seed: int,
    device: torch.device,
) -> list[Ascent]:
    """One ascent for each of the channels, as one batch through net."""
    target = torch.tensor(channels, device=device)
    whole, x = (
        torch.stack([noise(seed, conv, c, std, settings) for c in channels]).to(device)
        for std in (NOISE_STD, settings.noise)
    )
    blur = blur_matrix(settings.idim, settings.sig).to(device)
    for i in range(1, settings.niter + 1):
        x = x + settings.lr * unit(gradient(net, conv, x, target, settings.wd))
        if settings.sig and i % settings.step == 0:
            x = blur @ x @ blur.T
    with torch.no_grad():
        figures = [of_target(net, conv, y, target) for y in (whole, x, like(x, whole))]
    (before, layer), (after, _), (even, _) = [[v.tolist() for v in pair] for pair in figures]
    pictures = to_pictures(x, settings.normalised).cpu().numpy()
    return [Ascent(*row) for row in zip(channels, pictures, before, layer, after, even)]


def noise(seed: int, conv: int, channel: int, std: float, settings: Settings) -> torch.Tensor:
    """Noise for one filter: (3, idim, idim) float32, its own draw whatever else is computed."""
    generator = torch.Generator().manual_seed(util.derive_seed(seed, "gradient-ascent", conv, channel))
    x = NOISE_MEAN + std * torch.randn(3, settings.idim, settings.idim, generator=generator)
    return data.normalise(x) if settings.normalised else x


def gradient(
    net: DeepClusterNet, conv: int, x: torch.Tensor, target: torch.Tensor, wd: float
) -> torch.Tensor:
    """d/dx of log softmax(mean activations)[target] - wd * ||x||^2, image by image: (B, 3, H, W).

    Where the ReLU lets nothing of the target through, its gradient is 0; there the layer before it is used.
    """
    x = x.detach().requires_grad_()
    before, after = mean_activations(net, conv, x)
    dead = after.gather(1, target[:, None]) == 0
    values = torch.where(dead, before, after)  # (B, filters)
    score = values.log_softmax(dim=1).gather(1, target[:, None]).sum()
    (of_score,) = torch.autograd.grad(score, x)
    return of_score - 2 * wd * x.detach()


def mean_activations(net: DeepClusterNet, conv: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Means over space of all filters before and after the ReLU: (B, filters) each."""
    names = (f"conv{conv}.pre", f"conv{conv}")
    found = net.activations(x, names)
    before, after = (found[name].mean(dim=(2, 3)) for name in names)
    return before, after


def of_target(
    net: DeepClusterNet, conv: int, x: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """After the ReLU: the target's mean activation (B,), and the mean over all filters of the layer (B,)."""
    _, after = mean_activations(net, conv, x)
    return after.gather(1, target[:, None]).squeeze(1), after.mean(dim=1)


def unit(g: torch.Tensor) -> torch.Tensor:
    """Each image of g (B, 3, H, W) divided by its norm; zeros stay zeros."""
    norm = g.flatten(1).norm(dim=1).clamp(min=torch.finfo(g.dtype).tiny)
    return g / norm[:, None, None, None]


def blur_matrix(side: int, sigma: float) -> torch.Tensor:
    """B (side, side) such that B @ x @ B.T is x blurred over space by a Gaussian of `sigma` pixels.

    Beyond the border the outermost pixels go on.
    """
    if sigma == 0:
        return torch.eye(side)
    return torch.from_numpy(gaussian_filter1d(np.eye(side), sigma, axis=0, mode="nearest")).float()


def like(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Each image of x (B, 3, H, W) with the mean and std over all its values that `other` has."""
    dims = (1, 2, 3)
    std, mean = torch.std_mean(x, dims, keepdim=True)
    other_std, other_mean = torch.std_mean(other, dims, keepdim=True)
    return (x - mean) / std.clamp(min=1e-12) * other_std + other_mean


def to_pictures(x: torch.Tensor, normalised: bool) -> torch.Tensor:
    """Network inputs (B, 3, H, W) -> (B, H, W, 3) uint8: centred, scaled to std 0.1 around 0.5, clipped."""
    if normalised:  # back to the scale of pixels, in which grey is grey
        x = x * torch.tensor(data.IMAGENET_STD, device=x.device).view(3, 1, 1)
        x = x + torch.tensor(data.IMAGENET_MEAN, device=x.device).view(3, 1, 1)
    std, mean = torch.std_mean(x, (1, 2, 3), keepdim=True)
    x = (x - mean) / std.clamp(min=1e-12) * PICTURE_STD + 0.5
    return (x.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


# ------------------------------------------------------------------------------- the network, faster


def prepare(net: DeepClusterNet) -> DeepClusterNet:
    """A view of net without gradients for weights: the same sums, by faster ways, up to rounding.

    Batch norm is folded into the convolutions, strided ones go by blocks, and Sobel goes by slices.
    """
    folded = fold_batch_norm(net.eval()).requires_grad_(False)
    layers = [BlockConv(layer) if is_strided(layer) else layer for layer in folded.features]
    folded.features = nn.Sequential(*layers)
    if net.sobel is not None and is_standard(net.sobel):
        folded.sobel = SlicedSobel()
    return folded


def is_standard(sobel: nn.Module) -> bool:
    """Whether a checkpoint's Sobel layers hold the fixed weights of the method."""
    found, fixed = sobel.state_dict(), make_sobel().state_dict()
    return all(torch.equal(found[name].cpu(), fixed[name]) for name in fixed)


class SlicedSobel(nn.Module):
    """Grey and two Sobel gradients, as `make_sobel`, by shifted slices: (B, 3, H, W) -> (B, 2, H, W).

    Forward and backward take a quarter of the time of convolutions with so few channels on a CPU.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grey = F.pad(x.mean(dim=1, keepdim=True), (1, 1, 1, 1))
        down = grey[..., :-2, :] + 2 * grey[..., 1:-1, :] + grey[..., 2:, :]  # smoothed along the height
        across = grey[..., :-2] + 2 * grey[..., 1:-1] + grey[..., 2:]  # along the width
        return torch.cat([down[..., :-2] - down[..., 2:], across[..., :-2, :] - across[..., 2:, :]], dim=1)


def is_strided(layer: nn.Module) -> bool:
    """Whether the layer is a convolution of square kernel and stride above 1."""
    return isinstance(layer, nn.Conv2d) and layer.stride[0] == layer.stride[1] > 1


class BlockConv(nn.Conv2d):
    """A convolution of stride s as one of stride 1 over blocks of s x s pixels, made from `conv`.

    The same sums in another order: pixels within a block become channels, in the image and in the kernel,
    which is padded by zeros to whole blocks. On a CPU the gradient of AlexNet's first layer (11 x 11,
    stride 4, two or three channels) takes a fifth of the time.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        block, kernel = conv.stride[0], conv.kernel_size[0]
        blocks = math.ceil(kernel / block)
        super().__init__(conv.in_channels * block**2, conv.out_channels, blocks)
        self.block, self.kernel, self.border = block, kernel, conv.padding[0]
        padded = F.pad(conv.weight.detach(), (0, blocks * block - kernel) * 2)
        self.weight = nn.Parameter(F.pixel_unshuffle(padded, block), requires_grad=False)
        self.bias = nn.Parameter(conv.bias.detach().clone(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pads = []
        for side in (x.shape[-1], x.shape[-2]):
            outputs = (side + 2 * self.border - self.kernel) // self.block + 1
            covered = (outputs - 1 + self.kernel_size[0]) * self.block
            pads += [self.border, covered - side - self.border]  # below 0 where the last pixels see no kernel
        return super().forward(F.pixel_unshuffle(F.pad(x, pads), self.block))


# ------------------------------------------------------------------------------- what is shown


def layer_sheet(results: Sequence[Ascent], title: str) -> Image.Image:
    """All pictures of a layer in a grid, each with its channel and how many times its activation grew."""
    size = (SHEET_TILE, SHEET_TILE)
    tiles = [Image.fromarray(result.picture).resize(size, Image.Resampling.LANCZOS) for result in results]
    captions = [f"{result.channel}  x{result.strict_growth:.3g}" for result in results]
    title += ": channel, activation over that of noise"
    return sheet.contact_sheet(tiles, sheet.square_columns(len(tiles)), captions, title=title)


def summary(conv: int, results: Sequence[Ascent]) -> str:
    """One line on how much the activations grew, median and least, by the three measures of `Ascent`."""
    own, strict, even = (
        f"x{statistics.median(values):.3g} (least x{min(values):.3g})"
        for values in zip(*[(r.growth, r.strict_growth, r.even_growth) for r in results])
    )
    return (
        f"conv{conv}: activation against that of noise: median {own}; against the layer's average in noise, "
        f"where that is larger: {strict}; the same at the contrast of noise: {even}"
    )


if __name__ == "__main__":
    util.run_main(main, get_parser().parse_args())
