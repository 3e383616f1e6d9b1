"""Gradient ascent: from noise to a picture that a filter likes. Networks in, arrays out; no files.

Maximise the log-softmax of the filter's mean activation among the filters of the layer, minus wd * ||x||^2,
and blur now and then (Yosinski, Clune, Nguyen, Fuchs and Lipson, 'Understanding Neural Networks Through Deep
Visualization', 2015; the loss is that of section 4 of the DeepCluster paper).
"""

import contextlib
import copy
import math
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter1d
from torch import nn

import data
from models.network import Network
from util import derive_seed, set_precision
from visu.layers import first_conv

NOISE_MEAN, NOISE_STD = 128.0, 20.0  # of the start, on the scale of pixels, 0..255
PICTURE_STD = 0.1  # contrast of the picture around 0.5, on the scale 0..1
# Images that the network sees at a time. The last bits of a convolution depend on the size of its batch, and
# an ascent of a thousand steps makes them visible; so this size is fixed and --batch only says how many
# such groups are under way. Larger groups are no faster on a CPU, which works at several of them, one a core.
GROUP = {"cpu": 1, "cuda": 32}


@dataclass(frozen=True)
class Settings:
    """One ascent: the flags of the command line, and whose way it goes.

    lr: length (L2) of a step in the space of the network's input; noise: std of the start on the scale of
    pixels. released: as the authors' code did: the start is handed to the network in 0..255, the first blur
    comes after the first iteration, and a dead filter is driven by its convolution's output before batch
    norm. Otherwise the start is brought into the network's space by ImageNet's mean and std, each `step`
    iterations end with a blur, and a dead filter is driven by what enters its ReLU.
    """

    lr: float = 3.0
    wd: float = 1e-5
    sig: float = 0.3
    step: int = 5
    niter: int = 1000
    idim: int = 224
    noise: float = NOISE_STD
    released: bool = True

    def blurs_after(self, iteration: int) -> bool:
        """Whether a blur follows this iteration, counted from 1."""
        first = 1 if self.released else self.step
        return self.sig > 0 and iteration >= first and (iteration - first) % self.step == 0


def preset(depth: float, sobel: bool, idim: int) -> Settings:
    """What works for a map at `depth`, 0 for the first and 1 for the last: from nearly grey.

    The start has a tenth of the noise, so that none of it is left in the picture. A step is a tenth of the
    norm that the whole noise has there, three tenths in colour: Sobel amplifies fine detail, and with longer
    steps the ascent jumps to and fro across the ridge. Deep layers get more blur, which leaves them the
    coarse shapes that they see; less where Sobel has to work on what is left. No weight decay: 1e-5 outweighs
    the gradient of filters with small activations and pulls their pictures to grey, and the blur is enough.
    """
    noise_norm = NOISE_STD / 255 / statistics.mean(data.IMAGENET_STD) * math.sqrt(3) * idim
    return Settings(
        lr=(0.1 if sobel else 0.3) * noise_norm,
        wd=0.0,
        sig=0.3 + (0.1 if sobel else 0.2) * depth,
        step=5,
        niter=300,
        idim=idim,
        noise=NOISE_STD / 10,
        released=False,
    )


@dataclass(frozen=True)
class Ascent:
    """What came out for one filter.

    picture: (idim, idim, 3) uint8; noise, end: the filter's mean activation in noise of std 20, whatever the
    start was, and in the result; layer: the mean over all filters of the layer in that noise; even: the
    filter's activation in the result brought to the contrast and the mean of that noise.
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


# ------------------------------------------------------------------------------- many filters


def ascend_layer(
    net: Network,
    name: str,
    channels: Sequence[int],
    settings: Settings,
    seed: int,
    batch: int,
    device: torch.device,
) -> Iterator[Ascent]:
    """The ascents of these channels of the map `name`, in their order, `batch` of them at a time.

    net is in eval mode: batch norm uses its running statistics, so that images do not see each other. Each
    picture depends on (weights, seed, name, channel, settings) and the kind of device only: not on batch, the
    other channels, or the number of cores. On a CPU that is exact; on a GPU as far as cuDNN repeats itself.
    """
    set_precision("fp32", device)
    prepared = prepare(net.to(device), fold=not settings.released)
    group = GROUP[device.type]

    def run(members: Sequence[int]) -> list[Ascent]:
        full = [*members, *[members[-1]] * (group - len(members))]  # always the same size
        return ascend(prepared, name, full, settings, seed, device)[: len(members)]

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


# ------------------------------------------------------------------------------- one batch of filters


def ascend(
    net: Network, name: str, channels: Sequence[int], settings: Settings, seed: int, device: torch.device
) -> list[Ascent]:
    """One ascent for each of the channels of the map `name`, as one batch through net."""
    target = torch.tensor(channels, device=device)
    whole, x = (
        torch.stack([noise(seed, name, c, std, settings) for c in channels]).to(device)
        for std in (NOISE_STD, settings.noise)
    )
    blur = blur_matrix(settings.idim, settings.sig).to(device)
    for i in range(1, settings.niter + 1):
        x = x + settings.lr * unit(gradient(net, name, x, target, settings.wd, settings.released))
        if settings.blurs_after(i):
            x = blur @ x @ blur.T
    with torch.no_grad():
        figures = [of_target(net, name, y, target) for y in (whole, x, like(x, whole))]
    (before, layer), (after, _), (even, _) = [[v.tolist() for v in pair] for pair in figures]
    pictures = to_pictures(x, settings.released).cpu().numpy()
    return [Ascent(*row) for row in zip(channels, pictures, before, layer, after, even)]


def noise(seed: int, name: str, channel: int, std: float, settings: Settings) -> torch.Tensor:
    """Noise for one filter: (3, idim, idim) float32, its own draw whatever else is computed."""
    layer = int(name[4:]) if name.startswith("conv") and name[4:].isdecimal() else name
    generator = torch.Generator().manual_seed(derive_seed(seed, "gradient-ascent", layer, channel))
    x = NOISE_MEAN + std * torch.randn(3, settings.idim, settings.idim, generator=generator)
    return x if settings.released else data.normalise(x)


def gradient(
    net: Network, name: str, x: torch.Tensor, target: torch.Tensor, wd: float, released: bool = False
) -> torch.Tensor:
    """d/dx of log softmax(mean activations)[target] - wd * ||x||^2, image by image: (B, 3, H, W).

    Where the ReLU lets nothing of the target through, its gradient is 0; there what enters the ReLU is used,
    or with released what enters the batch norm before it. A network that does not name what enters the ReLU
    (`NAME.pre`) has the map alone.
    """
    x = x.detach().requires_grad_()
    before = f"{name}.pre" if f"{name}.pre" in net.activation_names else None
    found = net.activations(x, [name] if before is None else [before, name])
    values = found[name].mean(dim=(2, 3))  # (B, filters)
    dead = values.gather(1, target[:, None]) == 0
    if before is not None and dead.any():
        instead = entering(net, before, x) if released else found[before]
        values = torch.where(dead, instead.mean(dim=(2, 3)), values)
    score = values.log_softmax(dim=1).gather(1, target[:, None]).sum()
    (of_score,) = torch.autograd.grad(score, x)
    return of_score - 2 * wd * x.detach()


def entering(net: Network, name: str, x: torch.Tensor) -> torch.Tensor:
    """What enters the layer whose output is the activation `name`: the convolution's, before batch norm."""
    for found, layer in net.walk():
        if found == name:
            return x
        x = layer(x)
    raise KeyError(name)


