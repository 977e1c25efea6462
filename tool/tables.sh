#!/usr/bin/env bash
# The paper's tables, row by row, on any data root. What is finished is not done again, so it can be stopped any time.
#   TABLE=1 bash tool/tables.sh              baseline, + ER, + PCM, + mining, + CRF, random walk
#   TABLE=transform                          which transform the equivariance is asked for
#   TABLE=scale                              each test scale alone, and all of them
#   TABLE=refinement                         CAM, Grad-CAM, Grad-CAM++ of the baseline, and SEAM
#   TABLE=activation                         over- and under-activation of baseline and SEAM
#   TABLE=all                                all of them
# Settings, as environment variables; the defaults are the paper's, TOY=1 takes those of the demo on its data set:
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tool/setup.sh
TABLE=${TABLE:-1}                           # which table
OUT=${OUT:-tables${TOY:+_toy}}                # folder of all results, one for each data root and setting
SEEDS=${SEEDS:-0}                           # "0 1 2" repeats every training
if [ -n "${TOY:-}" ]; then                  # the demo's: slim networks, a classifier pretrained in place of ImageNet's
    SEAM=network.slim_SEAM AFF=network.slim_aff ROOT=$OUT/toy SCALES="0.25 0.5 0.75" ALPHAS="2 4 8"
    TRAIN="--resize_long 64 112 --crop_size 64 --num_workers 1" INFER="--num_workers 1"
    TRAIN_AFF="--crop_size 128 --momentum 0.9 --max_epochs 5 --num_workers 1" WALK="--alpha 4 --beta 16 --logt 4"
fi
ROOT=${ROOT:-VOC2012}                       # data root
SEAM=${SEAM:-network.resnet38_SEAM}         # networks
AFF=${AFF:-network.resnet38_aff}
WEIGHTS=${WEIGHTS:-ilsvrc-cls_rna-a1_cls1000_ep-0001.params}        # what training starts from
SCALES=${SCALES:-0.5 1.0 1.5 2.0}           # test scales
ALPHAS=${ALPHAS:-4 24}                      # CRF exponents; the first and the last go to AffinityNet
TRAIN_LIST=${TRAIN_LIST:-voc12/train_aug.txt}                       # images to train on
LIST=${LIST:-$ROOT/ImageSets/Segmentation/train.txt}                # images to score
NAMES=${NAMES:-}                            # own classes: "--class_names FILE", for every script
LABELS=${LABELS:-}                          # "--cls_labels FILE"
TRAIN=${TRAIN:-}                            # more flags for train_SEAM.py, train_aff.py, both infer_*.py, infer_aff.py
TRAIN_AFF=${TRAIN_AFF:-}
INFER=${INFER:-}
WALK=${WALK:-}
mkdir -p "$OUT"

run() { echo "+ python $*"; "$PYTHON" "$@"; }

go_on() { [ ! -f $1_last.pth ] || echo --resume; }       # SESSION: the flag for a training that was stopped

start() {       # sets $root, $train_list, $list, $weights for a seed; makes the toy set and its classifier
    root=$ROOT weights=$WEIGHTS backbone=$WEIGHTS train_list=$TRAIN_LIST list=$LIST
    if [ -n "${TOY:-}" ]; then
        root=$ROOT$seed list=$root/ImageSets/Segmentation/train.txt train_list=$list
        weights=$OUT/pretrained$seed.pth backbone=$OUT/pretrained${seed}_backbone.pth
        [ -f $list ] || run voc12/make_toy.py --out $root --count 240 --size 192 224 --seed $seed ${NAMES:---classes 4}
        [ -f $weights ] || run train_SEAM.py --voc12_root $root --train_list $list $TRAIN $NAMES --network $SEAM \
            --classifier_only --train_bn --dropout 0 --momentum 0.9 --lr 0.03 --batch_size 16 --max_epochs 25 \
            --seed $seed --session_name ${weights%.pth} $(go_on ${weights%.pth})
    fi
}

train() {       # NAME FLAGS...: a training of step 1
    local session=$OUT/$1$seed
    shift
    [ -f $session.pth ] || run train_SEAM.py --voc12_root $root --train_list $train_list --network $SEAM \
        --weights $weights --seed $seed --session_name $session $TRAIN $NAMES $LABELS "$@" $(go_on $session)
}

