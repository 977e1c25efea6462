#!/usr/bin/env bash
# Installs what is missing (see tool/setup.sh) and runs the tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tool/setup.sh
export TQDM_DISABLE=1
exec "$PYTHON" -m pytest -q tests "$@"
