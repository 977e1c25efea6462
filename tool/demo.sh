#!/usr/bin/env bash
# The numbered steps of the README on any machine. Writes the folder demo/ anew; ends with a table and demo/result.png.
#   bash tool/demo.sh [--seed N]     on drawings, with slim networks that are trained here and now
#   bash tool/demo.sh --full         the same steps with the full-width networks and a handful of iterations
#   --class_names FILE               with class names of your own in place of VOC's, one a line
#   bash tool/demo.sh --voc12_root ROOT [--count N] [--seed N]
#       on photographs, needs timm: steps 1 to 6 by tool/tables.py --lite0 on the first N (200) of ROOT's
#       ImageSets/Segmentation/train.txt; labels of ROOT/cls_labels.npy, else of Annotations
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
seed=0 full= root= photographs= names=()
while [ $# -gt 0 ]; do
    case "$1" in
        --seed) seed=$2; shift 2 ;;
        --full) full=1; shift ;;
        --class_names) names=(--class_names "$2"); shift 2 ;;
        --voc12_root) root=$2; shift 2 ;;
        --count) photographs=$2; shift 2 ;;
        *) sed -n '2,9s/^# //p' tool/demo.sh >&2; exit 2 ;;
    esac
done
out=demo made=demo/seed$seed
stop() { echo "$1" >&2; exit 2; }
if [ -n "$root" ]; then
    all=$root/ImageSets/Segmentation/train.txt photographs=${photographs:-200}
    [ -z "$full" ] || stop "--full is for drawings, without --voc12_root"
    [ -f "$all" ] || stop "no such file: $all (--voc12_root, from the repository)"
    [[ $photographs =~ ^[1-9][0-9]*$ && $photographs -ge 8 ]] || stop "--count $photographs: 8 or more"
    case "$(cd "$root" && pwd -P)/" in
        "$(pwd -P)/$out/"*) stop "$root (--voc12_root) lies in $out, which is written anew" ;;
    esac
elif [ -n "$photographs" ]; then
    stop "--count is for photographs, with --voc12_root"
fi
source tool/setup.sh
export TQDM_MININTERVAL=5

rm -rf $out
mkdir $out
run() { echo "+ python $*"; "$PYTHON" "$@"; }
tables() {
    run tool/tables.py --out $out --seeds "$seed" --num_workers 1 --infer="--crf_workers 2" \
        ${names[@]+"${names[@]}"} "$@"
}
score() {
    run evaluation.py --list $list --gt_dir "$root/SegmentationClass" --logfile $out/evallog.txt \
        ${names[@]+"${names[@]}"} "$@"
}

if [ -n "$root" ]; then
    list=$out/list.txt crf=crf_1.1
    grep . "$all" | head -n "$photographs" > $list || true      # grep may find head gone
    steps=$(($(wc -l < $list) / 8))                 # of an epoch
    [ $steps -gt 0 ] || stop "$all (--voc12_root) has fewer than 8 images, a batch"
    epochs=$(((130 + steps / 2) / steps))           # about 130 steps
    [ $epochs -gt 0 ] || epochs=1
    tables --lite0 --voc12_root "$root" --list $list --train_list $list --cls_labels "$root/cls_labels.npy" \
        --rows baseline SEAM CRF walk --train="--max_epochs $epochs" --train_aff="--max_epochs $epochs"
    ln -s cam_classifier_only_map_cam $made/plain_cam           # a short title
else
    root=$made/toy list=$made/toy/ImageSets/Segmentation/train.txt crf=crf_4.0 net=slim
    settings=(--count 160)
    if [ -n "$full" ]; then
        net=resnet38 short="--batch_size 4 --max_epochs 1"
        settings=(--count 12 --pretrain="--batch_size 8 --max_epochs 1" --train="$short" --train_aff="$short"
                  --train_seg="--batch_size 4 --max_iters 1")
    fi
    tables --toy --table 1 retrain --rows SEAM CRF walk retrained "${settings[@]}" \
        --network network.${net}_SEAM --network_aff network.${net}_aff --network_seg network.${net}_deeplab
    run infer_SEAM.py --voc12_root $root --infer_list $list --num_workers 1 ${names[@]+"${names[@]}"} \
        --network network.${net}_SEAM --weights $made/pretrained.pth --scales 0.25 0.5 0.75 --map cam \
        --out_cam $made/plain_cam
    score --predict_dir $made/plain_cam --type npy --curve True --comment "plain CAM"
    run tool/report.py trivial --cam_dir $made/cam --out_dir $out/trivial
    score --predict_dir $out/trivial/background --comment "trivial: all background" > /dev/null
    score --predict_dir $out/trivial/labels --comment "trivial: the label everywhere" > /dev/null
fi
run tool/report.py table --logfile $out/evallog.txt
run tool/visualization.py --voc12_root "$root" --list $list --out $out/result.png \
    --cam_dir $made/plain_cam $made/cam --crf_dir $made/$crf --label_dir $made/walk
echo "$((SECONDS / 60)) min $((SECONDS % 60)) s; the picture: $out/result.png"
