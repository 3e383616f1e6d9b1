"""--labels: a CSV file gives what class folders give; its mistakes are named."""

import numpy as np
import pytest

import eval_linear
from evaluation.labelled import open_train_val, read_labels
from tests.evaluation.test_labelled import write
from tests.helpers import refuses


@pytest.fixture
def folders(tmp_path):
    return write(tmp_path / "images", train={"ant": 2, "bee": 3}, val={"ant": 1, "bee": 2})


def table(tmp_path, *lines):
    (tmp_path / "labels.csv").write_text("".join(f"{line}\n" for line in lines))
    return tmp_path / "labels.csv"


def opened(folder, labels=None, **more):
    return open_train_val(folder, 1, folder.parent / "bad.txt", labels=labels, **more)


def listed(images):
    names = [images.class_names[c] for c in images.classes]
    return sorted(zip((str(images.path(i)) for i in range(len(images))), names))


def lines_of(folder, prefix=""):
    return [
        f"{prefix}{split}/{name}/{path.name},{name}"
        for split in ("train", "val")
        for name in ("ant", "bee")
        for path in sorted((folder / split / name).iterdir())
    ]


def test_file_gives_what_folders_give(tmp_path, folders):
    by_folder = [listed(images) for images in opened(folders)]
    for prefix in ("", f"{folders}/", "./train/../"):
        file = table(tmp_path, "path,label", *lines_of(folders, prefix))
        assert [listed(images) for images in opened(folders, file)] == by_folder
    shuffled = np.random.default_rng(0).permutation(lines_of(folders))
    with_split = [f"{line},{line.split('/')[0]}" for line in shuffled]
    assert [
        listed(i) for i in opened(folders, table(tmp_path, "Path, Label, Split", *with_split))
    ] == by_folder


def test_split_column_wins_over_the_folders_and_images_may_lie_anywhere(tmp_path):
    root = write(tmp_path / "flat", all={"x": 4}) / "all" / "x"
    outside = write(tmp_path / "other", a={"b": 1}) / "a" / "b" / "0.png"
    lines = ["0.png,one,train", "1.png,two,train", "2.png,two,val", f"{outside},one,val"]
    train, val = opened(root, table(tmp_path, "path,label,split", *lines))
    assert list(train.paths) == ["0.png", "1.png"] and train.classes.tolist() == [0, 1]
    assert list(val.paths) == ["2.png", str(outside)] and val.classes.tolist() == [1, 0]
    assert val.class_names == ["one", "two"]
    assert val.decode(1).shape == (3, 20, 20)


def test_images_without_a_label_are_left_out_and_counted(tmp_path, folders):
    said = []
    train, _ = opened(folders, table(tmp_path, "path,label", *lines_of(folders)[1:]), log=said.append)
    assert "left out 1 of the 8 images" in said[0] and len(train) == 4


def test_one_class_in_val_will_do_and_one_in_val_alone_will_not(tmp_path, folders):
    lines = lines_of(folders)
    _, val = opened(folders, table(tmp_path, "path,label", *lines[:6]))
    assert val.classes.tolist() == [0] and val.class_names == ["ant", "bee"]
    with refuses("labels.csv: class cow is only in val/"):
        opened(folders, table(tmp_path, "path,label", *lines[:-1], lines[-1].replace("png,bee", "png,cow")))


def test_one_class_folder_in_val_will_do(tmp_path):
    folder = write(tmp_path / "images", train={"ant": 1, "bee": 1}, val={"bee": 2})
    assert opened(folder)[1].classes.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["train/ant/0.png,ant"], "first line must be path,label"),
        (["path,label"], "names no image"),
        (["path,label", "train/ant/0.png"], "line 2: expected path,label"),
        (["path,label", "train/ant/0.png,ant", "a.png,"], "line 3: a.png has no label"),
        (["path,label,split", "a.png,ant,test"], "line 2: split 'test' of a.png is neither train nor val"),
        (["path,label", "a.png,ant", "b.png,ant", "./a.png,ant"], r"line 4: ./a.png is in line 2 already"),
        (["path,label", "train/ant/9.png,ant"], r"train/ant/9.png does not exist in .* \(1 of 1 images"),
        (["path,label", "train/ant/0.png,ant"], "labels.csv names no image of val"),
    ],
)
def test_mistakes_are_named(tmp_path, folders, lines, message):
    with refuses(message):
        opened(folders, table(tmp_path, *lines))


def test_a_path_in_no_split_is_named(tmp_path):
    folder = write(tmp_path / "images", all={"x": 1})
    with refuses("all/x/0.png is neither in train/ nor in val/; put it there, or add a column split"):
        opened(folder, table(tmp_path, "path,label", "all/x/0.png,ant"))
    with refuses("cannot read .*nowhere.csv"):
        opened(folder, tmp_path / "nowhere.csv")


def test_digest_covers_the_labels(tmp_path, folders):
    one, two = (
        read_labels(table(tmp_path, "path,label", "train/a,x", f"train/b,{b}"), folders).of_split("train")
        for b in ("x", "y")
    )
    assert list(one.paths) == list(two.paths) and one.digest() != two.digest()


def probe(folder, exp, *flags):
    command = (
        f"--data {folder} --model random:tiny --conv 1 --image-size 32 --workers 0 --device cpu --exp {exp}"
    )
    return eval_linear.main(eval_linear.get_parser().parse_args([*command.split(), *map(str, flags)]))


def test_the_probe_by_a_file_is_the_probe_by_folders_and_goes_on_with_the_same_labels_alone(
    tmp_path, folders
):
    lines = lines_of(folders)
    by_file = ("--labels", table(tmp_path, "path,label", *lines))
    whole = probe(folders, tmp_path / "a", "--epochs", 2)
    probe(folders, tmp_path / "b", "--epochs", 1, *by_file)
    assert probe(folders, tmp_path / "b", "--epochs", 2, "--resume", "auto", *by_file) == whole

    lines[0] = lines[0].replace("png,ant", "png,bee")
    table(tmp_path, "path,label", *lines)
    with refuses("the run had other images"):
        probe(folders, tmp_path / "b", "--epochs", 3, "--resume", "auto", *by_file)


@pytest.mark.parametrize("line", [f"{'a' * 5000},ant", f"a.jpg,{'b' * 300}"])
def test_a_path_or_label_that_no_file_system_holds_is_refused(tmp_path, line):
    with refuses("line 2: .* is too long$"):
        read_labels(table(tmp_path, "path,label", line), tmp_path)


def test_spaces_after_commas_do_not_make_quotes_a_part_of_the_label(tmp_path):
    lines = ['0.png, "one", train', "1.png, one, train", '"2.png", "one, two", val']
    found = read_labels(table(tmp_path, "path, label, split", *lines), tmp_path)
    assert found.labels == ["one", "one", "one, two"] and found.splits == ["train", "train", "val"]


def test_a_file_that_is_not_utf_8_is_told_so(tmp_path, folders):
    file = tmp_path / "labels.csv"
    file.write_bytes("path,label\ntrain/ant/0.png,B\u00e4r\n".encode("latin-1"))
    with refuses("labels.csv, line 2: the label of train/ant/0.png is not UTF-8"):
        opened(folders, file)
    file.write_bytes("path,label\ntrain/ant/\u00e4.png,ant\n".encode("latin-1"))
    with refuses("1 of 1 images are missing; is the file in UTF-8?"):
        opened(folders, file)
    file.write_bytes("path,label\n".encode("utf-16"))
    with refuses("with commas and in UTF-8"):
        opened(folders, file)
