"""eval_retrieval.py: regions, pooling, whitening, AP, ground truth, the stages from folder to figure."""

import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import data
import eval_retrieval as er
import models
from util import UserError

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "demo" / "pictures"
CITY_PICTURES = {
    "Oxford": ["astronaut", "cat", "coffee", "coins", "raccoon", "rocket"],
    "Paris": ["dahlia", "footbridge", "hopper", "pagoda", "stairs", "earth"],
}
CROPS = 5  # of each picture
SIZE = 112


# -------------------------------------------------------------------------------- small data sets


def make_city(root: Path, pictures: list[str], seed: int) -> Path:
    """A folder in the shape of Oxford5k: jpg/ with overlapping crops, lab/ with one query a picture.

    The first crop is the query's image and 'good', the last one 'ok'; 'junk' is the fourth.
    """
    rng = np.random.default_rng(seed)
    (root / "jpg").mkdir(parents=True)
    (root / "lab").mkdir()
    for picture in pictures:
        image = Image.open(PICTURES / f"{picture}.jpg").convert("RGB")
        width, height = image.size
        w, h = int(0.75 * width), int(0.75 * height)
        names = [f"{picture}_{i:06d}" for i in range(CROPS)]
        for name in names:
            x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
            image.crop((x, y, x + w, y + h)).resize((w // 2, h // 2)).save(
                root / f"jpg/{name}.jpg", quality=90
            )
        box = f"{0.05 * w:.1f} {0.05 * h:.1f} {0.45 * w:.1f} {0.45 * h:.1f}"
        lists = {"query": [f"oxc1_{names[0]} {box}"], "ok": names[4:], "good": names[:3], "junk": names[3:4]}
        for kind, lines in lists.items():
            (root / f"lab/{picture}_1_{kind}.txt").write_text("".join(line + "\n" for line in lines))
    return root


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("datasets")
    for seed, (city, pictures) in enumerate(CITY_PICTURES.items()):
        make_city(folder / city, pictures, seed)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "checkpoint.pth.tar"
    checkpoint.save(
        path, {"arch": "alexnet", "state_dict": models.build("alexnet", sobel=False, seed=1).state_dict()}
    )
    return path


def call(datasets: Path, exp: Path, model: Path | None, *flags: str) -> dict | None:
    arguments = ["--datasets", datasets, "--exp", exp, "--S", SIZE, "--workers", 0, "--device", "cpu"]
    arguments += ["--model", model] if model else []
    return er.main(er.get_parser().parse_args([str(word) for word in (*arguments, *flags)]))


@pytest.fixture(scope="module")
def exp(datasets, model, tmp_path_factory) -> Path:
    """Where one plain run of all stages left its files."""
    folder = tmp_path_factory.mktemp("exp")
    call(datasets, folder, model)
    return folder


# -------------------------------------------------------------------------------- regions


def slow_regions(width: int, height: int, levels: int) -> list[tuple[int, int, int, int]]:
    """The specification line by line, in plain Python floats."""
    w = min(width, height)
    nearest, extra = math.inf, 0
    if width != height:
        for index, steps in enumerate(range(2, 8), start=1):
            b = (max(width, height) - w) / (steps - 1)
            distance = abs((w * w - w * b) / (w * w) - 0.4)
            if distance < nearest:
                nearest, extra = distance, index
    found = []
    for level in range(1, levels + 1):
        wl = math.floor(2 * w / (level + 1))
        wl2 = math.floor(wl / 2 - 1)
        starts = []
        for length, e in ((width, extra * (width > height)), (height, extra * (height > width))):
            b = (length - wl) / (level + e - 1) if level + e > 1 else 0
            starts.append([round(math.floor(wl2 + b * i) - wl2) for i in range(level + e)])
        for y in starts[1]:
            for x in starts[0]:
                found.append((x - max(x + wl - width, 0), y - max(y + wl - height, 0), wl, wl))
    return found


def test_regions_of_hand_computed_maps():
    # square, w = 4: no extra. Level 1: one of 4. Level 2: floor(8 / 3) = 2, starts 0 and 2.
    assert er.regions(4, 4, 2).tolist() == [
        [0, 0, 4, 4], [0, 0, 2, 2], [2, 0, 2, 2], [0, 2, 2, 2], [2, 2, 2, 2],
    ]  # fmt: skip
    # 6 x 4: overlaps 1 - (2 / (steps - 1)) / 4 = 0.5, 0.75, ...: the first is nearest to 0.4, so one extra.
    # Level 2: side 2, three along x with b = (6 - 2) / 2 = 2.
    assert er.regions(6, 4, 1).tolist() == [[0, 0, 4, 4], [2, 0, 4, 4]]
    assert er.regions(6, 4, 2)[2:].tolist() == [
        [0, 0, 2, 2], [2, 0, 2, 2], [4, 0, 2, 2], [0, 2, 2, 2], [2, 2, 2, 2], [4, 2, 2, 2],
    ]  # fmt: skip
    # 64 x 48, a photograph at S = 1024: 2 + 6 + 12 regions; level 3 starts at floor(11 + 40 / 3 i) - 11.
    boxes = er.regions(64, 48, 3)
    assert len(boxes) == 20
    assert boxes[8:12].tolist() == [[0, 0, 24, 24], [13, 0, 24, 24], [26, 0, 24, 24], [40, 0, 24, 24]]
    # 40 x 10: overlaps 1 - 3 / (steps - 1) = ..., 0.25, 0.4, 0.5: the fifth, so six squares in level 1.
    assert er.regions(40, 10, 1)[:, 0].tolist() == [0, 6, 12, 18, 24, 30]


def test_regions_equal_the_slow_version_over_many_sizes():
    for width in range(2, 72):
        for height in range(2, 72, 1 if width % 7 == 0 else 5):
            for levels in (1, 2, 3):
                ours = [tuple(box) for box in er.regions(width, height, levels).tolist()]
                assert ours == slow_regions(width, height, levels), (width, height, levels)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (30, 1), (2, 5), (3, 3), (64, 3)])
