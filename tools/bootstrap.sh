#!/bin/sh
# Install what limpet needs on Debian 12: system packages (as root or with sudo), sub-ids, a virtual environment.
# Asks no questions: what it may not do it names, with the command that does it, and ends with status 1.
set -eu
venv=${1:-.venv}
packages="qemu-system-x86 qemu-utils mmdebstrap e2fsprogs btrfs-progs squashfs-tools busybox-static
          git passt uidmap kmod lz4 zstd cpio python3 python3-venv ca-certificates"

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

can_be_root() { [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }

refuse() {
    echo "error: $1" >&2
    echo "hint: as an administrator run: $2" >&2
    exit 1
}

command -v dpkg-query >/dev/null || refuse "this is not a Debian system" "see docs/install.md for what to install"

missing=
for package in $packages; do
    state=$(dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null || true)
    [ "$state" = "ii " ] || missing="$missing $package"
done
if [ -n "$missing" ]; then
    can_be_root || refuse "these packages are missing:$missing" "apt-get install$missing"
    echo "installing:$missing" >&2
    as_root env DEBIAN_FRONTEND=noninteractive apt-get update -qq
    # shellcheck disable=SC2086
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
fi

user=$(id -un)
if [ "$(id -u)" != 0 ] && ! grep -q "^$user:" /etc/subuid 2>/dev/null; then
    range="usermod --add-subuids 100000-165535 --add-subgids 100000-165535 $user"
    can_be_root || refuse "$user has no range of sub-uids, which building images needs" "$range"
    # shellcheck disable=SC2086
    as_root $range
fi

python=
for candidate in python3 /usr/bin/python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
[ -n "$python" ] || refuse "no Python 3.11 or newer with venv" "apt-get install python3 python3-venv"

"$venv/bin/python" -c '' 2>/dev/null || "$python" -m venv --clear "$venv"
echo "installing limpet into $venv" >&2
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e '.[dev]'
