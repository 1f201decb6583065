"""What people write on a command line, as values."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from limpet.cli import _options, _output, _parse
from limpet.cli.main import COMMANDS
from limpet.client import _workdir
from limpet.errors import BadRequest


@pytest.mark.parametrize(
    ("text", "mib"),
    [("512M", 512), ("512", 512), ("1G", 1024), ("1.5GiB", 1536), ("2g", 2048), ("1024k", 1), ("1T", 1 << 20)],
)
def test_sizes(text: str, mib: int) -> None:
    assert _parse.memory_mib(text) == mib


@pytest.mark.parametrize("text", ["", "G", "-1G", "1X", "1.0001M", "100k"])
def test_wrong_sizes_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(BadRequest) as caught:
        _parse.memory_mib(text)
    assert "512M" in (caught.value.hint or "")


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200), ("10ms", 0.01)])
def test_times(text: str, seconds: float) -> None:
    assert _parse.seconds(text) == seconds


@pytest.mark.parametrize(("text", "pair"), [("8080:80", (8080, 80)), ("80", (0, 80)), ("0:80", (0, 80))])
def test_ports(text: str, pair: tuple[int, int]) -> None:
    assert _parse.port(text) == pair


@pytest.mark.parametrize("text", ["", "a:80", "80:", "1:0", "1:65536", "1:2:3", "-1:2"])
def test_wrong_ports_are_refused(text: str) -> None:
    with pytest.raises(BadRequest):
        _parse.port(text)


def test_environment_takes_bare_names_from_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAVE", "it")
    monkeypatch.delenv("MISS", raising=False)
    assert _parse.environment(["A=1", "B=x=y", "C=", "HAVE", "MISS"]) == {"A": "1", "B": "x=y", "C": "", "HAVE": "it"}
    with pytest.raises(BadRequest):
        _parse.environment(["=x"])


def test_settings_set_and_remove() -> None:
    assert _parse.settings(["A=1", "B-", "C-D=2-"]) == {"A": "1", "B": None, "C-D": "2-"}
    with pytest.raises(BadRequest):
        _parse.settings(["A"])


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("web:/x", ("web", "/x")), ("web:x:y", ("web", "x:y")), ("./web:x", (None, "./web:x")), ("-", (None, "-")),
        ("/a/b:c", (None, "/a/b:c")), ("Web:x", (None, "Web:x")), ("file", (None, "file")),
    ],
)  # fmt: skip
def test_sides_of_a_copy(text: str, place: tuple[str | None, str]) -> None:
    assert _parse.place(text) == place


def test_side_of_a_copy_without_a_path_is_refused() -> None:
    with pytest.raises(BadRequest):
        _parse.place("web:")


@pytest.mark.parametrize(
    ("line", "name", "command"),
    [
        ("web true", "web", ["true"]),
        ("web -- true", "web", ["true"]),
        ("-- true", None, ["true"]),
        ("-u root web true", "web", ["true"]),
        ("web -u root -- true", "web", ["true"]),
        ("web git checkout -- file", "web", ["git", "checkout", "--", "file"]),
        ("web -- sh -c -- x", "web", ["sh", "-c", "--", "x"]),
        ("-- git checkout -- file", None, ["git", "checkout", "--", "file"]),
        ("web ls -l --help", "web", ["ls", "-l", "--help"]),
    ],
)
def test_everything_behind_the_name_is_the_guests(
    monkeypatch: pytest.MonkeyPatch, line: str, name: str | None, command: list[str]
) -> None:
    import typer

    module = importlib.import_module("limpet.cli.execs")
    group: Any = typer.main.get_command(module.app)
    seen: dict[str, Any] = {}
    parsed = group.commands["exec"]
    monkeypatch.setattr(parsed, "callback", lambda **given: seen.update(given))
    parsed.main(line.split(), prog_name="exec", standalone_mode=False)
    assert (seen["name"] or None, list(seen["command"])) == (name, command)
    assert seen["user"] == ("root" if "root" in line else None)


def test_every_command_in_the_table_exists() -> None:
    import typer

    for name, (module, _) in COMMANDS.items():
        found: Any = typer.main.get_command(importlib.import_module(f"limpet.cli.{module}").app)
        assert found.name == name or name in found.commands, name
        command = found.commands[name] if name in getattr(found, "commands", {}) else found
        assert command.help, f"{name} has no help"


def test_machine_leaves_out_what_was_not_given() -> None:
    assert _options.machine("base", None, None, "user", None, None) == {"image": "base", "network": "user"}


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (200 << 20, "200 MiB"), (3 << 40, "3.0 TiB")]
)
def test_sizes_for_people(count: int, text: str) -> None:
    assert _output.size(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (61, "1m1s"), (3600, "1h"), (90_061, "1d1h")])
def test_times_for_people(seconds: float, text: str) -> None:
    assert _output.duration(seconds) == text


def test_names_from_guests_cannot_steer_the_terminal() -> None:
    assert _output.printable("a\x1b[31m\nb\udcff\x9b") == "a\\x1b[31m\\x0ab\udcff\\x9b"


def test_project_is_the_nearest_known_directory_else_the_repository(tmp_path: Path) -> None:
    deep = tmp_path / "repo" / "src" / "deep"
    deep.mkdir(parents=True)
    assert _workdir.project_root(deep) == deep
    (tmp_path / "repo" / ".git").mkdir()
    assert _workdir.project_root(deep) == tmp_path / "repo"
    assert _workdir.project_root(deep, [str(tmp_path / "repo" / "src")]) == tmp_path / "repo" / "src"


def test_importing_all_of_the_home_directory_by_accident_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for place in (Path("/"), tmp_path):
        with pytest.raises(BadRequest, match="refusing to import all"):
            _workdir.project_root(place)


@pytest.mark.parametrize(
    ("text", "host", "guest", "interval"),
    [
        ("./data:/home/user/data", "./data", "/home/user/data", None),
        ("/a:b:/c", "/a:b", "/c", None),
        ("data:/c:interval=2m", "data", "/c", 120.0),
        ("/a:/c:interval=0.5", "/a", "/c", 0.5),
    ],
)
def test_payloads(text: str, host: str, guest: str, interval: float | None) -> None:
    """PAY-1"""
    assert _parse.payload(text) == (host, guest, interval)


@pytest.mark.parametrize("text", ["", "/a", "/a:b", ":/c", "/a:/c:often", "/a:/c:interval=", "/a:/c:interval=x"])
def test_wrong_payloads_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(BadRequest) as caught:
        _parse.payload(text)
    assert "for example" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("text", "path", "at"),
    [
        ("", None, None),
        ("/home/user/x", "/home/user/x", None),
        ("/home/user/x@12", "/home/user/x", "12"),
        ("@12", None, "12"),
        ("/home/user/a@b", "/home/user/a@b", None),
        ("/home/user/a@b@3", "/home/user/a@b", "3"),
        ("/home/user/x@2026-01-31T12:00+00:00", "/home/user/x", "2026-01-31T12:00:00+00:00"),
    ],
)
def test_what_of_a_vault_is_meant(text: str, path: str | None, at: str | None) -> None:
    """D3"""
    assert _parse.kept(text) == (path, at)


@pytest.mark.parametrize(("text", "about"), [("x", "/home/user/x"), ("x@12", "/home/user/x"), ("@soon", "10m")])
def test_what_is_neither_a_path_nor_an_instant_is_refused_with_an_example(text: str, about: str) -> None:
    with pytest.raises(BadRequest) as caught:
        _parse.kept(text)
    assert about in (caught.value.hint or "")
