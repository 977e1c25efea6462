#!/usr/bin/env bash
# The numbered steps of the README on drawings, on any machine. Writes the folder demo/ anew.
#   bash tool/demo.sh [--seed N]     slim networks, trained here and now; ends with a table and demo/result.png
#   bash tool/demo.sh --full         the same steps with the full-width networks and a handful of iterations
#   --class_names FILE               with class names of your own in place of VOC's, one a line
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
seed=0 full= names=() kinds=(--classes 4)
while [ $# -gt 0 ]; do
    case "$1" in
        --seed) seed=$2; shift 2 ;;
        --full) full=1; shift ;;
        --class_names) names=(--class_names "$2") kinds=("${names[@]}"); shift 2 ;;
        *) echo "usage: bash tool/demo.sh [--seed N] [--full] [--class_names FILE]" >&2; exit 2 ;;
    esac
done
source tool/setup.sh
export TQDM_MININTERVAL=5

if [ -z "$full" ]; then
    seam=network.slim_SEAM aff=network.slim_aff count=240 pretrain_epochs=25 seam_epochs=8 aff_epochs=5 batch=8
else
    seam=network.resnet38_SEAM aff=network.resnet38_aff count=12 pretrain_epochs=1 seam_epochs=1 aff_epochs=1 batch=4
fi
out=demo
data=(--voc12_root $out/VOC2012 --num_workers 1 ${names[@]+"${names[@]}"})
list=$out/VOC2012/ImageSets/Segmentation/train.txt
train=(--train_list $list "${data[@]}" --seed "$seed")
infer=(--infer_list $list "${data[@]}")
crop=(--resize_long 64 112 --crop_size 64)      # as the paper's 448..768 and 448, a seventh
scales="0.25 0.5 0.75"                          # so that the network sees objects about as large as in training
rm -rf $out
mkdir $out

step() { printf '\n===== %s\n' "$1"; }
run() { echo "+ python $*"; "$PYTHON" "$@"; }
score() {
    run evaluation.py --list $list --gt_dir $out/VOC2012/SegmentationClass --logfile $out/evallog.txt \
        ${names[@]+"${names[@]}"} "$@"
}

step "0. A toy data set in VOC 2012's layout, and a classifier pretrained on it in place of ImageNet's"
run voc12/make_toy.py --out $out/VOC2012 --count $count --size 192 224 --seed "$seed" ${kinds[@]+"${kinds[@]}"}
run train_SEAM.py "${train[@]}" "${crop[@]}" --network $seam --classifier_only --train_bn --dropout 0 \
    --momentum 0.9 --lr 0.03 --batch_size $((2 * batch)) --max_epochs $pretrain_epochs --session_name $out/pretrained
run infer_SEAM.py "${infer[@]}" --network $seam --weights $out/pretrained.pth --scales $scales \
    --map cam --out_cam $out/plain_cam

step "1. SEAM training"
run train_SEAM.py "${train[@]}" "${crop[@]}" --network $seam --weights $out/pretrained.pth \
    --batch_size $batch --max_epochs $seam_epochs --session_name $out/seam

step "2. SEAM inference: CAMs, and their dense CRF"
run infer_SEAM.py "${infer[@]}" --network $seam --weights $out/seam.pth --scales $scales \
    --out_cam $out/cam --out_crf $out/crf --crf_alpha 2 4 8

step "3. SEAM evaluation: the curve of mIoU over the background score"
run tool/report.py trivial --cam_dir $out/cam --out_dir $out/trivial
score --predict_dir $out/trivial/background --comment "trivial: all background" > /dev/null
score --predict_dir $out/trivial/labels --comment "trivial: the label everywhere" > /dev/null
score --predict_dir $out/plain_cam --type npy --curve True --comment "plain CAM" | grep "^best"
score --predict_dir $out/cam --type npy --curve True --comment "SEAM CAM"
for alpha in 2 4 8; do
    score --predict_dir $out/crf_$alpha.0 --type crf --comment "SEAM CAM + CRF, alpha $alpha"
done

step "4. AffinityNet training"
run train_aff.py "${train[@]}" --crop_size 128 --network $aff --weights $out/pretrained_backbone.pth --momentum 0.9 \
    --la_crf_dir $out/crf_2.0 --ha_crf_dir $out/crf_8.0 \
    --batch_size $batch --max_epochs $aff_epochs --session_name $out/aff

step "5. Random walk"
# the feature maps are half as wide as VOC's: fewer steps, and more weight on high affinities
run infer_aff.py "${infer[@]}" --network $aff --weights $out/aff.pth --cam_dir $out/cam \
    --alpha 4 --beta 16 --logt 4 --out_rw $out/rw

step "6. Random walk evaluation"
score --predict_dir $out/rw --type png --comment "random walk"

step "Result, seed $seed, $((SECONDS / 60)) min $((SECONDS % 60)) s"
run tool/report.py table --logfile $out/evallog.txt
run tool/visualization.py --voc12_root $out/VOC2012 --list $list --cam_dir $out/plain_cam $out/cam \
    --crf_dir $out/crf_4.0 --label_dir $out/rw --out $out/result.png
echo "The picture: $out/result.png"
