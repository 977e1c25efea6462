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
seed=0 full= root= photographs= names=() kinds=(--classes 4)
while [ $# -gt 0 ]; do
    case "$1" in
        --seed) seed=$2; shift 2 ;;
        --full) full=1; shift ;;
        --class_names) names=(--class_names "$2") kinds=("${names[@]}"); shift 2 ;;
        --voc12_root) root=$2; shift 2 ;;
        --count) photographs=$2; shift 2 ;;
        *) sed -n '2,9s/^# //p' tool/demo.sh >&2; exit 2 ;;
    esac
done
out=demo
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
step() { printf '\n===== %s\n' "$1"; }
run() { echo "+ python $*"; "$PYTHON" "$@"; }

if [ -n "$root" ]; then
    grep . "$all" | head -n "$photographs" > $out/list.txt || true       # grep may find head gone
    steps=$(($(wc -l < $out/list.txt) / 8))         # of an epoch
    [ $steps -gt 0 ] || stop "$all (--voc12_root) has fewer than 8 images, a batch"
    epochs=$(((130 + steps / 2) / steps))           # about 130 steps
    [ $epochs -gt 0 ] || epochs=1
    run tool/tables.py --lite0 --voc12_root "$root" --list $out/list.txt --train_list $out/list.txt \
        ${names[@]+"${names[@]}"} --cls_labels "$root/cls_labels.npy" --seeds "$seed" --out $out --num_workers 1 \
        --rows baseline SEAM CRF walk --train="--max_epochs $epochs" --train_aff="--max_epochs $epochs"
    ln -s cam_classifier_only_map_cam $out/seed$seed/plain_cam          # a short title
    run tool/visualization.py --voc12_root "$root" --list $out/list.txt --out $out/result.png \
        --cam_dir $out/seed$seed/plain_cam $out/seed$seed/cam \
        --crf_dir $out/seed$seed/crf_1.1 --label_dir $out/seed$seed/walk
    echo "$((SECONDS / 60)) min $((SECONDS % 60)) s; the picture: $out/result.png"
    exit
fi

if [ -z "$full" ]; then
    net=slim count=160 pretrain_epochs=25 seam_epochs=8 aff_epochs=5 seg_steps=50 batch=8
else
    net=resnet38 count=12 pretrain_epochs=1 seam_epochs=1 aff_epochs=1 seg_steps=1 batch=4
fi
seam=network.${net}_SEAM aff=network.${net}_aff seg=network.${net}_deeplab
data=(--voc12_root $out/VOC2012 --num_workers 1 ${names[@]+"${names[@]}"})
list=$out/VOC2012/ImageSets/Segmentation/train.txt val=$out/VOC2012/ImageSets/Segmentation/val.txt
train=(--train_list $list "${data[@]}" --seed "$seed")
infer=(--infer_list $list "${data[@]}")
crop=(--resize_long 64 112 --crop_size 64)      # as the paper's 448..768 and 448, a seventh
scales="0.25 0.5 0.75"                          # so that the network sees objects about as large as in training
score() {
    run evaluation.py --gt_dir $out/VOC2012/SegmentationClass --logfile $out/evallog.txt \
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
score --list $list --predict_dir $out/trivial/background --comment "trivial: all background" > /dev/null
score --list $list --predict_dir $out/trivial/labels --comment "trivial: the label everywhere" > /dev/null
score --list $list --predict_dir $out/plain_cam --type npy --curve True --comment "plain CAM" | grep "^best"
score --list $list --predict_dir $out/cam --type npy --curve True --comment "SEAM CAM"
for alpha in 2 4 8; do
    score --list $list --predict_dir $out/crf_$alpha.0 --type crf --comment "SEAM CAM + CRF, alpha $alpha"
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
score --list $list --predict_dir $out/rw --type png --comment "random walk"

for labels in rw VOC2012/SegmentationClass; do
    step "7. to 9. Retraining on $labels, and its labels of images that no step has seen"
    run train_seg.py "${train[@]}" --label_dir $out/$labels --network $seg --weights $out/pretrained_backbone.pth \
        --crop_size 128 --lr 0.005 --bn_momentum 0.05 --batch_size $batch --max_iters $seg_steps \
        --session_name $out/seg_$(basename $labels)
    run infer_seg.py "${data[@]}" --infer_list $val --network $seg --weights $out/seg_$(basename $labels).pth \
        --scales 0.5 0.75 --out_seg $out/seg_$(basename $labels)
    score --list $val --predict_dir $out/seg_$(basename $labels) --type png --comment "val: retrained on $labels"
done

step "Result, seed $seed, $((SECONDS / 60)) min $((SECONDS % 60)) s"
run tool/report.py table --logfile $out/evallog.txt
run tool/visualization.py --voc12_root $out/VOC2012 --list $list --cam_dir $out/plain_cam $out/cam \
    --crf_dir $out/crf_4.0 --label_dir $out/rw --out $out/result.png
echo "The picture: $out/result.png"
