#!/usr/bin/env bash
# Installs what is missing (see tool/setup.sh) and runs the tests, in two processes where pytest-xdist is installed;
# arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tool/setup.sh
export TQDM_DISABLE=1
processes=""
if "$PYTHON" -c "import xdist" 2>/dev/null; then
    processes="-n 2 --dist loadfile"        # a file stays in one process, because its tests share what they made
    export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE        # threads that wait for work would take it from the other
fi
exec "$PYTHON" -m pytest -q $processes tests "$@"
