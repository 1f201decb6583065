"""Settings: their values, defaults, and what is no value."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from limpet.errors import BadRequest, NotFound
from limpet.paths import Paths
from limpet.services.config import Config
from limpet.store import Store


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    found = Paths(tmp_path / "data", tmp_path / "cache", tmp_path / "run")
    found.make()
    return found


@pytest.fixture
def config(paths: Paths) -> Iterator[Config]:
    store = Store.open(paths)
    yield Config(store)
    store.close()


def put(config: Config, key: str, value: str | None) -> None:
    asyncio.run(config.set(key, value))


def test_a_fresh_configuration_is_its_defaults(config: Config) -> None:
    """Issue 3: the pool is off by default; templates are built."""
    assert (config.pool_size, config.template_auto, config.template_bytes) == (0, True, 8 << 30)
    for setting in asyncio.run(config.list()):
        assert setting.value == setting.default and setting.help


def test_settings_are_in_force_at_once_and_outlive_the_daemon(paths: Paths) -> None:
    """VM-9"""
    store = Store.open(paths)
    config, told = Config(store), []
    config.changed = lambda: told.append(config.pool_size)
    put(config, "pool.size", "3")
    put(config, "pool.size", "auto")
    put(config, "template.auto", "off")
    assert told == [3, None, None]
    store.close()
    store = Store.open(paths)
    config = Config(store)
    assert (config.pool_size, config.template_auto) == (None, False)
    put(config, "pool.size", None)
    assert config.pool_size == 0
    store.close()


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("1024", 1024), ("2k", 2048), ("8G", 8 << 30), ("1.5m", 3 << 19), ("1T", 1 << 40), ("1e3", 1000)],
)
def test_sizes_have_units_of_1024(config: Config, text: str, size: int) -> None:
    put(config, "template.cache", text)
    assert config.template_bytes == size


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pool.size", "-1"),
        ("pool.size", "51"),
        ("pool.size", "many"),
        ("pool.size", ""),
        ("pool.size", "1.5"),
        ("template.auto", "yes"),
        ("template.auto", "ON"),
        ("template.cache", ""),
        ("template.cache", "G"),
        ("template.cache", "8GG"),
        ("template.cache", "8 gigabytes"),
        ("template.cache", "-1G"),
        ("template.cache", "inf"),
        ("template.cache", "1e400"),
        ("template.cache", "nan"),
    ],
)
def test_what_is_no_value_is_refused_with_what_would_be_one(config: Config, key: str, value: str) -> None:
    """One error, nothing changed, nobody told."""
    config.changed = lambda: pytest.fail("nothing has changed")
    before = [setting.value for setting in asyncio.run(config.list())]
    with pytest.raises(BadRequest, match="is no value") as refused:
        put(config, key, value)
    assert refused.value.hint
    assert [setting.value for setting in asyncio.run(config.list())] == before


def test_an_unknown_setting_gets_the_nearest_one_as_a_hint(config: Config) -> None:
    with pytest.raises(NotFound) as refused:
        put(config, "pool.sise", "1")
    assert "pool.size" in (refused.value.hint or "")
    with pytest.raises(NotFound) as refused:
        put(config, "x", None)
    assert "template.cache" in (refused.value.hint or "")