def of_target(
    net: Network, name: str, x: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The target's mean activation (B,), and the mean over all filters of the layer (B,)."""
    values = net.activations(x, [name])[name].mean(dim=(2, 3))
    return values.gather(1, target[:, None]).squeeze(1), values.mean(dim=1)


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


def to_pictures(x: torch.Tensor, released: bool) -> torch.Tensor:
    """Network inputs (B, 3, H, W) -> (B, H, W, 3) uint8: centred, scaled to std 0.1 around 0.5, clipped."""
    if not released:  # back to the scale of pixels, in which grey is grey
        x = x * torch.tensor(data.IMAGENET_STD, device=x.device).view(3, 1, 1)
        x = x + torch.tensor(data.IMAGENET_MEAN, device=x.device).view(3, 1, 1)
    std, mean = torch.std_mean(x, (1, 2, 3), keepdim=True)
    x = (x - mean) / std.clamp(min=1e-12) * PICTURE_STD + 0.5
    return (x.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


# ------------------------------------------------------------------------------- the network, faster


def prepare(net: Network, fold: bool = True) -> Network:
    """A view of net in eval mode that gives the same activations up to rounding, the first layer by blocks.

    fold: convolutions carry their batch norm. Weights are shared with net or copied; net stays as it is.
    """
    net = net.eval().folded() if fold else net.eval()
    conv = first_conv(net)
    return replaced(net, conv, BlockConv(conv)) if goes_by_blocks(conv) else net


def replaced(module: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """module with `new` where `old` is in it: copies on the way down to it, everything else is shared."""
    if module is old:
        return new
    children = {
        name: None if child is None else replaced(child, old, new) for name, child in module._modules.items()
    }
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    changed = copy.copy(module)
    changed._modules = children
    return changed


def goes_by_blocks(conv: nn.Conv2d) -> bool:
    """Whether BlockConv can take this convolution's place."""
    square = all(len(set(pair)) == 1 for pair in (conv.kernel_size, conv.stride, conv.padding))
    plain = conv.groups == 1 and set(conv.dilation) == {1} and conv.padding_mode == "zeros"
    return square and plain and conv.stride[0] > 1


class BlockConv(nn.Conv2d):
    """A convolution of stride s as one of stride 1 over blocks of s x s pixels, made from `conv`.

    The same sums in another order: pixels within a block become channels, in the image and in the kernel,
    which is padded by zeros to whole blocks. For a CPU: with two or three channels in, the gradient of a
    strided convolution is slow there (benchmarks/gradient_ascent.py).
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        block, kernel = conv.stride[0], conv.kernel_size[0]
        blocks = math.ceil(kernel / block)
        super().__init__(conv.in_channels * block**2, conv.out_channels, blocks, device=conv.weight.device)
        self.block, self.kernel, self.border = block, kernel, conv.padding[0]
        padded = F.pad(conv.weight.detach(), (0, blocks * block - kernel) * 2)
        self.weight = nn.Parameter(F.pixel_unshuffle(padded, block), requires_grad=False)
        bias = None if conv.bias is None else conv.bias.detach().clone()
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pads = []
        for side in (x.shape[-1], x.shape[-2]):
            outputs = (side + 2 * self.border - self.kernel) // self.block + 1
            covered = (outputs - 1 + self.kernel_size[0]) * self.block
            pads += [self.border, covered - side - self.border]  # below 0 where the last pixels see no kernel
        return super().forward(F.pixel_unshuffle(F.pad(x, pads), self.block))
