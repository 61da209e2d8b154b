# Sourced by every cmd_*.sh: goes to the repository's folder and sets PYTHON to an interpreter that has the packages.
#
#   1. the active venv or conda environment, if it satisfies the ranges in pyproject.toml;
#   2. else .venv, if its last set-up finished for the requirements.txt that is here now;
#   3. else .venv is made, or brought up to date, from requirements.txt. This alone needs a network. An interrupted
#      set-up is repaired by the next script; of two scripts at once, one sets up and the other waits.
#
# The caller may set NEED_DEV=1 (what tests need too: requirements-dev.txt), NEED_SERVE=1 (what the server needs too) and
# NEED_SETUP=0 (leave out 3: PYTHON is then empty where 1 and 2 find nothing).
#
# torch: PyPI's build for Linux brings CUDA, which is right for machines with NVIDIA GPUs; on others it only costs
# disk. Where pip also knows a CPU build of that version (torch 2.13.0+cpu), the pin accepts it:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu bash cmd_grun.sh

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

# One line per package of pyproject.toml that interpreter $1 lacks or has in another version.
packages_missing_in() {
  "$1" - "${NEED_DEV:-0}" "${NEED_SERVE:-0}" <<'PYTHON_SOURCE'
import sys

if sys.version_info < (3, 11):
    print("Python >= 3.11 (it is %d.%d)" % sys.version_info[:2])
    sys.exit()
import importlib.metadata
import tomllib

try:
    from packaging.requirements import Requirement
except ImportError:
    print("packaging")
    sys.exit()
with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras = (["dev", "docs"] if sys.argv[1] == "1" else []) + (["serve"] if sys.argv[2] == "1" else [])
for line in project["dependencies"] + [line for name in extras for line in project["optional-dependencies"][name]]:
    wanted = Requirement(line)
    try:
        if not wanted.specifier.contains(importlib.metadata.version(wanted.name), prereleases=True):
            print(line)
    except importlib.metadata.PackageNotFoundError:
        print(line)
PYTHON_SOURCE
}

# Files that .venv is to be set up from. A copy of each is in .venv, written when its set-up has finished.
requirements=requirements.txt
needed=(requirements.txt)
if [ "${NEED_DEV:-0}" = 1 ]; then
  requirements=requirements-dev.txt # which includes the other
  needed+=("$requirements")
fi

venv_is_finished() {
  local file
  [ -x .venv/bin/python ] || return 1
  for file in "${needed[@]}"; do cmp -s "$file" ".venv/installed-$file" || return 1; done
}

# The first interpreter that can make .venv.
find_base_python() {
  local candidate
  for candidate in python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      if ! "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
        echo "error: $candidate has no venv module; install it (Debian, Ubuntu: apt install python3-venv)" >&2
        return 1
      fi
      echo "$candidate"
      return 0
    fi
  done
  echo "error: Python >= 3.11 is needed, and python3 is $(python3 --version 2>&1 | tail -n 1); install a newer one or" \
    "activate an environment that has it" >&2
  return 1
}

# A subshell, so that leaving it, however it ends, releases the lock on requirements.txt.
set_up_venv() (
  local file
  base_python=$(find_base_python) || exit 1
  exec 9<>requirements.txt
  if ! "$base_python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null; then
    echo "waiting for another script that sets up .venv ..." >&2
    "$base_python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)' 2>/dev/null ||
      echo "this file system has no locks: going on without" >&2
  fi
  ! venv_is_finished || exit 0

  echo "setting up .venv (once, about 3 minutes; log in .venv/setup.log) ..." >&2
  started=$SECONDS
  if [ -e .venv/unfinished ] || ! .venv/bin/python -c '' 2>/dev/null; then
    rm -rf .venv && mkdir .venv && : >.venv/unfinished && "$base_python" -m venv .venv && rm .venv/unfinished || {
      echo "error: could not make .venv with $base_python" >&2
      exit 1
    }
  fi
  if ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: .venv has $(.venv/bin/python --version), not Python >= 3.11; delete it and run this again" >&2
    exit 1
  fi
  for file in "${needed[@]}"; do rm -f ".venv/installed-$file"; done
  {
    # A package whose installation was cut off has no INSTALLER yet, but pip would take it for installed.
    .venv/bin/python - <<'PYTHON_SOURCE' &&
import pathlib
import shutil
import sysconfig

for record in pathlib.Path(sysconfig.get_path("purelib")).glob("*.dist-info"):
    if not (record / "INSTALLER").is_file():
        shutil.rmtree(record)
PYTHON_SOURCE
      .venv/bin/python -m pip install --quiet --no-input --disable-pip-version-check -r "$requirements"
  } >.venv/setup.log 2>&1 || {
    tail -n 15 .venv/setup.log >&2
    echo "error: installing $requirements into .venv failed (log: .venv/setup.log); the next run tries again" >&2
    exit 1
  }
  for file in "${needed[@]}"; do
    cp "$file" ".venv/.$file.part" && mv ".venv/.$file.part" ".venv/installed-$file" || exit 1
  done
  echo "set up .venv in $((SECONDS - started)) s" >&2
)

choose_python() {
  local folder missing
  PYTHON=
  for folder in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}"; do
    if [ -z "$folder" ] || [ ! -x "$folder/bin/python" ] || [ "$folder" -ef .venv ]; then continue; fi
    if missing=$(packages_missing_in "$folder/bin/python" 2>&1) && [ -z "$missing" ]; then
      PYTHON=$folder/bin/python
      return 0
    fi
    missing=$(printf '%s' "$missing" | tr '\n' ' ' | cut -c 1-200)
    echo "the active environment $folder is not used: it lacks $missing" >&2
  done
  if ! venv_is_finished; then
    if [ "${NEED_SETUP:-1}" = 0 ]; then return 0; fi
    set_up_venv || return 1
  fi
  PYTHON=.venv/bin/python
}

# Hyper-threads slow matrix products down more often than they help.
physical_cores() {
  if [ "$(uname -s)" = Darwin ]; then
    sysctl -n hw.physicalcpu
    return
  fi
  local usable physical
  usable=$(nproc 2>/dev/null) || usable=1
  physical=$(lscpu -p=CORE,SOCKET 2>/dev/null | awk '!/^#/ && !seen[$0]++ { n++ } END { print n + 0 }') || physical=0
  if [ "$physical" -gt 0 ] && [ "$physical" -lt "$usable" ]; then echo "$physical"; else echo "$usable"; fi
}

choose_python || exit 1
export PYTHON
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(physical_cores)}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
export HF_HUB_DISABLE_TELEMETRY=1
