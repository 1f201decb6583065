"""Check that every numbered line of SPECIFICATION.md names tests that exist, or says `[test pending]`.

A line looks like   `- **L3** Promise in words. [tests/vm/test_x.py::test_name]`   (several tests: comma-separated).
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

_LINE = re.compile(r"^- \*\*(?P<id>[A-Z]+\d+)\*\* (?P<text>.+?) \[(?P<proof>[^\]]+)\]$", re.DOTALL)


def tests_of(path: Path) -> set[str]:
    """The names of the test functions in one file."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, functions)}


def problems(specification: str, root: Path) -> list[str]:
    """What is wrong, one sentence each."""
    found: list[str] = []
    seen: set[str] = set()
    entries = [entry.replace("\n  ", " ").strip() for entry in re.split(r"\n(?=- \*\*)", specification)]
    for entry in (entry.split("\n\n")[0] for entry in entries if entry.startswith("- **")):
        match = _LINE.match(entry)
        if match is None:
            found.append(f"not of the form '- **ID** text [tests or test pending]': {entry[:80]}")
            continue
        if match["id"] in seen:
            found.append(f"{match['id']} stands twice")
        seen.add(match["id"])
        for proof in () if match["proof"] == "test pending" else match["proof"].split(","):
            file, _, name = proof.strip().partition("::")
            if not (root / file).is_file():
                found.append(f"{match['id']}: no file {file}")
            elif name not in tests_of(root / file):
                found.append(f"{match['id']}: no test {name} in {file}")
    return found if seen else ["no numbered lines at all"]


def main() -> int:
    root = Path(__file__).parent.parent
    found = problems((root / "SPECIFICATION.md").read_text(), root)
    for problem in found:
        print(f"SPECIFICATION.md: {problem}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
