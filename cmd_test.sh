#!/usr/bin/env bash
# ruff, mypy and the tests, about 9 minutes on two cores. Stops at the first that fails.
#
#   bash cmd_test.sh                               all three
#   bash cmd_test.sh tests/test_x.py -k name       pytest alone, with these arguments
#   bash cmd_test.sh --slow [pytest arguments]     only the tests marked slow
set -euo pipefail
cd "$(dirname "$0")"
NEED_DEV=1
. scripts/environment.sh

# Two workers, a test file to one of them, so that what a file's tests share is made once; in the order of
# tests/conftest.py.
if [ $# -eq 0 ]; then
  "$PYTHON" -m ruff check .
  "$PYTHON" -m mypy
  set -- -n 2 --dist loadfile --no-loadscope-reorder
elif [ "$1" = --slow ]; then
  shift
  set -- -m slow -n 2 --dist loadfile --no-loadscope-reorder "$@"
fi
exec "$PYTHON" -m pytest -q "$@"
