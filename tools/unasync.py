"""Make the synchronous client from the asynchronous one by replacing tokens. `--check` only compares.

`src/limpet/client/_async/*.py` → `src/limpet/client/_sync/*.py`. The rest of the difference is in two files with the
same names in them: `_aio.py` and `_sio.py`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

CLIENT = Path(__file__).parent.parent / "src" / "limpet" / "client"

REPLACEMENTS = [
    (r"\bawait ", ""),
    (r"\basync (def|for|with)\b", r"\1"),
    (r"\b_aio\b", "_sio"),
    (r"\b_async\b", "_sync"),
    (r"\b__a(iter|next|enter|exit)__\b", r"__\1__"),
    (r"\ba(read|close|closing|iter_bytes|iter_lines|iter_raw)\b", r"\1"),
    (r"\basynccontextmanager\b", "contextmanager"),
    (r"\bAsyncExitStack\b", "ExitStack"),
    (r"\bhttpx\.AsyncHTTPTransport\b", "httpx.HTTPTransport"),
    (r"\bAsync([A-Z]\w*)\b", r"\1"),
    (r"\basynchronous\b", "synchronous"),
]
BANNER = "# Made by tools/unasync.py from ../_async/{name}: edit that one.\n"
OWN_INIT = '"""The synchronous client, made by `tools/unasync.py` from `_async`."""\n'


def convert(source: str, name: str) -> str:
    """The synchronous text of one asynchronous module."""
    if name == "__init__.py":
        return OWN_INIT
    for pattern, replacement in REPLACEMENTS:
        source = re.sub(pattern, replacement, source)
    return BANNER.format(name=name) + source


def main() -> int:
    check, stale = "--check" in sys.argv[1:], []
    wanted = {path.name: convert(path.read_text(), path.name) for path in sorted((CLIENT / "_async").glob("*.py"))}
    extra = {path.name for path in (CLIENT / "_sync").glob("*.py")} - wanted.keys()
    for name, text in wanted.items():
        target = CLIENT / "_sync" / name
        if not target.exists() or target.read_text() != text:
            stale.append(name)
            if not check:
                target.write_text(text)
    for name in extra:
        stale.append(name)
        if not check:
            (CLIENT / "_sync" / name).unlink()
    for name in stale:
        print(f"_sync/{name} {'is stale: run tools/unasync.py' if check else 'written'}", file=sys.stderr)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
