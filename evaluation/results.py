"""The protocol beside the number: what every evaluation prints and puts into EXP/results.json."""

import json
import sys
from pathlib import Path
from typing import Any

from util import UserError, make_folder, say, write_json

RESULTS = "results.json"


def read(exp: str | Path) -> dict[str, Any]:
    """What EXP/results.json holds, by evaluator; {} where there is none.

    Raises UserError for a file that is something else: asked before any long work, so that nothing is lost.
    """
    path = Path(exp) / RESULTS
    if not path.is_file():
        return {}
    try:
        everything = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # not JSON, not UTF-8
        everything = None
    if not isinstance(everything, dict):
        raise UserError(f"{path}: not valid JSON of results by evaluator; move it away")
    return everything


def report(exp: str | Path, name: str, protocol: dict[str, Any], results: Any) -> None:
    """Print the protocol of evaluator `name`, put it with its results into EXP/results.json, and say so.

    The file keeps the results of other evaluators: {name: {"protocol": ..., "results": ..., "command": ...}}.
    """
    say(f"{name} protocol: " + ", ".join(f"{key} {value}" for key, value in protocol.items()))
    everything = read(make_folder(exp))
    everything[name] = {"protocol": protocol, "results": results, "command": sys.argv}
    write_json(Path(exp) / RESULTS, everything)
    say(f"results in {Path(exp) / RESULTS}")
