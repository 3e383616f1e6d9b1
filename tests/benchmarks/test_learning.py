"""The table of what methods learn: nothing is done twice, recipes fit the scripts, figures are right."""

import importlib

import numpy as np
import pytest
import torch
from PIL import Image

import models
from benchmarks import learning
from data import PlainView, central_crop, list_images
from features import Pass
from models.inputs import Inputs
from tests.helpers import equal
from tests.small_run import write_crops


@pytest.mark.parametrize("method", learning.RECIPES)
@pytest.mark.parametrize("arch", ["alexnet", "resnet18", "resnet18s"])
def test_every_recipe_is_a_command_line_of_its_script(method, arch, photos):
    script, *flags = learning.command(method, subject(photos, arch), 3)
    args = importlib.import_module(script.removesuffix(".py")).get_parser().parse_args(flags)
    assert (args.arch, args.epochs) == (arch, 3)


def subject(folder, arch):
    view = PlainView(list_images(folder), central_crop(64))
    return learning.Subject(
        str(folder), view, view, arch.removesuffix("s"), arch, 64, folder, ["--workers", "0"]
    )


def test_the_table_gives_mean_range_and_gain():
    figures = {name: 0.5 for name in learning.FIGURES}
    rows = [{"network": learning.RANDOM, "seed": seed} | figures for seed in (1, 2)]
    rows += [
        {"network": "swav", "seed": seed, "epochs": 4, "minutes": seed} | figures | {"kNN": value}
        for seed, value in ((1, 0.5), (2, 0.8))
    ]
    *_, random, swav = learning.table(rows)
    assert random == f"| {learning.RANDOM} | - |" + 4 * " 0.500 (0.500 to 0.500) |"
    assert swav.startswith(
        "| swav | 4, 1.5 | 0.650 (0.500 to 0.800) +0.150 | 0.500 (0.500 to 0.500) +0.000 |"
    )


def test_tables_are_replaced_where_they_stand(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n")
    learning.write_between(page, "a", ["1"])
    learning.write_between(page, "b", ["2"])
    learning.write_between(page, "a", ["3", "4"])
    text = page.read_text()
    assert (
        text.split()
        == "before <!-- a: begin --> 3 4 <!-- a: end --> <!-- b: begin --> 2 <!-- b: end -->".split()
    )


def test_the_linear_classifier_finds_what_is_linear_and_only_that():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 5)).astype(np.float32)
    linear, xor = (x[:, 0] + x[:, 1] > 0).astype(int), (x[:, 0] * x[:, 1] > 0).astype(int)
    assert learning.linear_accuracy(x[:300], linear[:300], x[300:], linear[300:]) > 0.85
    assert learning.linear_accuracy(x[:300], xor[:300], x[300:], xor[300:]) < 0.7


def train_here(method, subject, epochs, exp, seed):
    """learning.train in this process, which knows the toy network."""
    script, *flags = learning.command(method, subject, epochs)
    module = importlib.import_module(script.removesuffix(".py"))
    module.main(module.get_parser().parse_args([*flags, "--exp", str(exp), "--seed", str(seed)]))


def test_a_second_call_judges_from_the_files(tmp_path, monkeypatch):
    for split, first in (("train", 0), ("val", 8)):
        write_crops(tmp_path / "set" / split, pictures=3, each=8, first=first)
    call = [f"{tmp_path}/set", "--exp", f"{tmp_path}/exp", "--seeds", "1", "2", "--methods", "deepcluster"]
    call += ["--minutes", "0.01", "--workers", "0", "--device", "cpu", "--k-nearest", "3"]
    monkeypatch.setattr(learning, "NETWORKS", {"toy": "b"})
    monkeypatch.setattr(learning, "train", train_here)
    args = learning.get_parser().parse_args(call)
    args.networks = ["toy"]
    first = learning.main(args)
    monkeypatch.setattr(learning, "train", None)
    monkeypatch.setattr(learning, "load", None)
    assert learning.main(args) == first
    names = [learning.RANDOM, learning.ADAPTED, "deepcluster"]
    assert [row["network"] for row in first] == [learning.PIXELS, *(name for name in names for _ in "12")]
    assert all(0 <= row[figure] <= 1 for row in first for figure in learning.FIGURES)
    random, adapted = first[1], first[3]
    assert any(random[figure] != adapted[figure] for figure in learning.FIGURES)


class BrightSide(torch.nn.Module):
    """Tells by how many quarters a picture was turned whose top was bright; two super-clusters."""

    inputs = Inputs()

    def activations(self, x, names):
        sides = [
            x[..., :4, :],
            x[..., :4],
            x[..., -4:, :],
            x[..., -4:],
        ]  # turned counter-clockwise: top, left, ...
        scores = torch.stack([side.mean((1, 2, 3)) for side in sides], 1)
        return {"logits": torch.cat([scores - 1, scores], 1)}


def test_turns_are_told_of_all_four_and_counted(tmp_path):
    for name, row in (("a", slice(0, 8)), ("b", slice(0, 16))):
        picture = np.zeros((64, 64, 3), np.uint8)
        picture[row] = 255
        (tmp_path / name).mkdir()
        Image.fromarray(picture).save(tmp_path / name / "0.png")
    view = PlainView(list_images(tmp_path), lambda picture: picture)
    how = Pass(1, 0, torch.device("cpu"))
    assert learning.turns_told(BrightSide(), view, how) == 1
    upside_down = PlainView(list_images(tmp_path), lambda picture: picture.flip(-2))
    assert learning.turns_told(BrightSide(), upside_down, how) == 0


def test_adapting_changes_the_statistics_alone(photos):
    net = models.build("toy", seed=0)
    view = PlainView(list_images(photos), central_crop(32))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    learning.adapt(net, view, Pass(len(view), 0, torch.device("cpu")))
    after = net.state_dict()
    changed = {name for name in before if not equal(before[name], after[name])}
    assert changed and all("running_" in name or "num_batches" in name for name in changed)
