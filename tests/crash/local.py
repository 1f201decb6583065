"""What is cut off without a VM: each operation in a process of its own, over a directory of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from limpet.vault import Vault
from tests.crash import localpayloads as payloads
from tests.crash import vaultkit as kit
from tests.crash.killing import left_by


@dataclass(frozen=True)
class LocalOperation:
    """`setup` fills a directory, `run` is cut off at the `points`, `check` is as for `proving.prove`."""

    setup: Callable[[Path], object]
    run: Callable[[Path], object]
    points: str
    check: Callable[[Path, int, int], None]


def _vault_step(name: str, points: str, setup: Callable[[Path], object] = kit.setup) -> LocalOperation:
    def run(directory: Path) -> None:
        kit.STEPS[name](Vault.open(directory / "vault"))

    def check(directory: Path, acked: int, begun: int) -> None:
        kit.check([kit.seen_after([setup]), kit.seen_after([setup, run])])(directory, acked, begun)

    return LocalOperation(setup, run, points, check)


def _made(directory: Path, acked: int, begun: int) -> None:
    vault = Vault.open(directory / "vault")
    assert (vault.damage, vault.head, vault.check()) == (None, None, [])
    kit.commit(vault, "home", kit.first)


def _reopen(name: str, point: str, setup: Callable[[Path], object], *, done: bool) -> LocalOperation:
    """Opening a vault that a crash left. `done`: whether the step that it cut off counts."""

    def run(directory: Path) -> None:
        kit.STEPS[name](Vault.open(directory / "vault"))

    def check(directory: Path, acked: int, begun: int) -> None:
        expected = kit.seen_after([setup, run] if done else [setup])
        kit.check([expected, expected])(directory, acked, begun)

    return LocalOperation(left_by(setup, run, point), kit.recover, "vault.sweep.before vault.sweep.after", check)


LOCAL = {
    "vault-make": LocalOperation(lambda directory: None, kit.recover, "vault.make.before vault.make.after", _made),
    "vault-commit": _vault_step(
        "commit A",
        "vault.begin.before vault.begin.after vault.write.before vault.write.after vault.name.after "
        "vault.commit.before vault.commit.after",
    ),
    "vault-pin": _vault_step("pin", "vault.ledger.before vault.ledger.after"),
    "vault-forget": _vault_step(
        "forget",
        "vault.compact.before vault.compact.after vault.forget.before vault.forget.after vault.sweep.before "
        "vault.sweep.after",
        kit.packed_setup,
    ),
    "vault-open-after-commit": _reopen("commit A", "vault.commit.before", kit.packed_setup, done=False),
    "vault-open-after-gc": _reopen("forget", "vault.forget.after", kit.packed_setup, done=True),
    "vault-open-before-gc": _reopen("forget", "vault.compact.after", kit.packed_setup, done=False),
    "vault-repair": LocalOperation(
        kit.damaged_setup, kit.repair,
        "vault.repair.keep.before vault.repair.keep.after vault.repair.head.before vault.repair.head.after",
        kit.check_repaired,
    ),
    "vault-clean": LocalOperation(
        kit.dead_setup, kit.repair, "vault.repair.clean.before vault.repair.clean.after", kit.check_cleaned
    ),
    "restore": LocalOperation(
        kit.restore_setup, kit.restore, "vault.restore.publish.before vault.restore.publish.after", kit.check_restored
    ),
    "payload-publish": LocalOperation(
        payloads.setup, payloads.publish,
        "payload.publish.build.before payload.publish.build.after payload.publish.intent.before "
        "payload.publish.exchange.before payload.publish.exchange.after payload.publish.state.before "
        "payload.publish.state.after",
        payloads.check,
    ),
    "payload-publish-renames": LocalOperation(
        payloads.setup, payloads.publish_without_exchange, "payload.publish.aside.after", payloads.check
    ),
    "payload-publish-anyway": LocalOperation(
        payloads.edited_setup, payloads.publish_anyway,
        "payload.publish.exchange.before payload.publish.exchange.after payload.publish.state.before "
        "payload.publish.state.after",
        payloads.check_kept,
    ),
    "payload-finish": LocalOperation(
        payloads.exchanged_setup, payloads.recover,
        "payload.finish.before payload.finish.after", payloads.check_published,
    ),
    "payload-finish-edited": LocalOperation(
        payloads.twice_edited_setup, payloads.recover,
        "payload.swap_back.before payload.swap_back.after payload.put_away.before payload.put_away.after",
        payloads.check_edits,
    ),
    "payload-tend": LocalOperation(
        payloads.replaced_setup, payloads.tend, "payload.remove.before payload.remove.after", payloads.check_tended
    ),
    "payload-lock": LocalOperation(
        payloads.bare_setup, payloads.lock, "payload.lock.before payload.marker.before payload.marker.after",
        payloads.check_lockable,
    ),
    "payload-release": LocalOperation(
        payloads.locked_setup, payloads.release, "payload.release.before payload.release.after",
        payloads.check_lockable,
    ),
    "payload-probe": LocalOperation(
        payloads.bare_setup, payloads.probe, "payload.probe.before payload.probe.after", payloads.check_probed
    ),
}  # fmt: skip
