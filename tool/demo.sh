#!/usr/bin/env bash
# Runs the numbered steps of the README on any machine. Overwrites the folder demo/; ends with a table and a picture.
#   bash tool/demo.sh [--seed N]     on drawings, with slim networks that are trained from random weights
#   bash tool/demo.sh --full         the same steps with the full-width networks, for only a few iterations
#   --class_names FILE               with your own class names in place of VOC's, one per line
# For photographs: python tool/label_photos.py --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
seed=0 full= names=()
while [ $# -gt 0 ]; do
    case "$1" in
        --seed) seed=$2; shift 2 ;;
        --full) full=1; shift ;;
        --class_names) names=(--class_names "$2"); shift 2 ;;
        *) sed -n '2,6s/^# //p' tool/demo.sh >&2; exit 2 ;;
    esac
done
out=demo made=demo/seed$seed
source tool/setup.sh
export TQDM_MININTERVAL=5

rm -rf $out
mkdir $out
run() { echo "+ python $*"; "$PYTHON" "$@"; }
score() {
    run evaluation.py --list $list --gt_dir "$root/SegmentationClass" --logfile $out/evallog.txt \
        ${names[@]+"${names[@]}"} "$@"
}

root=$made/toy list=$made/toy/ImageSets/Segmentation/train.txt net=slim
settings=(--count 160)
if [ -n "$full" ]; then
    net=resnet38 short="--batch_size 4 --max_epochs 1"
    settings=(--count 12 --pretrain="--batch_size 8 --max_epochs 1" --train="$short" --train_aff="$short"
              --train_seg="--batch_size 4 --max_iters 1")
fi
run tool/tables.py --out $out --seeds "$seed" --num_workers 1 --infer="--crf_workers 2" ${names[@]+"${names[@]}"} \
    --toy --table 1 retrain --rows SEAM CRF walk retrained "${settings[@]}" \
    --network network.${net}_SEAM --network_aff network.${net}_aff --network_seg network.${net}_deeplab
run infer_SEAM.py --voc12_root $root --infer_list $list --num_workers 1 ${names[@]+"${names[@]}"} \
    --network network.${net}_SEAM --weights $made/pretrained.pth --scales 0.25 0.5 0.75 --map cam \
    --out_cam $made/plain_cam
score --predict_dir $made/plain_cam --type npy --curve True --comment "plain CAM"
run tool/report.py trivial --cam_dir $made/cam --out_dir $out/trivial
score --predict_dir $out/trivial/background --comment "trivial: all background" > /dev/null
score --predict_dir $out/trivial/labels --comment "trivial: the label everywhere" > /dev/null
run tool/report.py table --logfile $out/evallog.txt
run tool/visualization.py --voc12_root "$root" --list $list --out $out/result.png \
    --cam_dir $made/plain_cam $made/cam --crf_dir $made/crf_4.0 --label_dir $made/walk
echo "The demo took $((SECONDS / 60)) min $((SECONDS % 60)) s. Images, CAMs and labels: $out/result.png"