@pytest.mark.parametrize("levels", [1, 3, 5])
def test_regions_are_never_empty_and_never_leave_the_map(size, levels):
    boxes = er.regions(*size, levels)
    assert boxes.min(axis=0)[:2].tolist() == [0, 0] and boxes[:, 2:].min() >= 1
    assert (boxes[:, 0] + boxes[:, 2]).max() <= size[0] and (boxes[:, 1] + boxes[:, 3]).max() <= size[1]


@pytest.mark.parametrize("size", [(1, 1), (9, 4), (4, 9), (7, 7), (13, 12), (40, 30)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_pooling_equals_a_loop_over_regions(size, channels_last):
    maps = torch.randn(1, 11, size[1], size[0], generator=torch.Generator().manual_seed(0))
    if channels_last:
        maps = maps.contiguous(memory_format=torch.channels_last)
    expected = [maps[0, :, y : y + h, x : x + w].amax((1, 2)) for x, y, w, h in er.regions(*size, 3)]
    assert torch.equal(er.pool_regions(maps[0], 3), torch.stack(expected))


# -------------------------------------------------------------------------------- whitening, descriptor


def test_whitened_rows_are_uncorrelated_and_of_unit_variance():
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((9000, 6)) * [5, 4, 3, 2, 1, 0.5] @ rng.standard_normal((6, 6)) + 3).astype(
        "f4"
    )
    mean, matrix = er.fit_whitening(rows, 4)
    whitened = (rows - mean) @ matrix
    assert matrix.shape == (6, 4)
    np.testing.assert_allclose(whitened.T @ whitened / len(rows), np.eye(4), atol=1e-6)
    # the first axis is the one of largest variance
    values = np.linalg.eigvalsh(np.cov(rows.astype(float).T, bias=True))
    np.testing.assert_allclose(1 / np.linalg.norm(matrix[:, 0]) ** 2, values[-1], rtol=1e-6)


def test_small_eigenvalues_are_raised_to_the_floor():
    rng = np.random.default_rng(0)
    rows = np.zeros((500, 5), np.float32)
    rows[:, 0], rows[:, 1] = 3 * rng.standard_normal(500), rng.standard_normal(500)
    _, matrix = er.fit_whitening(rows)
    largest = np.var(rows[:, 0].astype(float))
    assert matrix.shape == (5, 5)
    np.testing.assert_allclose(np.linalg.norm(matrix[:, 2:], axis=0), 1 / np.sqrt(largest * 1e-5), rtol=1e-2)
    with pytest.raises(UserError, match="equal"):
        er.fit_whitening(np.ones((10, 3), np.float32))


def test_descriptor_follows_the_recipe_step_by_step():
    generator = torch.Generator().manual_seed(0)
    activation = torch.rand(6, 5, 8, generator=generator)
    whitening = er.Whitening(torch.rand(6, generator=generator), torch.randn(6, 3, generator=generator))
    total = np.zeros(3)
    for x, y, w, h in er.regions(8, 5, 3):
        v = activation[:, y : y + h, x : x + w].amax((1, 2)).double().numpy()
        v = (v / np.linalg.norm(v) - whitening.mean.numpy()) @ whitening.matrix.double().numpy()
        total += v / np.linalg.norm(v)
    ours = er.rmac(er.region_descriptors(activation, 3), whitening)
    np.testing.assert_allclose(ours.numpy(), total / np.linalg.norm(total), atol=1e-5)


# -------------------------------------------------------------------------------- views


def test_longer_side_becomes_s_and_the_box_is_cut_out_after_resizing():
    image = torch.zeros(3, 200, 400, dtype=torch.uint8)
    image[:, 50:100, 100:300] = 255
    assert er.resized_view(er.Item(Path("x")), image, 100).shape == (3, 50, 100)
    assert er.resized_view(er.Item(Path("x")), image.transpose(1, 2), 100).shape == (3, 100, 50)
    view = er.resized_view(er.Item(Path("x"), (100.0, 40.0, 302.0, 100.0)), image, 100)
    whole = er.resized_view(er.Item(Path("x")), image, 100)
    assert torch.equal(view, whole[:, 10:25, 25:76])  # cut out of the resized image: a quarter of the box
    beyond = er.resized_view(er.Item(Path("x"), (-8.0, 40.0, 999.0, 999.0)), image, 100)
    assert torch.equal(beyond, whole[:, 10:])
    with pytest.raises(data.ImageError, match="holds no pixel"):
        er.resized_view(er.Item(Path("x"), (390.0, 10.0, 390.0, 20.0)), image, 100)


@pytest.mark.parametrize("arch", ["alexnet", "vgg16"])
def test_activation_is_the_last_relu_without_its_pooling(arch, monkeypatch):
    net = models.build(arch, sobel=True, seed=0).eval()
    with torch.no_grad():  # statistics that differ from layer to layer, as those of a trained net
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
    monkeypatch.setattr(checkpoint, "load_model", lambda path: net)
    view = torch.randint(0, 256, (3, 96, 64), dtype=torch.uint8)
    ours = er.open_network("net", torch.device("cpu")).activation(view, torch.device("cpu"))
    with torch.no_grad():
        expected = net.features[:-1](net.sobel(data.normalise(view[None])))[0]
    assert ours.shape[1:] == ((5, 3) if arch == "alexnet" else (6, 4))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_tiny_views_are_padded():
    network = er.Network(lambda x: x, "identity")
    assert network.activation(torch.zeros(3, 3, 40, dtype=torch.uint8), torch.device("cpu")).shape == (
        3,
        16,
        40,
    )


def test_pretrained_is_torchvisions_vgg16_up_to_its_last_relu(monkeypatch):
    from torchvision.models import vgg16

    net = vgg16(weights=None)
    monkeypatch.setattr(er, "vgg16", lambda weights, progress: net)
    network = er.open_network("pretrained", torch.device("cpu"))
    view = torch.randint(0, 256, (3, 48, 64), dtype=torch.uint8)
    with torch.no_grad():
        expected = net.features[:30](data.normalise(view[None]))[0]
    assert isinstance(net.features[30], torch.nn.MaxPool2d) and expected.shape == (512, 3, 4)
    torch.testing.assert_close(network.activation(view, torch.device("cpu")), expected, rtol=1e-4, atol=1e-5)


def test_pretrained_that_cannot_be_downloaded_is_one_line(monkeypatch):
    def offline(**_):
        raise OSError("Name or service not known")

    monkeypatch.setattr(er, "vgg16", offline)
    with pytest.raises(
        UserError, match=r"pretrained: .*Name or service not known.*put https://\S+\.pth"
    ) as error:
        er.open_network("pretrained", torch.device("cpu"))
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------- scores


@pytest.mark.parametrize(
    ("ranking", "positives", "junk", "expected"),
    [
        ("abcd", "ab", "", 1.0),
        # a at place 2: recall 0 -> 1, precision 0 -> 1/2, mean 1/4
        ("xa", "a", "", 0.25),
        # hits at 1 and 3: 1/2 * (1 + 1) / 2 + 1/2 * (1/2 + 2/3) / 2
        ("axb", "ab", "", 0.5 + 0.5 * (1 / 2 + 2 / 3) / 2),
        # junk in front, between and behind is as if it were not there
        ("jxjajj", "a", "j", 0.25),
        ("jabj", "ab", "j", 1.0),
        # a positive that is never found
        ("a", "ab", "", 0.5),
        ("xyz", "a", "", 0.0),
        # hits at 2, 3, 6 of what is not junk: a trapeze each, a third wide
        ("xajbyzjc", "abc", "j", ((0 + 1 / 2) / 2 + (1 / 2 + 2 / 3) / 2 + (2 / 5 + 3 / 6) / 2) / 3),
    ],
)
def test_average_precision_of_rankings_by_hand(ranking, positives, junk, expected):
    assert er.average_precision(ranking, positives, junk) == pytest.approx(expected, abs=1e-12)


def test_average_precision_equals_the_sum_over_hits_on_random_rankings():
    rng = np.random.default_rng(0)
    for _ in range(50):
        ranking = rng.permutation(60).tolist()
        chosen = rng.permutation(60).tolist()
        positives, junk = set(chosen[: rng.integers(1, 20)]), set(chosen[20 : 20 + rng.integers(0, 20)])
        places = [i for i, item in enumerate(x for x in ranking if x not in junk) if item in positives]
        area = 0.0
        for hit, place in enumerate(places):  # trapezes between consecutive hits, recall step 1 / positives
            before = hit / place if place else 1.0
            area += (before + (hit + 1) / (place + 1)) / 2 / len(positives)
        assert er.average_precision(ranking, positives, junk) == pytest.approx(area, abs=1e-12)


def test_precision_at_ten_shrinks_to_the_last_positive():
    assert er.precision_at("abxc", "abc", "") == 3 / 4  # the last positive is at place 4
    assert er.precision_at("jajb", "ab", "j") == 1.0
    assert er.precision_at("x" * 12 + "a", "a", "") == 0.0
    assert er.precision_at("axxxxxxxxxxb", "ab", "") == 1 / 10


def test_revisited_protocols_choose_the_right_lists():
    query = er.Query("q", "q", (0, 0, 1, 1), {"easy": ["e"], "hard": ["h"], "junk": ["j"]})
    ranking = [["j", "h", "x", "e"]]
    # easy: junk and hard are passed over, x, e: 1/4. hard: h first. medium: h, x, e: both are right
    assert er.score([query], ranking, "easy")["mAP"] == pytest.approx(25.0)
    assert er.score([query], ranking, "hard")["mAP"] == pytest.approx(100.0)
    medium = er.score([query], ranking, "medium")
    assert medium["mAP"] == pytest.approx(100 * (0.5 + 0.5 * (1 / 2 + 2 / 3) / 2))
    assert medium["mP@10"] == pytest.approx(200 / 3)


def test_queries_without_a_right_answer_are_left_out_of_the_mean():
    queries = [
        er.Query("a", "a", (0, 0, 1, 1), {"easy": ["e"], "hard": [], "junk": []}),
        er.Query("b", "b", (0, 0, 1, 1), {"easy": [], "hard": ["e"], "junk": []}),
    ]
    easy = er.score(queries, [["e"], ["e"]], "easy")
    assert easy["queries"] == 1 and easy["AP"] == {"a": 100.0} and easy["mAP"] == 100.0


# -------------------------------------------------------------------------------- search


def unit(*rows: list[float]) -> np.ndarray:
    x = np.array(rows, np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_ranking_is_by_dot_product_and_ties_keep_their_order():
    database = unit([0, 1], [1, 0], [1, 0], [1, 1])
    assert er.rank(unit([1, 0]), database).tolist() == [[1, 2, 3, 0]]


def test_query_expansion_searches_again_with_the_mean():
    # plain: a, b, d, c. Expanded by a, the mean points half way to a, and c passes b and d.
    database = unit([10, 7], [1, -0.75], [1, 3], [1, -1.6])
    assert er.rank(unit([1, 0]), database).tolist() == [[0, 1, 3, 2]]
    assert er.rank(unit([1, 0]), database, aqe=1).tolist() == [[0, 2, 1, 3]]
    query = unit([1, 0]) + database[:1]
    assert er.rank(unit([1, 0]), database, aqe=1).tolist() == np.argsort(-query @ database.T).tolist()


def test_database_side_augmentation_adds_the_nearest_others():
    rng = np.random.default_rng(0)
    database = unit(*rng.standard_normal((30, 5)).tolist())
    database[7] = database[3]  # a duplicate is a neighbour, the row itself is not
    augmented = er.augment_database(database, 2)
    for i, row in enumerate(database):
        others = sorted((j for j in range(30) if j != i), key=lambda j: -float(database[j] @ row))
        expected = row + database[others[0]] + database[others[1]]
        np.testing.assert_allclose(augmented[i], expected / np.linalg.norm(expected), atol=1e-6)
    assert 7 in np.argsort(-database @ database[3])[:2]
    expected = np.argsort(-unit([1, 0, 0, 0, 0]) @ augmented.T, kind="stable")
    assert er.rank(unit([1, 0, 0, 0, 0]), database, dbe=2).tolist() == expected.tolist()
    with pytest.raises(UserError, match="only 30 images"):
        er.rank(database[:1], database, dbe=30)


# -------------------------------------------------------------------------------- end to end


def test_descriptors_beat_shuffled_ones_by_far(exp, datasets):
    results = json.loads((exp / "results.json").read_text())["eval_retrieval_Oxford"]
    assert results["results"]["classic"]["queries"] == len(CITY_PICTURES["Oxford"])
    assert results["protocol"]["PCA"] == "whitening 512 learnt on Paris"
    index = json.loads((exp / "retrieval/Oxford_database.json").read_text())
    database = np.load(exp / "retrieval/Oxford_database.npy")
    queries = np.load(exp / "retrieval/Oxford_queries.npy")
    assert (
        database.dtype == np.float32
        and database.shape == (6 * CROPS, 256)
        and len(index["names"]) == 6 * CROPS
    )
    np.testing.assert_allclose(np.linalg.norm(database, axis=1), 1, atol=1e-5)
    shuffled = []
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(database))
        rankings = [[index["names"][i] for i in row] for row in er.rank(queries, database[order])]
        truth = er.read_queries(datasets / "Oxford", index["names"])
        shuffled.append(er.score(truth, rankings, "classic")["mAP"])
    assert results["results"]["classic"]["mAP"] > 70 > 40 > np.mean(shuffled)


def test_stages_one_by_one_give_what_all_gives_and_the_other_city_works(datasets, model, exp, tmp_path):
    for stage in er.STAGES[:-1]:
        assert call(datasets, tmp_path, model, "--stage", stage) is None
    results = call(datasets, tmp_path, None, "--stage", "eval")  # needs no model any more
    for name in ("Paris_regions", "Oxford_database", "Oxford_queries"):
        np.testing.assert_array_equal(*(np.load(x / f"retrieval/{name}.npy") for x in (exp, tmp_path)))
    assert results == json.loads((exp / "results.json").read_text())["eval_retrieval_Oxford"]["results"]
    call(datasets, tmp_path, model, "--eval", "Paris")
    both = json.loads((tmp_path / "results.json").read_text())
    assert set(both) == {"eval_retrieval_Oxford", "eval_retrieval_Paris"}
    assert both["eval_retrieval_Paris"]["protocol"]["PCA"] == "whitening 512 learnt on Oxford"


def test_a_killed_run_goes_on_with_the_images_that_are_left(datasets, model, exp, tmp_path, monkeypatch):
    decode, calls = data.decode, []

    def failing(path):
        calls.append(Path(path).stem)
        if len(calls) == 40:  # in the middle of db_features
            raise KeyboardInterrupt
        return decode(path)

    monkeypatch.setattr(data, "decode", failing)
    with pytest.raises(KeyboardInterrupt):
        call(datasets, tmp_path, model)
    assert len(list((tmp_path / "retrieval/Oxford_database.parts").glob("*.npy"))) == 9
    before = list(calls)
    call(datasets, tmp_path, model)
    total = 30 + 30 + 6  # regions of Paris, database, queries: each image once, and once more the one cut off
    assert len(calls) == total + 1 and calls[40] == before[39]
    for name in ("Paris_regions", "Oxford_database", "Oxford_queries"):
        np.testing.assert_array_equal(*(np.load(x / f"retrieval/{name}.npy") for x in (exp, tmp_path)))
    assert not list((tmp_path / "retrieval").glob("*.parts"))
    call(datasets, tmp_path, model)
    assert len(calls) == total + 1  # nothing is computed again


def test_workers_change_nothing(datasets, model, exp, tmp_path):
    call(datasets, tmp_path, model, "--workers", "2", "--stage", "extract_train")
    np.testing.assert_array_equal(*(np.load(x / "retrieval/Paris_regions.npy") for x in (exp, tmp_path)))


def test_multires_and_expansions_change_the_figures_sensibly(datasets, model, exp, tmp_path, capsys):
    for name in ("Paris_regions.npy", "Paris_regions.json", "Paris_pca.npz", "Paris_pca.json"):
        (tmp_path / name).write_bytes((exp / "retrieval" / name).read_bytes())
    three = call(datasets, tmp_path, model, "--multires", "--temp", str(tmp_path))
    one, many = (np.load(x / "Oxford_database.npy") for x in (exp / "retrieval", tmp_path))
    assert three["classic"]["mAP"] > 60
    assert 0.5 < (one * many).sum(axis=1).mean() < 0.999  # of the same images, yet not the same
    np.testing.assert_allclose(np.linalg.norm(many, axis=1), 1, atol=1e-5)
    plain = call(datasets, exp, model, "--stage", "eval")["classic"]
    for flag in ("--aqe", "--dbe"):
        expanded = call(datasets, exp, model, "--stage", "eval", flag, "2")["classic"]
        assert expanded["mAP"] > 60 and expanded["AP"].keys() == plain["AP"].keys()
    with pytest.raises(UserError, match="another scales"):
        call(datasets, exp, model, "--stage", "eval", "--multires")
    assert "from memory, unverified): DeepCluster 61.0" in capsys.readouterr().out


def test_descriptors_of_other_settings_are_refused(datasets, model, exp, tmp_path):
    with pytest.raises(UserError, match="S 112, now 128; use another --temp"):
        call(datasets, exp, model, "--S", "128")
    other = tmp_path / "other.pth.tar"
    net = models.build("alexnet", sobel=False, seed=2)
    checkpoint.save(other, {"arch": "alexnet", "state_dict": net.state_dict()})
    with pytest.raises(UserError, match="another model"):
        call(datasets, exp, other)
    with pytest.raises(UserError, match="run --stage extract_train first"):
        call(datasets, tmp_path / "new", model, "--stage", "train_pca")
    with pytest.raises(UserError, match="run --stage train_pca first"):
        call(datasets, tmp_path / "new", model, "--stage", "db_features")
    with pytest.raises(UserError, match="run --stage db_features first"):
        call(datasets, tmp_path / "new", model, "--stage", "eval")


# -------------------------------------------------------------------------------- bad input


@pytest.fixture
def city(tmp_path) -> Path:
    """A small Oxford that a test may damage."""
    return make_city(tmp_path / "Oxford", ["cat", "coins"], 0)


def read(city: Path) -> list[er.Query]:
    return er.read_queries(city, er.list_database(city))


def test_ground_truth_is_read(city):
    query = read(city)[0]
    assert (query.name, query.image) == ("cat_1", "cat_000000")  # without oxc1_
    assert query.box == (14.6, 11.2, 131.4, 101.2)
    assert query.lists["good"] == ["cat_000000", "cat_000001", "cat_000002"]
    assert (query.lists["ok"], query.lists["junk"]) == (["cat_000004"], ["cat_000003"])


def test_bad_ground_truth_is_refused_by_name(city):
    lab = city / "lab"
    (lab / "cat_1_junk.txt").write_text("cat_000003\nnowhere_000001\n")
    with pytest.raises(UserError, match=r"cat_1_junk\.txt: lists the image nowhere_000001, which is absent"):
        read(city)
    (lab / "cat_1_junk.txt").unlink()
    with pytest.raises(UserError, match=r"cat_1_junk\.txt is missing"):
        read(city)
    (lab / "cat_1_junk.txt").touch()
    for text in ("", "cat_000000 1 2 3", "cat_000000 1 2 3 four"):
        (lab / "cat_1_query.txt").write_text(text)
        with pytest.raises(UserError, match=r"cat_1_query\.txt: expected one line"):
            read(city)
    (lab / "cat_1_query.txt").write_text("oxc1_nobody 1 2 3 4")
    with pytest.raises(UserError, match="lists the image nobody"):
        read(city)
    (lab / "cat_1_query.txt").write_text("cat_000000 1 2 3 4")
    (lab / "cat_1_ok.txt").write_text("")
    (lab / "cat_1_good.txt").write_text("")
    with pytest.raises(UserError, match="no right answer"):
        read(city)


def test_missing_folders_and_empty_query_lists_are_refused(city, model, tmp_path):
    for file in (city / "lab").glob("*_query.txt"):
        file.unlink()
    with pytest.raises(UserError, match="holds no query"):
        read(city)
    (city / "lab").rename(city / "away")
    with pytest.raises(UserError, match="lab/ is missing in"):
        read(city)
    (city / "jpg").rename(city / "images")
    with pytest.raises(UserError, match="jpg/ is missing in"):
        er.list_database(city)
    with pytest.raises(UserError, match=r"Paris: no such folder"):
        call(tmp_path, tmp_path / "exp", model)
    with pytest.raises(UserError, match="--model is missing"):
        call(tmp_path, tmp_path / "exp", None)
    with pytest.raises(UserError, match="no such checkpoint"):
        call(tmp_path, tmp_path / "exp", tmp_path / "nothing")
    with pytest.raises(UserError, match="where is Paris"):
        er.main(er.get_parser().parse_args(["--model", str(model), "--exp", str(tmp_path / "exp")]))
    with pytest.raises(UserError, match="--L 0"):
        call(tmp_path, tmp_path / "exp", model, "--L", "0")


def test_corrupt_files_of_paris_are_left_out(city):
    assert len(er.CORRUPT) == 20
    (city / "jpg/paris_louvre_000136.jpg").write_bytes(b"\xff\xd8\xff broken")
    good = city / "lab/cat_1_good.txt"
    good.write_text(good.read_text() + "paris_louvre_000136\nparis_triomphe_000867\n")
    assert "paris_louvre_000136" not in er.list_database(city)
    assert read(city)[0].lists["good"] == ["cat_000000", "cat_000001", "cat_000002"]


def test_an_undecodable_image_is_named(datasets, model, tmp_path):
    make_city(tmp_path / "Paris", ["cat"], 0)
    (tmp_path / "Paris/jpg/cat_000001.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    with pytest.raises(UserError, match=r"cat_000001\.jpg: ") as error:
        call(datasets, tmp_path / "exp", model, "--paris", str(tmp_path / "Paris"), "--workers", "1")
    assert "\n" not in str(error.value)


def test_images_in_sub_folders_are_found_and_double_names_refused(city):
    (city / "jpg/more").mkdir()
    (city / "jpg/cat_000000.jpg").rename(city / "jpg/more/cat_000000.jpg")
    assert er.list_database(city)["cat_000000"] == city / "jpg/more/cat_000000.jpg"
    (city / "jpg/more/cat_000001.jpg").write_bytes((city / "jpg/cat_000001.jpg").read_bytes())
    with pytest.raises(UserError, match="same name"):
        er.list_database(city)


# -------------------------------------------------------------------------------- revisited


def truth_of(queries: list[er.Query], names: list[str], wrap) -> dict:
    """The content of a gnd pickle: hard is what was 'ok', easy what was 'good'."""
    images = [query.image for query in queries]
    database = [name for name in names if name not in images]  # as published: queries are no answers
    place = {name: i for i, name in enumerate(database)}

    def indexes(query: er.Query, kind: str):
        return wrap([place[name] for name in query.lists[kind] if name in place])

    gnd = [
        {"bbx": list(q.box), "easy": indexes(q, "good"), "hard": indexes(q, "ok"), "junk": indexes(q, "junk")}
        for q in queries
    ]
    return {"gnd": gnd, "imlist": database, "qimlist": images}


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "wrap", [list, np.array, lambda x: np.array(x, ">i4"), lambda x: [np.int64(i) for i in x]]
)
def test_ground_truth_pickles_of_every_kind_are_read(city, tmp_path, protocol, wrap):
    queries, names = read(city), list(er.list_database(city))
    path = tmp_path / "gnd.pkl"
    path.write_bytes(pickle.dumps(truth_of(queries, names, wrap), protocol))
    database, revisited = er.read_revisited(path, names)
    assert "cat_000000" not in database and len(database) == len(names) - 2
    assert revisited[0].box == queries[0].box
    assert revisited[0].lists == {
        "easy": ["cat_000001", "cat_000002"], "hard": ["cat_000004"], "junk": ["cat_000003"],
    }  # fmt: skip


def test_python_2_pickles_of_arrays_are_read(tmp_path):
    """Written by hand: text as bytes, and the raw content of an array as such text."""
    raw = b"\\x01\\x00\\x00\\x00\\x00\\x00\\x00\\x00"
    text = b"""(dp0
S'imlist'
p1
(lp2
S'a'
aS'b'
asS'qimlist'
p3
(lp4
S'b'
asS'gnd'
p5
(lp6
(dp7
S'bbx'
(lp8
F1.5
aF2
aF3
aF4
asS'easy'
cnumpy.core.multiarray
_reconstruct
(cnumpy
ndarray
(I0
tS'b'
tR(I1
(I1
tcnumpy
dtype
(S'i8'
I0
I1
tR(I3
S'<'
NNNI-1
I-1
I0
tbI00
S'RAW'
tbsS'hard'
(lp9
sS'junk'
(lp10
sas."""
    (tmp_path / "gnd.pkl").write_bytes(text.replace(b"RAW", raw))
    names, queries = er.read_revisited(tmp_path / "gnd.pkl", ["a", "b"])
    assert names == ["a", "b"] and queries[0].lists["easy"] == ["b"] and queries[0].box == (1.5, 2, 3, 4)


class Evil:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_malicious_pickles_are_refused_and_never_run(tmp_path, protocol):
    canary, path = tmp_path / "canary", tmp_path / "gnd.pkl"
    evils = [
        Evil(os.system, f"touch {canary}"),
        Evil(eval, f"open({str(canary)!r}, 'w')"),
        Evil(exec, f"open({str(canary)!r}, 'w')"),
        Evil(subprocess.call, ["touch", str(canary)]),
        Evil(np.load, "x.npy"),
        Evil(getattr, "text", "encode"),
        np.array([Evil(os.system, f"touch {canary}")], dtype=object),
        np.array([[1, 2]]),
        np.array(["a"]),
    ]
    for evil in evils:
        truth = {"gnd": [{"bbx": [0, 0, 1, 1], "easy": evil, "hard": [], "junk": []}]}
        path.write_bytes(pickle.dumps(truth | {"imlist": ["a"], "qimlist": ["a"]}, protocol))
        with pytest.raises(UserError, match=r"gnd\.pkl: (refused|not a ground truth)") as error:
            er.read_revisited(path, ["a"])
        assert "\n" not in str(error.value)
    assert not canary.exists()


def test_foreign_and_wrong_ground_truth_is_refused(tmp_path):
    path = tmp_path / "gnd.pkl"
    good = {
        "gnd": [{"bbx": [0, 0, 1, 1], "easy": [0], "hard": [], "junk": []}],
        "imlist": ["a"],
        "qimlist": ["a"],
    }
    with pytest.raises(UserError, match="No such file"):
        er.read_revisited(path, ["a"])
    path.write_bytes(b"hello")
    with pytest.raises(UserError, match=r"gnd\.pkl: "):
        er.read_revisited(path, ["a"])
    for change in (
        {"gnd": [{**good["gnd"][0], "easy": [1]}]},
        {"gnd": [{**good["gnd"][0], "easy": [-1]}]},
        {"gnd": [{**good["gnd"][0], "bbx": [1, 2, 3]}]},
        {"gnd": [{"bbx": [0, 0, 1, 1], "ok": [0], "junk": []}]},
        {"qimlist": ["a", "a"]},
        {"qimlist": [], "gnd": []},
    ):
        path.write_bytes(pickle.dumps(good | change))
        with pytest.raises(UserError, match=r"gnd\.pkl: (not a ground truth|holds no query)"):
            er.read_revisited(path, ["a"])
    path.write_bytes(pickle.dumps(good))
    with pytest.raises(UserError, match="lists the image a, which is absent"):
        er.read_revisited(path, ["b"])
    assert er.read_revisited(path, ["a"])[0] == ["a"]


def test_revisited_protocol_end_to_end_and_without_lab(datasets, model, exp, tmp_path):
    oxford = datasets / "Oxford"
    queries = er.read_queries(oxford, er.list_database(oxford))
    gnd = tmp_path / "gnd_roxford5k.pkl"
    gnd.write_bytes(pickle.dumps(truth_of(queries, list(er.list_database(oxford)), list), 2))
    results = call(datasets, exp, model, "--gnd", str(gnd))
    assert list(results) == ["classic", "easy", "medium", "hard"]
    assert results["medium"]["queries"] == 6 and results["medium"]["mAP"] > 60
    assert 0 < results["medium"]["mP@10"] <= 100
    alone = tmp_path / "Oxford"
    alone.mkdir()
    (alone / "jpg").symlink_to(oxford / "jpg")
    again = call(datasets, exp, model, "--gnd", str(gnd), "--oxford", str(alone), "--stage", "eval")
    assert list(again) == ["easy", "medium", "hard"] and again["hard"] == results["hard"]


# -------------------------------------------------------------------------------- from the shell


def test_shell_script_runs_all_stages(datasets, model, tmp_path):
    settings = {
        "DATASETS": datasets, "MODEL": model, "EXP": tmp_path / "exp", "EVAL": "Paris", "S": SIZE,
        "WORKERS": 0, "PYTHON": sys.executable,
    }  # fmt: skip
    environment = os.environ | {name: str(value) for name, value in settings.items()}
    done = subprocess.run(
        [ROOT / "eval_retrieval.sh", "--device", "cpu"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Paris classic: mAP" in done.stdout and "eval_retrieval_Paris protocol: " in done.stdout
    assert (tmp_path / "exp/results.json").is_file()


def test_shell_script_says_what_is_missing(tmp_path):
    environment = os.environ | {"PYTHON": sys.executable, "DATASETS": "", "MODEL": ""}
    done = subprocess.run(
        [ROOT / "eval_retrieval.sh"], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and "DATASETS" in done.stderr and done.stderr.count("\n") == 1
