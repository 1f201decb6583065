"""Which checkpoints the ladder of `--every-exec` keeps."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from limpet.ladder import DAYS, HOURS
from limpet.models import CheckpointInfo, SandboxSpec
from limpet.services.retention import NEWEST, superfluous

NOW = datetime(2026, 3, 31, 12, 30, tzinfo=UTC)


def made(*ages: timedelta) -> list[CheckpointInfo]:
    """Checkpoints of these ages, the oldest first; their ids say how old they are."""
    return [
        CheckpointInfo(id=f"{age}", sandbox="box", sandbox_id="sb_1", created_at=NOW - age, kind="disk",
                       made_by="exec", spec=SandboxSpec())
        for age in sorted(ages, reverse=True)
    ]  # fmt: skip


def kept(checkpoints: list[CheckpointInfo], now: datetime = NOW) -> list[CheckpointInfo]:
    doomed = superfluous(checkpoints, now)
    return [checkpoint for checkpoint in checkpoints if checkpoint not in doomed]


def minutes(*numbers: float) -> list[timedelta]:
    return [timedelta(minutes=number) for number in numbers]


def test_few_checkpoints_are_all_kept_however_old() -> None:
    """Issue 3, item 4"""
    old = made(*(timedelta(days=100 * n) for n in range(NEWEST)))
    assert superfluous(old, NOW) == [] and superfluous([], NOW) == []


def test_a_burst_keeps_its_newest() -> None:
    """A loop of a thousand commands within one minute does not push out everything older."""
    burst = made(*(timedelta(seconds=n / 20) for n in range(1000)), timedelta(hours=3), timedelta(days=5))
    left = kept(burst)
    assert left[-NEWEST:] == burst[-NEWEST:]
    assert [checkpoint.id for checkpoint in left[:-NEWEST]] == [f"{timedelta(days=5)}", f"{timedelta(hours=3)}"]


def test_of_each_hour_of_the_last_day_the_last_one_stays() -> None:
    """12:30 now: 11:59 and 11:01 are one hour, 10:59 is another."""
    newest = [timedelta(seconds=n) for n in range(NEWEST)]
    checkpoints = made(*newest, *minutes(31, 60, 89, 91, 120))
    assert [checkpoint.id for checkpoint in kept(checkpoints)[:-NEWEST]] == [
        f"{age}" for age in minutes(91, 31)
    ]  # fmt: skip


def test_beyond_a_day_one_a_day_stays_and_beyond_a_month_none() -> None:
    newest = [timedelta(seconds=n) for n in range(NEWEST)]
    older = [timedelta(days=day, hours=hour) for day in (1, 2, DAYS - 1, DAYS, DAYS + 3) for hour in (1, 5)]
    left = kept(made(*newest, *older))[:-NEWEST]
    assert [NOW - checkpoint.created_at for checkpoint in left] == [
        timedelta(days=DAYS - 1, hours=1), timedelta(days=2, hours=1), timedelta(days=1, hours=1)
    ]  # fmt: skip


ages = st.lists(st.integers(0, 40 * 86_400).map(lambda n: timedelta(seconds=n)), max_size=120, unique=True)


@given(ages)
def test_the_ladder_is_bounded_and_keeps_every_newest(found: list[timedelta]) -> None:
    checkpoints = made(*found)
    left = kept(checkpoints)
    assert left[-NEWEST:] == checkpoints[-NEWEST:]
    assert len(left) <= NEWEST + HOURS + 1 + DAYS + 1
    days = {checkpoint.created_at.date() for checkpoint in checkpoints if NOW - checkpoint.created_at <= timedelta(30)}
    assert days <= {checkpoint.created_at.date() for checkpoint in left}


@given(ages)
def test_thinning_twice_is_thinning_once(found: list[timedelta]) -> None:
    """What stays does not depend on how often the daemon looks."""
    once = kept(made(*found))
    assert kept(once) == once
