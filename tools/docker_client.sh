#!/bin/sh
# The stock docker client that tests drive, without an engine and without being root: the one on PATH, else Debian's,
# unpacked into the directory $1. Prints where it is.
set -eu
directory=$1
if command -v docker; then exit 0; fi
client=$directory/docker
if [ ! -x "$client" ]; then
    mkdir -p "$directory"
    scratch=$(mktemp -d "$directory/download.XXXXXX")
    trap 'rm -rf "$scratch"' EXIT
    (
        cd "$scratch"
        if ! apt-get download -q docker.io >log 2>&1; then # no package lists here, or old ones: take some of our own
            mkdir -p lists/partial cache/archives/partial
            set -- -o "Dir::State::Lists=$PWD/lists" -o "Dir::Cache=$PWD/cache"
            { apt-get "$@" -q update && apt-get "$@" -q download docker.io; } >>log 2>&1 || {
                cat log >&2
                echo "error: no docker client could be downloaded" >&2
                echo "hint: sudo apt-get install docker.io, or any other docker client on PATH" >&2
                exit 1
            }
        fi
        dpkg-deb --fsys-tarfile docker.io_*.deb | tar -x ./usr/bin/docker
        mv usr/bin/docker ../docker
    )
fi
echo "$client"
