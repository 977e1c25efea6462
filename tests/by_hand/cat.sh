#!/usr/bin/env bash
# The picture of the cat in the README: trains on photographs, then labels a photograph that no network has seen.
#   ROOT=DATA_ROOT PHOTO=chelsea.png bash tests/by_hand/cat.sh
# ROOT is described in tests/by_hand/schedule.sh. PHOTO is data/chelsea.png in the folder of scikit-image, CC0, by Stefan
# van der Walt. OUT (cat) is the folder of the results, with cat.png; --resume keeps what is finished.
set -euo pipefail
: "${ROOT:?the data root}" "${PHOTO:?the photograph}"
ROOT=$(realpath "$ROOT") PHOTO=$(realpath "$PHOTO") OUT=$(realpath -m "${OUT:-cat}")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source tool/setup.sh
lists=$ROOT/ImageSets/Segmentation
mkdir -p "$OUT/JPEGImages"

# to save time, AffinityNet trains on every fourth of the scored photographs, with smaller crops
awk 'NR % 4 == 1' "$lists/train.txt" > "$OUT/quarter.txt"
"$PYTHON" tool/tables.py --lite0 --rows baseline SEAM walk --voc12_root "$ROOT" --train_list "$lists/train_aug.txt" \
    --list "$OUT/quarter.txt" --aff_list "$OUT/quarter.txt" --cls_labels "$ROOT/cls_labels.npy" \
    --train_aff="--crop_size 128 --max_epochs 3" --out "$OUT/tables" "$@"

cp "$PHOTO" "$OUT/JPEGImages/chelsea.png"
echo chelsea > "$OUT/list.txt"
"$PYTHON" -c "import numpy; numpy.save('$OUT/labels.npy', {'chelsea': numpy.eye(20, dtype='f4')[7]})"    # 7: cat
weights=$OUT/tables/seed0
image=(--voc12_root "$OUT" --infer_list "$OUT/list.txt")
seam=(--cls_labels "$OUT/labels.npy" --network network.timm_SEAM --scales 0.75 1 --flip 0)
"$PYTHON" infer_SEAM.py "${image[@]}" "${seam[@]}" --weights "$weights/seam_classifier_only.pth" --map cam \
    --out_cam "$OUT/plain CAM"
"$PYTHON" infer_SEAM.py "${image[@]}" "${seam[@]}" --weights "$weights/seam.pth" --out_cam "$OUT/SEAM CAM" \
    --out_crf "$OUT/SEAM + CRF" --crf_alpha 1.1
"$PYTHON" infer_aff.py "${image[@]}" --network network.timm_aff --weights "$weights/aff.pth" \
    --cam_dir "$OUT/SEAM CAM" --alpha 1.1 --logt 4 --out_rw "$OUT/random walk"
"$PYTHON" tool/visualization.py --voc12_root "$OUT" --list "$OUT/list.txt" --cam_dir "$OUT/plain CAM" "$OUT/SEAM CAM" \
    --crf_dir "$OUT/SEAM + CRF_1.1" --label_dir "$OUT/random walk" --out "$OUT/cat.png"
