# Sourced by the other scripts: makes ROOT/.venv if needed and puts it on PATH. Arguments: requirement files.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"

find_python() {
  for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 &&
       "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "error: no Python >= 3.11 with venv found: install one, or set PYTHON=/path/to/python" >&2
  return 2
}

set_up() {
  local wanted stamp="$ROOT/.venv/requirements.cksum"
  wanted="$(cat "$@" | cksum)"
  if ! { [ -f "$stamp" ] && grep -qxF "$wanted" "$stamp"; }; then
    local python
    python="$(find_python)"
    echo "setting up $ROOT/.venv with $python: about 1.2 GB from $* (once; one to five minutes)"
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    local arguments=()
    for file in "$@"; do arguments+=(-r "$file"); done
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "${arguments[@]}"
    echo "$wanted" >>"$stamp"
  fi
  export PATH="$ROOT/.venv/bin:$PATH"
}
