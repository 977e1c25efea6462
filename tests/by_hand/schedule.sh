#!/usr/bin/env bash
# The paper's schedule on photographs: does SEAM's gain over the plain CAM grow with crops of 448 and 1,000 steps?
#   ROOT=DATA_ROOT OUT=FOLDER bash tests/by_hand/schedule.sh [more flags for each tool/tables.py]
# ROOT has JPEGImages, SegmentationClass, cls_labels.npy, and in ImageSets/Segmentation train_aug.txt (1,040 photographs
# to train on) and train.txt (437 of them, to score): see "Photographs" in tests/README.md. Begin with SEEDS=0: on 16
# cores, a seed was estimated at ten minutes. Other settings by variables: JOBS (6) runs beside each other, each with
# WORKERS (2) loader processes; SEEDS, EPOCHS, CROPS; FAST, flags for training and inference. A run that was stopped
# goes on with the same command.
# OUT/NAME/seedN has what a run writes, OUT/schedule.csv the lines of all tables.csv. The CRF and the walk of the best
# setting: its command, see OUT/NAME/seedN/log.txt, with --rows CRF walk --alphas ... added.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
: "${ROOT:?the data root}" "${OUT:?the folder of the results}"
lists=$ROOT/ImageSets/Segmentation failed=0
source tool/setup.sh
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TQDM_DISABLE=1

# waits for one run; false if none is left
finish_one() {
    wait -n
    local status=$?
    [ $status -eq 127 ] && return 1
    [ $status -eq 0 ] || failed=1
}

# NAME SIDE "FLAGS OF train_SEAM.py" ROW...: a run of tables.py for every seed
setting() {
    local name=$1 side=$2 flags=$3 seed out
    shift 3
    for seed in ${SEEDS:-0 1 2}; do
        while [ "$(jobs -rp | wc -l)" -ge "${JOBS:-6}" ]; do finish_one; done
        out=$OUT/$name/seed$seed
        mkdir -p "$out"
        local command=("$PYTHON" tool/tables.py --lite0 --voc12_root "$ROOT" --list "$lists/train.txt"
            --train_list "$lists/train_aug.txt" --cls_labels "$ROOT/cls_labels.npy" --num_workers "${WORKERS:-2}"
            --mean_classes background cat cow dog horse sheep --scales 0.5 1 1.5 2 --infer="--flip 1 ${FAST---tf32}"
            --train="--crop_size $side --resize_long $side $((side * 768 / 448)) $common $flags"
            --seeds "$seed" --out "$out" --resume --rows "$@" ${more[@]+"${more[@]}"})
        { printf '%q ' "${command[@]}"; echo; } | tee "$out/log.txt"
        "${command[@]}" >> "$out/log.txt" 2>&1 &
    done
}

more=("$@")
paper="--lr 0.01 --momentum 0.0005"     # as the original ran: its momentum is the weight decay
momentum="--lr 0.001 --momentum 0.9"
common="--scale_factor 0.3 --max_epochs ${EPOCHS:-8} ${FAST---tf32}"
ends=(baseline hard-example)
for side in ${CROPS:-448}; do
    setting ${side}_paper $side "$paper" baseline '+ ER' '+ PCM' hard-example
    setting ${side}_momentum $side "$momentum" baseline '+ ER' '+ PCM' hard-example
    # with PCM as it is drawn at random; then also with the classifier as it is fitted at the start
    setting ${side}_untrained $side "$momentum --er_weight 0 --ecr_weight 0 --rvmin_weight 0" hard-example
    setting ${side}_fitted $side "--lr 0 --max_epochs 1" "${ends[@]}"
done
for side in ${SMALLER_CROPS-192 256 320}; do
    setting ${side}_momentum $side "$momentum" "${ends[@]}"
done
while finish_one; do :; done

for table in "$OUT"/*/seed*/tables.csv; do
    sed "s|^|$(basename "$(dirname "$(dirname "$table")")"),|" "$table"
done | awk -F, 'NR == 1 { sub(/^[^,]*/, "setting"); print } !/,table,row,/' > "$OUT/schedule.csv"
cat "$OUT/schedule.csv"
exit $failed
