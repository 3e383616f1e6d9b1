"""Fine-tuning on few labels: defaults, lists and draws, resume, several processes, shards, any backbone."""

# ruff: noqa: F811 (fixtures are imported, and asked for by name)
import json

import pytest
import torch

import checkpoint
import eval_knn
import eval_semisup
import util
from data import list_images
from models import weights
from tests import ranks, toy
from tests.finetune_runs import assert_same_run, call, labelled, semisup, signal_at  # noqa: F401
from tests.helpers import refuses
from training import logs


def parse(*flags):
    return eval_semisup.get_parser().parse_args(["--data", "DATA", "--model", "random:toy", *flags])


@pytest.fixture(scope="module")
def whole(labelled, tmp_path_factory):
    """EXP and results of two draws of two epochs of three steps."""
    exp = tmp_path_factory.mktemp("semisup") / "exp"
    return exp, semisup(labelled, exp, "--draws 2")


def test_flags_have_the_authors_names_and_defaults():
    args = parse("--data_path", "A", "--pretrained", "B", "--dump_path", "C")
    assert (args.data, args.model, args.exp) == ("A", "B", "C")
    assert (args.labels_perc, args.epochs, args.decay_epochs, args.gamma) == (10, 20, [12, 16], 0.2)
    assert (args.wd, args.momentum, args.batch, args.seed) == (0, 0.9, 256, 31)
    with refuses("labels_perc.*invalid choice"):
        parse("--labels_perc", "5")


@pytest.mark.parametrize("percent, lr, head", [(10, 0.01, 0.2), (1, 0.02, 5)])
def test_rates_are_those_of_the_percentage_unless_given(labelled, tmp_path, percent, lr, head):
    flags = f"--model random:toy --labels_perc {percent} --epochs 1 --batch 4"
    call(eval_semisup, "--data", labelled, "--exp", tmp_path, flags)
    saved = checkpoint.read(tmp_path / "semisup.pth.tar")
    groups = [saved["optimizer"]["param_groups"][0], saved["parts"]["head"]["param_groups"][0]]
    assert [group["lr"] for group in groups] == [lr, head]
    assert all(group["weight_decay"] == 0 and group["momentum"] == 0.9 for group in groups)