cams() {        # NAME WEIGHTS_NAME FLAGS...: CAMs of step 2
    local out=$OUT/$1$seed session=$OUT/$2$seed
    shift 2
    run infer_SEAM.py --voc12_root $root --infer_list $list --network $SEAM --weights $session.pth \
        --out_cam ${out}_cam $INFER $NAMES $LABELS "$@"
}

score() {       # TABLE ROW FOLDER FLAGS...: one row of a table
    local comment="$1 | $2 | $seed" folder=$3
    shift 3
    cut -sf2- $OUT/evallog.txt 2>/dev/null | grep -qxF -- "$comment" || run evaluation.py --list $list \
        --gt_dir $root/SegmentationClass --logfile $OUT/evallog.txt --comment "$comment" \
        --predict_dir $folder --out_prefix $folder $NAMES "$@"
}

curve() { score "$@" --type npy --curve True; }

baseline() {
    train baseline --classifier_only
    cams baseline baseline --map cam --scales $SCALES
}

seam() {
    train seam
    cams seam seam --scales $SCALES
}

table_1() {
    baseline
    curve 1 "baseline" $OUT/baseline${seed}_cam
    train er --pcm off --ecr_weight 0 --rvmin_weight 0
    cams er er --map cam --scales $SCALES
    curve 1 "+ ER" $OUT/er${seed}_cam
    train pcm --topk_ratio 1
    cams pcm pcm --scales $SCALES
    curve 1 "+ PCM and ECR" $OUT/pcm${seed}_cam
    seam
    curve 1 "+ hard-example mining (SEAM)" $OUT/seam${seed}_cam
    run infer_SEAM.py --voc12_root $root --infer_list $train_list --network $SEAM --weights $OUT/seam$seed.pth \
        --out_cam $OUT/seam${seed}_aff_cam --out_crf $OUT/seam${seed}_crf --crf_alpha $ALPHAS --scales $SCALES $INFER \
        $NAMES $LABELS
    local alpha alphas=($(printf '%.1f ' $ALPHAS))      # as in the names of the folders
    for alpha in ${alphas[*]}; do
        score 1 "+ CRF, alpha $alpha" $OUT/seam${seed}_crf_$alpha --type crf
    done
    [ -f $OUT/aff$seed.pth ] || run train_aff.py --voc12_root $root --train_list $train_list --network $AFF \
        --weights $backbone --la_crf_dir $OUT/seam${seed}_crf_${alphas[0]} \
        --ha_crf_dir $OUT/seam${seed}_crf_${alphas[${#alphas[*]}-1]} --seed $seed --session_name $OUT/aff$seed \
        $TRAIN_AFF $NAMES $(go_on $OUT/aff$seed)
    run infer_aff.py --voc12_root $root --infer_list $list --network $AFF --weights $OUT/aff$seed.pth \
        --cam_dir $OUT/seam${seed}_cam --out_rw $OUT/rw$seed $WALK $INFER $NAMES
    score 1 "random walk" $OUT/rw$seed --type png
}

table_transform() {
    local kind
    seam
    curve transform "rescale" $OUT/seam${seed}_cam
    for kind in flip rotation translation; do
        train $kind --transform $kind
        cams $kind $kind --scales $SCALES
        curve transform "$kind" $OUT/$kind${seed}_cam
    done
}

table_scale() {
    local scale
    seam
    for scale in $SCALES; do
        cams scale_${scale}_ seam --scales $scale
        curve scale "$scale" $OUT/scale_${scale}_${seed}_cam
    done
    curve scale "all" $OUT/seam${seed}_cam
}

table_refinement() {
    local kind
    baseline
    curve refinement "CAM" $OUT/baseline${seed}_cam
    for kind in gradcam gradcam++; do
        cams $kind baseline --map $kind --scales $SCALES
        curve refinement "$kind" $OUT/$kind${seed}_cam
    done
    seam
    curve refinement "SEAM" $OUT/seam${seed}_cam
}

table_activation() {
    baseline
    curve activation "baseline" $OUT/baseline${seed}_cam
    seam
    curve activation "SEAM" $OUT/seam${seed}_cam
}

[ "$TABLE" != all ] || TABLE="1 refinement activation scale transform"
for table in $TABLE; do
    for seed in $SEEDS; do
        start
        table_$table
    done
done
run tool/report.py tables --logfile $OUT/evallog.txt --out $OUT/tables
