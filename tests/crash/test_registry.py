"""No crash point without a test."""

from __future__ import annotations

import re
from pathlib import Path

import limpet
from tests.crash.cases import cases
from tests.crash.local import LOCAL
from tests.crash.recoveries import RECOVERIES

_SOURCES = Path(limpet.__file__).parent


def test_every_crash_point_in_the_sources_is_reached() -> None:
    """DESIGN 6: a crash point that no test reaches fails the build; so does a name that is none."""
    sources = "".join(path.read_text() for path in _SOURCES.rglob("*.py") if path.name != "crashpoint.py")
    named = re.findall(r'\bcrashpoint\("([^"]+)"\)', sources)
    assert len(named) == sources.count("crashpoint("), "the name of a crash point is a literal"
    tried = {case.point for case in cases() if case.action == "kill"}
    tried |= {point for known in RECOVERIES.values() for point in f"{known.points} {known.more}".split()}
    tried |= {point for operation in LOCAL.values() for point in operation.points.split()}
    assert set(named) == tried
