"""The countable laws of the house: sizes, imports that run down only, `args` at the edge alone."""

import ast

from tests.helpers import ROOT

LAYERS = (  # each imports what stands above it; scripts stand below all
    ("util", "commandline"),
    ("checkpoint", "distributed", "formats/safe_pickle.py", "formats/tensor_files.py"),  # how files are read
    ("data", "models", "algorithms"),
    ("features", "clustering"),
    ("training", "evaluation"),
)
EDGE = ("visu", "formats", "tools")  # like scripts, they may import anything but each other's scripts
MAX_FILE, MAX_FUNCTION, MAX_METHOD_FILE, MAX_IN_ROOT = 400, 50, 260, 24

FOLDERS = ("data", "models", "algorithms", "training", "evaluation", *EDGE)
FILES = sorted([*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/*.py"))])
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
EVERYTHING = [*FILES, *sorted(ROOT.glob("tests/**/*.py")), *sorted(ROOT.glob("benchmarks/*.py"))]


def room_of(file: str) -> str:
    """The folder of a file, or its name without .py in the root."""
    return file.split("/")[0].removesuffix(".py")


def layer_of(file: str) -> int:
    """0 is the ground; scripts and what is like them stand on top."""
    names = {room_of(file), file}
    return next((i for i, rooms in enumerate(LAYERS) if names & set(rooms)), len(LAYERS))


def module_of(name: str) -> str | None:
    """The file of a module of this repository; None for others."""
    path = name.replace(".", "/")
    return next((file for file in (f"{path}.py", f"{path}/__init__.py") if file in TREES), None)


def imports_of(file: str) -> set[str]:
    """The files that a file imports, anywhere in it, but for type checking alone."""
    found = set()
    for node in walk_without_type_checking(TREES[file]):
        if isinstance(node, ast.Import):
            found |= {module_of(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            whole = {module_of(f"{node.module}.{alias.name}") for alias in node.names}
            found |= whole | ({module_of(node.module)} if None in whole else set())
    return found - {None, file}


def walk_without_type_checking(tree: ast.AST):
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from walk_without_type_checking(node)


def lines(offenders: list[str]) -> str:
    return "\n".join(["", *sorted(offenders)])


def functions_of(tree: ast.AST):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def circle_of(graph: dict[str, set[str]]) -> list[str]:
    """The files of one circle of imports, or []."""
    done: set[str] = set()

    def visit(file: str, path: list[str]) -> list[str]:
        if file in path:
            return [*path[path.index(file) :], file]
        if file in done:
            return []
        for other in sorted(graph[file]):
            if circle := visit(other, [*path, file]):
                return circle
        done.add(file)
        return []

    return next((circle for file in sorted(graph) if (circle := visit(file, []))), [])


def test_no_circle_of_imports():
    # A package's __init__ gathers its own files; between files themselves there is no circle either way.
    graph = {file: imports_of(file) for file in TREES}
    assert circle_of(graph) == []


def test_imports_run_down_only():
    up = []
    for file in TREES:
        for other in imports_of(file):
            same_room = room_of(file) == room_of(other)
            both_scripts = layer_of(file) == layer_of(other) == len(LAYERS)
            edge = room_of(other) in EDGE  # main.py draws its report, hubconf.py reads files
            if layer_of(other) > layer_of(file) or (both_scripts and not same_room and not edge):
                up.append(f"{file} imports {other}")
    assert not up, lines(up)


def test_commandline_imports_util_alone():
    assert imports_of("commandline.py") == {"util.py"}


def test_no_file_is_longer_than_400_lines():
    lengths = {path: path.read_text(encoding="utf-8").count("\n") for path in EVERYTHING}
    long = [f"{path.relative_to(ROOT)}: {n}" for path, n in lengths.items() if n > MAX_FILE]
    assert not long, lines(long)


def test_no_function_is_longer_than_50_lines():
    long = []
    for path in EVERYTHING:
        for node in functions_of(ast.parse(path.read_text(encoding="utf-8"))):
            if node.end_lineno - node.lineno + 1 > MAX_FUNCTION:
                long.append(f"{path.relative_to(ROOT)}: {node.name} {node.end_lineno - node.lineno + 1}")
    assert not long, lines(long)


def test_args_is_in_no_signature_but_at_the_edge():
    """Scripts take it apart; the engine and what writes a run's settings down record it whole."""
    allowed = {("commandline.py", "parse_args"), ("training/run.py", "__init__"), ("util.py", "run_main")}
    found = []
    for file, tree in TREES.items():
        if layer_of(file) == len(LAYERS):
            continue
        for node in functions_of(tree):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            passed = "args" in {argument.arg for argument in arguments}
            if passed and not {(file, node.name), (file, None)} & allowed:
                found.append(f"{file}: {node.name}")
    assert not found, lines(found)


def test_methods_are_short_and_the_root_is_small():
    long = {path.name: path.read_text().count("\n") for path in ROOT.glob("main*.py")}
    assert {name: n for name, n in long.items() if n >= MAX_METHOD_FILE} == {}
    assert len(list(ROOT.glob("*.py"))) <= MAX_IN_ROOT


def test_networks_are_asked_by_their_interface_alone():
    """No `.features`, `.classifier`, `num_convs` of a network outside models/."""
    found = []
    for file, tree in TREES.items():
        if room_of(file) == "models":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in ("features", "classifier", "num_convs"):
                owner = ast.unparse(node.value)
                if owner in ("net", "model", "network", "self.net", "self.model"):
                    found.append(f"{file}:{node.lineno} {owner}.{node.attr}")
    assert not found, lines(found)


def test_the_rules_here_see_what_they_should():
    assert circle_of({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c", "b"]
    assert circle_of({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert layer_of("util.py") < layer_of("data/views.py") < layer_of("training/run.py") < layer_of("main.py")
    assert "models/network.py" in imports_of("models/flat.py") and "util.py" in imports_of("commandline.py")
    assert len(TREES) > 40