def test_rates_of_the_last_epoch_have_fallen(whole):
    saved = checkpoint.read(whole[0] / "semisup.pth.tar")  # decay at epoch 1 of each draw, which is the last
    assert saved["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.002)
    assert saved["parts"]["head"]["param_groups"][0]["lr"] == pytest.approx(0.01)


def test_results_tell_every_draw_their_mean_and_the_protocol(whole):
    exp, found = whole
    written = json.loads((exp / "results.json").read_text())["semisup"]
    assert written["results"] == found and len(found["trainings"]) == 2
    assert all(one["images"] == 8 and one["classes"] == 4 for one in found["trainings"])
    values = [one["best"]["val"]["prec@1"] for one in found["trainings"]]
    assert found["prec@1"]["mean"] == pytest.approx(sum(values) / 2)
    assert found["prec@1"]["deviation"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    protocol = written["protocol"]
    assert protocol["train images"] == "8 of 80" and protocol["classes"] == 4
    assert protocol["labels"] == "10 %, 2 of every class, drawn" and protocol["batch"] == 3
    lines = logs.read_lines(exp / "semisup.jsonl")
    assert [(line["epoch"], line["training"]) for line in lines] == [(0, 0), (1, 0), (2, 1), (3, 1)]
    assert "epoch 3 is epoch 1 of training 1 (0 to 1)  train loss" in (exp / "semisup.log").read_text()
    for line in lines:  # the engine's mean of the epoch's steps, and what was counted in them
        assert line["train"]["loss"] == pytest.approx(line["loss"])


def test_the_first_of_several_draws_is_the_one_that_runs_alone(whole, labelled, tmp_path):
    alone = semisup(labelled, tmp_path / "exp")
    assert alone["trainings"] == whole[1]["trainings"][:1] and alone["prec@1"]["deviation"] is None
    one, two = (checkpoint.read(path) for path in (
        tmp_path / "exp/semisup_best.pth.tar", whole[0] / "semisup_best_0.pth.tar"
    ))  # fmt: skip
    assert all(torch.equal(value, two["state_dict"][name]) for name, value in one["state_dict"].items())
    digests = checkpoint.read(whole[0] / "semisup.pth.tar")["parts"]["chosen"]["digests"]
    assert digests[0] != digests[1]


@pytest.mark.parametrize("at", [1, 2, 5, 7, 8])
def test_run_that_a_signal_ends_goes_on_exactly(whole, labelled, tmp_path, monkeypatch, at):
    """In mid-epoch, at an epoch's end, at a draw's end (6 steps each), in the second draw."""
    with monkeypatch.context() as patch:
        signal_at(at, patch)
        with pytest.raises(util.Preempted, match="SIGTERM"):
            semisup(labelled, tmp_path / "exp", "--draws 2")
    saved = checkpoint.read(tmp_path / "exp/semisup.pth.tar")
    assert (saved["iteration"], saved["position"]) == (at + 1, at % 3 + 1)
    assert semisup(labelled, tmp_path / "exp", "--draws 2 --resume auto") == whole[1]
    assert_same_run(whole[0], tmp_path / "exp", "semisup")


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_run_killed_before_its_checkpoint_does_the_epoch_again(
    whole, labelled, tmp_path, monkeypatch, number
):
    save, seen = checkpoint.save, []

    def save_until(path, state):
        if path.name == "semisup.pth.tar":
            seen.append(path)
            if len(seen) == number + 1:  # 0: that before the first step
                raise KeyboardInterrupt
        save(path, state)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save_until)
        with pytest.raises(KeyboardInterrupt):
            semisup(labelled, tmp_path / "exp", "--draws 2")
    assert semisup(labelled, tmp_path / "exp", "--draws 2 --resume") == whole[1]
    assert_same_run(whole[0], tmp_path / "exp", "semisup")


def test_a_run_that_goes_on_elsewhere_takes_its_best_networks_along(whole, labelled, tmp_path):
    last = whole[0] / "semisup.pth.tar"
    assert semisup(labelled, tmp_path, "--draws 2 --resume", last) == whole[1]
    for name in ("semisup_best_0.pth.tar", "semisup_best_1.pth.tar"):
        assert (tmp_path / name).read_bytes() == (whole[0] / name).read_bytes()


def test_a_run_does_not_go_on_with_other_labels_or_lengths(labelled, tmp_path):
    (tmp_path / "a.txt").write_text("astronaut/00.jpg\nbrick/01.jpg\ncamera/02.jpg\ncat/03.jpg\n")
    (tmp_path / "b.txt").write_text("astronaut/00.jpg\nbrick/01.jpg\ncamera/02.jpg\ncat/04.jpg\n")
    found = semisup(labelled, tmp_path / "exp", "--epochs 1 --list", tmp_path / "a.txt")
    assert found["trainings"][0]["images"] == 4
    with refuses("chosen does not fit .*other labelled images"):
        semisup(labelled, tmp_path / "exp", "--resume --list", tmp_path / "b.txt")
    with refuses("was run with draws 1, not 2"):
        semisup(labelled, tmp_path / "exp", "--resume --draws 2 --list", tmp_path / "a.txt")
    longer = semisup(labelled, tmp_path / "exp", "--resume --list", tmp_path / "a.txt")
    assert longer["trainings"][0]["last"]["epoch"] == 1


def test_draws_are_not_made_longer(whole, labelled, tmp_path):
    with refuses("chosen does not fit .each draw had 2 epochs, not 3"):
        semisup(labelled, tmp_path, "--draws 2 --epochs 3 --resume", whole[0] / "semisup.pth.tar")


def test_mistakes_are_told_before_anything_is_written(labelled, tmp_path):
    for flags, said in (
        ("--exp EXP", "--data is missing"),
        ("--exp EXP --shards a.tar", "--data is missing: .* or --shards and --val-shards"),
        (f"--exp EXP --data {labelled} --shards a.tar --val-shards b.tar", "not both"),
        (
            "--exp EXP --shards a.tar --val-shards b.tar --labels c.csv",
            "--labels: is of the images in --data",
        ),
    ):
        with refuses(said):
            call(eval_semisup, "--model random:toy", flags.replace("EXP", str(tmp_path / "exp")))
    with refuses("--model is missing"):
        call(eval_semisup, "--data", labelled, "--exp", tmp_path / "exp")
    assert not (tmp_path / "exp").exists()


def test_its_networks_go_into_other_evaluations(whole, labelled, tmp_path):
    for name in ("semisup.pth.tar", "semisup_best_1.pth.tar"):
        net = weights.load(whole[0] / name)
        assert net.arch == "toy" and net.top_layer.out_features == 4
        found = call(eval_knn, "--data", labelled, "--model", whole[0] / name, "--k 3 --exp", tmp_path)
        assert [row["layer"] for row in found] == ["b", "pooled"]


@pytest.mark.parametrize("arch", ["resnet18s", "tiny:sobel"])
def test_other_networks_too(labelled, tmp_path, arch):
    found = semisup(labelled, tmp_path, f"--model random:{arch} --epochs 1 --batch 4")
    assert 0 <= found["prec@1"]["mean"] <= 100


def test_a_file_of_labels_gives_the_run_of_class_folders(labelled, tmp_path):
    lines = ["path,label"]
    for split in ("train", "val"):
        paths = list_images(labelled / split).paths
        lines += [f"{split}/{path},{path.split('/')[0]}" for path in paths]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    found = semisup(labelled, tmp_path / "file", "--labels", tmp_path / "labels.csv")
    assert found == semisup(labelled, tmp_path / "folder")


def test_shards_give_the_run_of_their_folder(labelled, tmp_path):
    pytest.importorskip("webdataset")
    from tools import make_shards

    for split in ("train", "val"):
        out = tmp_path / f"{split}-%03d.tar"
        arguments = [str(labelled / split), str(out), "--workers", "0", "--size-mb", "0.05"]
        make_shards.main(make_shards.get_parser().parse_args(arguments))
    patterns = f"--shards {tmp_path}/train-*.tar --val-shards {tmp_path}/val-*.tar"
    flags = "--model random:toy --epochs 2 --batch 3 --decay_epochs 1 --lr_last_layer 0.05"
    found = call(eval_semisup, patterns, "--exp", tmp_path / "shards", flags)
    assert found == semisup(labelled, tmp_path / "folder")
    assert_same_run(tmp_path / "folder", tmp_path / "shards", "semisup", but=("protocol",))


def on_rank(*words):
    """A run as a rank of several makes it: its results, and the weights that each draw ends with."""
    toy.register()
    found = semisup(*words)
    return found, [checkpoint.read(path)["state_dict"] for path in sorted(words[1].glob("*_best_*.pth.tar"))]


@pytest.mark.slow
def test_two_processes_give_the_run_of_one(labelled, tmp_path):
    """Of three images in a step the one rank has one and the other two; batch norm is over all of them."""
    flags = "--draws 2 --epochs 1"
    one, expected = on_rank(labelled, tmp_path / "one", flags)
    for two, states in ranks.spawn(on_rank, 2, labelled, tmp_path / "two", flags):
        for a, b in zip(two["trainings"], one["trainings"], strict=True):
            for split in ("train", "val"):
                assert a["last"][split] == pytest.approx(b["last"][split], rel=1e-3)
        for state, weights_of in zip(states, expected, strict=True):
            for name, value in weights_of.items():
                torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-5, msg=name)
