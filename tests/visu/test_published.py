"""The published figures come out of the one table in docs/results.md, with their marks."""

from visu.published import METHODS, ROWS_OF, published_for, read_published

ROWS = read_published()


def figures(*question):
    return {row.figure for row in published_for(*question, ROWS)}


def test_words_that_stand_for_the_row_above_are_filled_in():
    assert len(ROWS) > 50 and all(row.evaluation and row.figure and row.source for row in ROWS)
    assert not any(row.network.startswith("the same") or row.source == "the same" for row in ROWS)
    assert not any("**" in row.evaluation for row in ROWS)
    (frozen,) = (row for row in ROWS if row.figure == "70.4")
    assert frozen.network == "DeepCluster, AlexNet" and frozen.evaluation == "VOC 2007 classification, mAP"
    assert frozen.source == "file deepcluster: README" and not frozen.from_memory


def test_every_evaluator_of_the_table_finds_rows():
    for evaluator, starts in ROWS_OF.items():
        assert any(row.evaluation.startswith(starts) for row in ROWS), evaluator


def test_rows_are_those_of_the_network_and_of_the_methods():
    assert "72.0" in figures("eval_voc_classif", ["alexnet"], ["deepcluster"])
    assert not figures("eval_voc_classif", ["tiny"], ["deepcluster"])
    assert not figures("knn", ["alexnet"], ["deepcluster"])
    of_v2 = figures("linear", ["resnet50"], ["deepclusterv2"])
    assert "75.2 [75.18]" in of_v2 and "50.398" not in of_v2 and "76.5" in of_v2  # and labels
    assert "50.398" in figures("linear", ["resnet50w2"], ["deepcluster"])
    assert set(METHODS) == {"deepcluster", "deepclusterv2", "swav", "deepercluster"}


def test_figures_from_memory_are_marked():
    assert any(row.from_memory for row in published_for("linear", ["alexnet"], ["deepcluster"], ROWS))


def test_a_missing_table_is_no_error(tmp_path):
    assert read_published(tmp_path / "results.md") == []
