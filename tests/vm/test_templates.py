"""Templates: made when missed, used by the next create, never written to, and never trusted when they are damaged."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from limpet import Client
from limpet.digests import Seal, file_digest
from limpet.models import Event
from limpet.services import manifests
from limpet.services.templatecache import TemplateManifest
from tests.conftest import leave_home, new_home
from tests.vm.kit import clock_error, command_line, flip, remains, shell, wait_until

pytestmark = pytest.mark.vm


@dataclass
class Place:
    """A home with templates of its own, which tests may hurt."""

    client: Client
    directory: Path  # of its one template
    key: str

    def events(self, after: int) -> list[Event]:
        return [event for event in self.client.events(after) if event.kind.startswith("template.")]

    def now(self) -> int:
        return max((event.seq for event in self.client.events()), default=0)


@pytest.fixture(scope="module")
def place(pieces: Path) -> Iterator[Place]:
    """The first create finds no template, boots, and has one made in the background."""
    home = new_home(pieces)
    cache = home / "cache"
    cache.unlink()
    cache.mkdir(mode=0o700)
    for name in ("artifacts", "pieces"):
        (cache / name).symlink_to(pieces / "cache" / name)
    try:
        with Client(home=home) as client:
            box = client.sandboxes.create("cold", memory_mib=512)
            assert "templates" not in command_line(box)
            box.remove(force=True, purge=True)
            wait_until(lambda: client.templates.list(), 60)
            [template] = client.templates.list()
            client.config.set("template.auto", "off")
            yield Place(client, cache / "templates" / template.key, template.key)
    finally:
        leave_home(home)


def test_the_create_after_a_missed_one_starts_from_the_template_and_never_writes_to_it(place: Place) -> None:
    """VM-13, GST-3: two sandboxes of one template fill their memory and disks; every file of it is as before."""
    client, ram = place.client, place.directory / "ram"
    [template] = client.templates.list()
    assert (template.image, template.memory_mib, template.current) == ("base", 512, True)
    assert ram.stat().st_blocks * 512 < ram.stat().st_size  # sparse
    before = {path.name: file_digest(path) for path in place.directory.iterdir()}
    boxes = [client.sandboxes.create(name, memory_mib=512) for name in ("one", "two")]
    for box in boxes:
        assert f"templates/{place.key}/ram" in command_line(box)
        assert clock_error(box) <= 0.1
        shell(box, "head -c 64M /dev/urandom > /dev/shm/fill; echo x > /home/user/x; echo x > /srv/x; sync", "root")
    assert {path.name: file_digest(path) for path in place.directory.iterdir()} == before
    names = [shell(box, "hostname; cat /etc/machine-id /proc/sys/kernel/random/boot_id").split() for box in boxes]
    assert [name[0] for name in names] == ["one", "two"]
    assert not set(names[0]) & set(names[1])
    assert client.templates.build(memory_mib=512).key == place.key  # it is there: nothing is built
    for box in boxes:
        box.remove(force=True, purge=True)
    assert not remains(client)


def test_a_damaged_template_is_named_removed_and_the_sandbox_boots(place: Place, tmp_path: Path) -> None:
    """FRZ-6, VM-13: one flipped bit; the create works all the same, and the events say what happened."""
    shutil.copytree(place.directory, tmp_path / "kept")
    seen = place.now()
    flip(place.directory / "ram")
    box = place.client.sandboxes.create("flipped", memory_mib=512)
    try:
        assert "templates" not in command_line(box)
        assert shell(box, "hostname") == "flipped\n"
        [event] = place.events(seen)
        assert (event.kind, event.data["key"]) == ("template.removed", place.key)
        assert f"{place.directory / 'ram'} is damaged" in event.data["reason"]
        assert place.client.templates.list() == []
    finally:
        box.remove(force=True, purge=True)
        shutil.copytree(tmp_path / "kept", place.directory, dirs_exist_ok=True)


def test_a_template_that_no_vm_starts_from_is_given_up_for_a_boot(place: Place) -> None:
    """VM-13: its files are as they were sealed, but QEMU does not take them: told in the events, and booted."""
    seen = place.now()
    state = place.directory / "state"
    state.write_bytes(state.read_bytes()[:2000])
    manifest = manifests.read(TemplateManifest, place.directory / "template.json")
    manifest.files["state"] = Seal.of(state)
    manifests.write(place.directory, manifest, "template.json")
    box = place.client.sandboxes.create("refused", memory_mib=512)
    assert "templates" not in command_line(box)
    assert shell(box, "hostname") == "refused\n"
    events = place.events(seen)
    assert [event.kind for event in events] == ["template.removed"]
    assert events[0].data["reason"]
    box.remove(force=True, purge=True)
    assert place.client.templates.list() == []
    assert not remains(place.client)
