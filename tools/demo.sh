#!/bin/sh
# The main job on a real repository: clone this project, let a command loose on it in a microVM, bring its work back.
set -eu
say() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }

work=$(mktemp -d)
sandbox=demo-$$
trap 'limpet rm --yes --force "$sandbox" >/dev/null 2>&1 || true; rm -rf "$work"' EXIT INT TERM

echo "== a real repository: a clone of this project"
git clone -q . "$work/repo"
cd "$work/repo"

echo "== guest pieces: built once, from Debian packages"
say limpet setup

echo "== a real virtual machine runs a command on it"
say limpet run --name "$sandbox" -- sh -c '
    uname -sr; echo "vCPUs: $(nproc), user: $(whoami), in: $PWD"
    echo "Checked inside a limpet." >> README.md
    git add -A && git -c user.name=agent -c user.email=agent@example.org commit -qm "readme: say who was here"
    echo "left untracked" > notes.txt
    sudo rm -rf /boot /srv /var/log && echo "whatever happens in here, your host is safe"'

echo "== what it did: a commit and an untracked file, as one patch"
say limpet diff "$sandbox" --stat
echo "== bring it back"
say limpet apply "$sandbox"
say git status --short
say limpet stop "$sandbox"
