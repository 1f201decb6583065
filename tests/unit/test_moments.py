"""Instants as users write them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest

from limpet import moments
from limpet.errors import BadRequest

EAST = timezone(timedelta(hours=2))
NOW = datetime(2026, 3, 1, 12, 30, 0, tzinfo=EAST)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("90s", NOW - timedelta(seconds=90)),
        ("1.5h", NOW - timedelta(minutes=90)),
        ("3d", NOW - timedelta(days=3)),
        ("2026-01-31", datetime(2026, 1, 31, tzinfo=EAST)),
        ("2026-01-31 12:00", datetime(2026, 1, 31, 12, tzinfo=EAST)),
        ("2026-01-31T12:00:01.5Z", datetime(2026, 1, 31, 12, 0, 1, 500_000, tzinfo=UTC)),
        ("12:00", datetime(2026, 3, 1, 12, tzinfo=EAST)),
        ("12:30:01", datetime(2026, 2, 28, 12, 30, 1, tzinfo=EAST)),  # of today it did not pass yet
    ],
)
def test_time_is_meant_in_the_zone_of_now_unless_it_has_its_own(text: str, moment: datetime) -> None:
    """D3"""
    assert moments.parse(text, NOW) == moment


def test_number_is_a_generation() -> None:
    assert moments.parse("0012", NOW) == 12


@pytest.mark.parametrize("text", ["", "-1", "1.5", "yesterday", "25:00", "12:61", "999999999d", "2026-02-30", "٣"])
def test_anything_else_is_refused_with_examples(text: str) -> None:
    with pytest.raises(BadRequest) as caught:
        moments.parse(text, NOW)
    assert "10m" in (caught.value.hint or "")
