#!/bin/sh
# Has schemathesis ask the management server whatever its own description permits and forbids.
#
#   tests/schemathesis.sh [machine | host] [OPTIONS OF `st run`]
#
# It installs schemathesis into target/schemathesis (Python 3.10 or later), builds the server on a machine, or on a host with its manager's paths, that only remembers, and
# takes some minutes. What it finds is printed with a curl command that repeats it.
set -eu
what=machine
case "${1:-}" in
machine | host)
    what=$1
    shift
    ;;
esac
cd "$(dirname "$0")/.."
root=$PWD
venv=$root/target/schemathesis
if [ ! -x "$venv/bin/st" ]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet 'schemathesis>=4.32,<5'
fi
cargo build -p management --example fake_machine
url=$(mktemp)
"$root/target/debug/examples/fake_machine" "$what" > "$url" &
server=$!
trap 'kill $server; rm -f "$url"' EXIT
while [ ! -s "$url" ]; do sleep 0.1; done
# It keeps what it has found where it is started.
cd "$venv"
bin/st --config-file "$root/tests/schemathesis.toml" run "$(cat "$url")/openapi.json" --phases examples,coverage,fuzzing,stateful "$@"
