"""A process that is killed, or fails, within its work on a vault: as before or as after, and the work goes on (D5)."""

from __future__ import annotations

from pathlib import Path

import pytest

from limpet import crashpoint
from limpet.errors import Internal
from tests.crash import localpayloads as payloads
from tests.crash.counting import COUNT, Loss
from tests.crash.killing import killed
from tests.crash.local import LOCAL, LocalOperation

CASES = [(name, point) for name, operation in LOCAL.items() for point in operation.points.split()]


def checked(operation: LocalOperation, directory: Path) -> None:
    COUNT.faults += 1
    COUNT.states += 1
    try:
        operation.check(directory, 0, 1)
    except AssertionError as error:
        COUNT.losses.append(str(error))
        raise Loss(str(error)) from error


@pytest.mark.parametrize(("name", "point"), CASES)
def test_what_a_killed_process_leaves_is_as_before_or_as_after(name: str, point: str, tmp_path: Path) -> None:
    """D3, D5."""
    operation = LOCAL[name]
    (directory := tmp_path / "home").mkdir()
    operation.setup(directory)
    (orders := tmp_path / "orders").write_text(f"{point}=kill")
    killed(lambda: operation.run(directory), orders)
    checked(operation, directory)


@pytest.mark.parametrize(("name", "point"), CASES)
def test_what_fails_in_the_middle_is_as_before_or_as_after(
    name: str, point: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D5."""
    operation = LOCAL[name]
    (directory := tmp_path / "home").mkdir()
    operation.setup(directory)
    (orders := tmp_path / "orders").write_text(f"{point}=raise")
    monkeypatch.setattr(crashpoint, "_orders", str(orders))
    with pytest.raises(Internal, match="crash point"):
        operation.run(directory)
    monkeypatch.setattr(crashpoint, "_orders", None)
    checked(operation, directory)


@pytest.mark.parametrize("point", LOCAL["payload-publish"].points.split())
def test_a_publication_that_failed_in_the_middle_is_no_edit_of_somebody_else(
    point: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PAY-6: the same daemon goes on."""
    payloads.setup(tmp_path)
    (orders := tmp_path / "orders").write_text(f"{point}=raise")
    monkeypatch.setattr(crashpoint, "_orders", str(orders))
    with pytest.raises(Internal, match="crash point"):
        payloads.publish(tmp_path)
    monkeypatch.setattr(crashpoint, "_orders", None)
    payloads.check_going_on(tmp_path)
