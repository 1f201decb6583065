#!/bin/sh
# All tests. The guest pieces are built once into .make/home (or $LIMPET_TEST_HOME) and shared by every test.
set -eu
home=${LIMPET_TEST_HOME:-$PWD/.make/home}
mkdir -p "$home"
export LIMPET_TEST_HOME="$home"
LIMPET_HOME="$home" limpet setup
LIMPET_HOME="$home" limpet daemon stop >/dev/null
exec pytest "$@"
