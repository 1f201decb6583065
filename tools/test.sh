#!/bin/sh
# All tests. The guest pieces are built once into .make/home (or $LIMPET_TEST_HOME) and shared by every test; so is a
# docker client, where there is none.
set -eu
home=${LIMPET_TEST_HOME:-$PWD/.make/home}
mkdir -p "$home"
export LIMPET_TEST_HOME="$home"
sh tools/docker_client.sh "$PWD/.make/docker" >/dev/null
export PATH="$PATH:$PWD/.make/docker"
LIMPET_HOME="$home" limpet setup
LIMPET_HOME="$home" limpet image build docker
LIMPET_HOME="$home" limpet daemon stop >/dev/null
exec pytest "$@"
