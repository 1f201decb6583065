"""After a power loss at any moment of any work on a vault: the generations from before or those from after, exactly;
those from after once it was acknowledged (D3, D5); and the vault goes on."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Collection, Iterator
from itertools import product
from pathlib import Path

import pytest

from limpet.vault import Vault
from tests.crash.counting import noticed
from tests.crash.proving import Workload, prove
from tests.crash.vaultkit import (
    STEPS,
    Seen,
    check,
    check_repaired,
    check_restored,
    commit,
    damaged_setup,
    first,
    recover,
    restore,
    seen,
    setup,
)  # fmt: skip

ALL = os.environ.get("LIMPET_TEST_CRASH") == "all"


def _work(names: tuple[str, ...], omit: Collection[str] = ()) -> Workload:
    """One process does all of it, as the daemon does."""
    opened: dict[Path, Vault] = {}

    def step(name: str) -> Callable[[Path], object]:
        def run(directory: Path) -> object:
            if directory not in opened:
                opened[directory] = Vault.open(directory / "vault")
            return STEPS[name](opened[directory])

        return run

    return Workload(setup, tuple((name, step(name)) for name in names), omit)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[str, ...]], list[Seen]]:
    """What is there after each step when nothing goes wrong, as the next process sees it."""
    known: dict[tuple[str, ...], Seen] = {}

    def after(names: tuple[str, ...]) -> Seen:
        if names not in known:
            directory = tmp_path_factory.mktemp("expected")
            work = _work(names)
            work.setup(directory)
            for _, step in work.steps:
                step(directory)
            known[names] = seen(Vault.open(directory / "vault"))
        return known[names]

    return lambda names: [after(names[:count]) for count in range(len(names) + 1)]


def _workloads() -> Iterator[tuple[str, ...]]:
    """All of at most three steps; quickly: all of at most two, and some of three."""
    three = list(product(STEPS, repeat=3))
    yield from product(STEPS, repeat=1)
    yield from product(STEPS, repeat=2)
    yield from three if ALL else random.Random(4).sample(three, 12)


@pytest.mark.parametrize("names", list(_workloads()), ids=" → ".join)
def test_a_vault_has_the_generations_from_before_or_those_from_after(
    expected: Callable[[tuple[str, ...]], list[Seen]], names: tuple[str, ...]
) -> None:
    """D3, D5."""
    proof = prove(_work(names), check(expected(names)), limit=24, recover=recover, again=0.05)
    assert proof.learned == [], "everything goes through durable"


def test_a_vault_that_is_being_made_is_empty_or_not_there() -> None:
    """D5."""

    def check_made(directory: Path, acked: int, begun: int) -> None:
        assert acked < begun or (directory / "vault").is_dir()
        vault = Vault.open(directory / "vault")
        assert (vault.damage, vault.head, vault.check()) == (None, None, [])
        commit(vault, "home", first)

    prove(Workload(lambda directory: None, (("make", recover),)), check_made)


def test_a_repair_that_is_cut_off_is_done_again(expected: Callable[[tuple[str, ...]], list[Seen]]) -> None:
    """D6: the newest generation is damaged; the earlier ones are there, and what is damaged is kept."""
    work = Workload(damaged_setup, (("repair", lambda directory: Vault.open(directory / "vault").repair()),))
    prove(work, check_repaired, recover=recover, again=0.2)


@pytest.mark.parametrize("there", [False, True], ids=["missing", "empty"])
def test_a_restored_directory_is_there_whole_or_not_at_all(there: bool) -> None:
    """D5."""

    def begin(directory: Path) -> None:
        setup(directory)
        (directory / "host").mkdir()
        if there:
            (directory / "host" / "out").mkdir()

    prove(Workload(begin, (("restore", restore),)), check_restored)
    with noticed():
        prove(Workload(begin, (("restore", restore),), omit={"fsync"}), check_restored)


@pytest.mark.parametrize("omitted", ["fsync", "fsync_dir"])
@pytest.mark.parametrize("name", ["commit A", "forget"])
def test_work_on_a_vault_without_one_of_its_fsyncs_is_noticed(
    expected: Callable[[tuple[str, ...]], list[Seen]], name: str, omitted: str
) -> None:
    """D3, negative controls."""
    with noticed():
        prove(_work((name,), omit={omitted}), check(expected((name,))))
