"""Names of runs, and which of them are one under several seeds."""

from pathlib import Path

import pytest

from visu.run_groups import Entry, OneRun, compare_settings, group, name_of, short_names


def run(name, seed=31, **settings):
    return OneRun(Path("/runs") / name, name, [], {"args": {"seed": seed} | settings}, {}, [])


@pytest.mark.parametrize(
    ("names", "name"),
    [
        (["base_s31", "base_s32"], "base"),
        (["v2-seed-1", "v2-seed-2"], "v2"),
        (["exp_small", "exp_smooth"], "exp"),
        (["lr_0.05/31", "lr_0.05/32"], "lr_0.05"),
        (["s1", "s2"], "s1 and 1 more"),
        (["one", "two", "three"], "one and 2 more"),
    ],
)
def test_several_seeds_have_the_name_that_theirs_begin_with(names, name):
    assert name_of([run(n, i) for i, n in enumerate(names)]) == name


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/a/b/exp"], ["exp"]),
        (["/runs/one", "/runs/two"], ["one", "two"]),
        (["/a/one/exp", "/a/two/exp"], ["one", "two"]),
        (["/a/x/1", "/a/y/1", "/a/y/2"], ["x/1", "y/1", "y/2"]),
        (["/a", "/a/a"], ["/", "a"]),
    ],
)
def test_names_are_the_shortest_parts_that_differ(paths, names):
    assert short_names([Path(path) for path in paths]) == names


def test_runs_are_one_where_only_the_seed_and_the_machine_differ():
    runs = [
        run("a_seed1", 1, lr=1, workers=2), run("b", 1, lr=2), run("a_seed2", 2, lr=1, workers=4),
        run("a_seed1_again", 1, lr=1), run("c", 3, lr=2, wd=1),
    ]  # fmt: skip
    entries = group(runs)
    assert [entry.name for entry in entries] == ["a", "b", "a_seed1_again", "c"]
    assert entries[0].seeds == ["1", "2"] and entries[0].label == "a (mean of 2 seeds)"


def test_runs_without_settings_are_never_one():
    runs = [OneRun(Path(f"/{n}"), n, [], {}, {}, []) for n in "ab"]
    assert [entry.label for entry in group(runs)] == ["a", "b"]


def test_names_of_groups_stay_apart():
    runs = [run("x/1", 1, lr=1), run("x/2", 2, lr=1), run("x/3", 1, lr=2), run("x/4", 2, lr=2)]
    names = [entry.name for entry in group(runs)]
    assert names == ["x/1 and 1 more", "x/3 and 1 more"]


def test_settings_of_other_methods_do_not_compare():
    entries = [Entry("a", (run("a", lr=1, batch=9, momentum=0.9),)), Entry("b", (run("b", lr=1, queue=4),))]
    differ, some, equal = compare_settings(entries)
    assert differ == [("batch", ["9", "–"])]  # one asks for it first
    assert some == [("momentum", ["0.9", "–"]), ("queue", ["–", "4"])]
    assert equal == [("lr", ["1", "1"]), ("seed", ["31", "31"])]
