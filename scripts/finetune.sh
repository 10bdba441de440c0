#!/usr/bin/env bash
# Start a training run with accelerate and DeepSpeed ZeRO-3, as configured in scripts/zero3.yaml.
#
#     MODEL=/models/Qwen2.5-3B TRAIN=train.jsonl EVAL=eval.jsonl bash scripts/finetune.sh --dft_alpha 0.7
#
# Arguments are passed on to train_dft.py and override the flags below.
#     MODEL         model directory
#     TRAIN         training data
#     EVAL          evaluation data; no evaluation on it without
#     OUTPUT_DIR    default output/NAME_dft, where NAME is that of the model directory
#     NPROC         number of processes; default 2
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source scripts/help.sh
end_with_help scripts/finetune.sh "$@"
source scripts/secrets.sh
take_token "$@" || exit 2
set -- "${arguments[@]}"
MODEL="${MODEL:?set MODEL to a model directory}"
TRAIN="${TRAIN:?set TRAIN to the training data}"
OUTPUT_DIR="${OUTPUT_DIR:-output/$(basename "$MODEL")_dft}"
if [[ -f .venv/bin/activate && -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]]; then
    source .venv/bin/activate
fi
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$PWD/.torch_extensions}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"

launch=(accelerate launch --config_file scripts/zero3.yaml --num_processes "${NPROC:-2}")
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    export DS_ACCELERATOR=cpu
fi
evaluation=()
if [[ -n "${EVAL:-}" ]]; then
    evaluation=(--eval_data_path "$EVAL" --evaluation_strategy steps --eval_steps 100)
fi
set -x
"${launch[@]}" train_dft.py \
    --model_name_or_path "$MODEL" \
    --train_data_path "$TRAIN" \
    "${evaluation[@]}" \
    --output_dir "$OUTPUT_DIR" \
    --model_max_length 4096 \
    --num_train_epochs 3 \
    --per_device_train_batch_size 2 \
    --per_device_eval_batch_size 2 \
    --gradient_accumulation_steps 16 \
    --gradient_checkpointing true \
    --learning_rate 1e-5 \
    --bf16 true \
    --logging_dir "$OUTPUT_DIR/logs" \
    --logging_steps 2 \
    --report_to none \
    --save_strategy steps \
    --save_steps 100 \
    --save_total_limit 3 \
    --seed 42 \
    "$@"
