"""evaluation/objects.py: annotations, and what is wrong with them."""

import numpy as np
import pytest

from evaluation import objects
from tests.helpers import refuses
from tests.voc_scenes import OBJECTS, make_scenes

XML = "Annotations/000000.xml"


@pytest.fixture
def scenes(tmp_path):
    return make_scenes(tmp_path, number=2)


def test_boxes_stand_beside_their_images(scenes):
    trained, tested = objects.open_objects(scenes, "trainval")
    assert (trained.name, tested.name, len(trained), len(tested)) == ("trainval", "test", 4, 2)
    assert trained.class_names == tested.class_names == sorted(OBJECTS)
    assert trained.images.path(3) == scenes / "JPEGImages" / "001001.jpg"
    for split in (trained, tested):
        objects.check(split, 1)
        assert split.sizes.tolist() == [[64, 96]] * len(split)
        assert [len(o.labels) for o in split.objects] == [1, 2] * (
            len(split) // 2
        )  # parts of objects are none


def test_corners_count_pixels_from_1_and_both_ends_in(tmp_path):
    path = tmp_path / "a.xml"
    path.write_text(
        "<annotation><object><name> cat </name><bndbox><xmax>10</xmax><xmin>1</xmin><ymin>3.5</ymin>"
        "<ymax>4</ymax></bndbox></object><object><name>dog</name><difficult>1</difficult><bndbox><xmin>2</xmin>"
        "<ymin>2</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></object></annotation>"
    )
    expected = [("cat", [0, 2.5, 10, 4], False), ("dog", [1, 1, 2, 2], True)]
    assert objects.read_annotation(path) == expected
    arrays = objects.as_arrays(expected, {"cat": 0, "dog": 1})
    assert arrays.boxes.tolist() == [[0, 2.5, 10, 4], [1, 1, 2, 2]]
    assert (arrays.labels.tolist(), arrays.difficult.tolist()) == ([0, 1], [False, True])
    assert objects.as_arrays([], {}).boxes.shape == (0, 4)


def change(name, old, new):
    """A change of one file: another text in it, or all of it (old None), or removal (new None)."""

    def apply(root):
        path = root / name
        if new is None:
            path.unlink()
        else:
            path.write_text(new if old is None else path.read_text().replace(old, new))

    return apply


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (change("ImageSets/Main/test.txt", None, None), "test.txt is missing .--split trainval needs it"),
        (change("ImageSets/Main/test.txt", None, "\n"), "test.txt lists no image"),
        (change("ImageSets/Main/test.txt", None, "a\n../b\n"), "test.txt line 2: '../b' is no name"),
        (change("ImageSets/Main/test.txt", None, "002000\n002000\n"), "002000 is listed twice"),
        (change("JPEGImages/000001.jpg", None, None), "000001.jpg does not exist but is listed .* .1 of 4"),
        (change(XML, None, None), "000000.xml does not exist but is listed in trainval.txt .1 of 4"),
        (change(XML, None, "<annotation>"), "000000.xml: not an XML file"),
        (change(XML, None, '<?xml version="1.0" encoding="nonsense"?><a/>'), "000000.xml: not an XML file"),
        (change(XML, "<xmin>", "<xmin>x"), "000000.xml: object 1 has no bndbox of four numbers"),
        (change(XML, "<xmin>", "<xmin>9"), "000000.xml: object 1, a cat, has an empty box"),
        (change(XML, "<ymax>", "<ymax>nan</ymax><ymax>"), "000000.xml: object 1, a cat, has an empty box"),
        (change(XML, "<name>cat</name>", ""), "000000.xml: object 1 has no name"),
    ],
)
def test_bad_folder_is_refused_in_one_line_that_names_the_thing(scenes, broken, words):
    broken(scenes)
    with refuses(words):
        objects.open_objects(scenes, "trainval")


def test_folder_without_voc_in_it_is_refused(tmp_path):
    with refuses("ImageSets/Main is missing .expected ImageSets/Main and JPEGImages and Annotations in "):
        objects.open_objects(tmp_path, "trainval")


def test_boxes_are_cut_at_the_border_and_refused_beside_the_image(scenes):
    split, _ = objects.open_objects(scenes, "trainval")
    split.objects[0].boxes[0] = [-3, 10, 100, 20]
    objects.check(split, 1)
    assert split.objects[0].boxes.tolist() == [[0, 10, 96, 20]]
    split.objects[0].boxes[0] = [97, 10, 100, 20]
    with refuses("000000.jpg: has 96 x 64 pixels, and a box beside them"):
        objects.check(split, 1)


def test_state_of_a_split_knows_other_images_and_other_objects(scenes):
    trained, tested = objects.open_objects(scenes, "trainval")
    trained.load_state_dict(objects.open_objects(scenes, "trainval")[0].state_dict())
    with refuses("other images or objects"):
        trained.load_state_dict(tested.state_dict())
    other = objects.open_objects(scenes, "trainval")[0]
    other.objects[1] = other.objects[1]._replace(difficult=~other.objects[1].difficult)
    with refuses("other images or objects"):
        trained.load_state_dict(other.state_dict())


def test_an_image_without_objects_is_a_background(scenes):
    (scenes / XML).write_text("<annotation/>")
    split, _ = objects.open_objects(scenes, "trainval")
    assert split.objects[0].boxes.shape == (0, 4) and split.objects[0].boxes.dtype == np.float32
