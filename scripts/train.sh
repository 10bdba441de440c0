#!/usr/bin/env bash
# Start a training run on all GPUs, or on CPU if there is none.
#
#     bash scripts/train.sh --config my_run.yaml
#     MODEL=/models/Qwen3-8B DATA="a.jsonl b.jsonl" CUDA_VISIBLE_DEVICES=4,5 bash scripts/train.sh --dft_alpha 0.7
#
# Arguments are passed on to train_dft.py and override the variables.
#     LAUNCHER     deepspeed (default), torchrun, accelerate or python
#     NPROC        number of processes on this machine; default: one per visible GPU, or 1 on CPU
#     MODEL        --model_name_or_path
#     DATA         --data_files, separated by spaces
#     OUTPUT_DIR   --output_dir
#     DS_CONFIG    --deepspeed; default ds_config/zero3.json, empty for none; not used with LAUNCHER=python
#     LOG_DIR      directory of the log file; default logs
#     LOG_FILE     the log file; default a new one in LOG_DIR, named by the time
#     STOP_SECONDS how long the ranks may take to save a checkpoint after a signal (TERM, INT, USR1); default 600
#     BACKGROUND   1 detaches the run from the terminal and returns at once
#     MASTER_ADDR, MASTER_PORT, NNODES, NODE_RANK    for several nodes with torchrun or accelerate
#     HOSTFILE     for several nodes with deepspeed: a file with a line such as "worker-0 slots=8" for each; started
#                  over ssh, or without ssh by this script on every node with MASTER_ADDR and NODE_RANK
# docs/multi_node.md says more about several nodes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source scripts/help.sh
end_with_help scripts/train.sh "$@"
source scripts/secrets.sh
take_token "$@" || exit 2
set -- "${arguments[@]}"

LAUNCHER="${LAUNCHER:-deepspeed}"
LOG_DIR="${LOG_DIR:-logs}"
DS_CONFIG="${DS_CONFIG-ds_config/zero3.json}"
LOG_FILE="${LOG_FILE:-$LOG_DIR/train_$(date +%F_%H%M%S).log}"
STOP_SECONDS="${STOP_SECONDS:-600}"

fail() {
    echo "error: $*" >&2
    exit 2
}
[[ "$LAUNCHER" =~ ^(deepspeed|torchrun|accelerate|python)$ ]] ||
    fail "LAUNCHER=$LAUNCHER; it must be deepspeed, torchrun, accelerate or python"
[[ "$LAUNCHER" != deepspeed || "${NNODES:-1}" == 1 || -n "${HOSTFILE:-}" ]] ||
    fail "NNODES=$NNODES with LAUNCHER=deepspeed: name the nodes in a HOSTFILE, or use LAUNCHER=torchrun on every node"
has_nodes=0
if [[ "${NNODES:-1}" != 1 || ( "$LAUNCHER" == deepspeed && -n "${HOSTFILE:-}" ) ]]; then has_nodes=1; fi
[[ "$has_nodes" == 0 || -z "${NODE_RANK:-}" || -n "${MASTER_ADDR:-}" ]] ||
    fail "NODE_RANK=$NODE_RANK of several nodes without MASTER_ADDR: give the name or address of node 0"

mode=700  # of a new directory: the log shows rows of the data
if [[ " $* " =~ \ --shared[_-]files[=\ ]([Tt]rue|1|yes)\  ]]; then mode="$(printf '%o' $(( 0777 & ~$(umask) )))"; fi
trap '' PIPE  # nobody may read the output any more: then tee still writes the log file
lose_log() {  # why
    echo "warning: $LOG_FILE can't be written (${1##*: }): the run goes on without it" >&2 || true
    LOG_FILE=/dev/null
}
why="$({ mkdir -p -m "$mode" "$(dirname "$LOG_FILE")" && : >> "$LOG_FILE"; } 2>&1)" || lose_log "$why"
if [[ "${BACKGROUND:-0}" == 1 ]]; then
    BACKGROUND=0 LOG_FILE="$LOG_FILE" nohup bash scripts/train.sh "$@" > /dev/null 2>&1 &
    echo "Training started in background, process $!. Follow it with: tail -f $LOG_FILE"
    exit 0
fi

if [[ -f .venv/bin/activate && -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]]; then
    source .venv/bin/activate
fi
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$PWD/.torch_extensions}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}" PYTHONUNBUFFERED=1

# The GPUs to use: CUDA_VISIBLE_DEVICES if it is set, else all that torch can use.
gpus="${CUDA_VISIBLE_DEVICES-$(python -c 'import torch; print(*range(torch.cuda.device_count()), sep=",")')}"
if [[ "$gpus" =~ ^(-1|NoDevFiles)$ ]]; then gpus=""; fi
[[ "$LAUNCHER" != deepspeed || "$gpus" =~ ^[0-9,]*$ ]] ||
    fail "CUDA_VISIBLE_DEVICES=$gpus: deepspeed takes numbers only; use LAUNCHER=torchrun for GPUs named by UUID"
if [[ -n "$gpus" ]]; then
    NPROC="${NPROC:-$(tr ',' '\n' <<< "$gpus" | wc -l)}"
    gpus="$(cut -d, -f "1-$NPROC" <<< "$gpus")"
else
    NPROC="${NPROC:-1}"
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( $(nproc) > NPROC ? $(nproc) / NPROC : 1 ))}"
fi
free_port() {
    python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}
MASTER_PORT="${MASTER_PORT:-$(if [[ "${NNODES:-1}" == 1 && -z "${HOSTFILE:-}" ]]; then free_port; else echo 29500; fi)}"
NODES=(--nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}" --master-addr "${MASTER_ADDR:-127.0.0.1}")

case "$LAUNCHER" in
    deepspeed)
        command=(deepspeed --master_port "$MASTER_PORT")
        if [[ -n "${HOSTFILE:-}" ]]; then
            command+=(--hostfile "$HOSTFILE")
            if [[ -n "${NODE_RANK:-}" ]]; then
                command+=(--no_ssh --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR")
            fi
        elif [[ -n "$gpus" ]]; then
            # deepspeed overwrites CUDA_VISIBLE_DEVICES, so it must be given the GPUs this way
            command+=(--include "localhost:$gpus")
            unset CUDA_VISIBLE_DEVICES
        else
            command+=(--num_gpus "$NPROC")
        fi
        ;;
    torchrun)
        command=(torchrun "${NODES[@]}" --master-port "$MASTER_PORT" --nproc-per-node "$NPROC")
        ;;
    accelerate)
        command=(accelerate launch --num_machines "${NNODES:-1}" --machine_rank "${NODE_RANK:-0}"
            --main_process_ip "${MASTER_ADDR:-127.0.0.1}" --main_process_port "$MASTER_PORT"
            --num_processes "$(( NPROC * ${NNODES:-1} ))" --mixed_precision no --dynamo_backend no)
        # despite its name, --multi_gpu starts several processes on CPU too; accelerate's --cpu starts only one
        if (( NPROC * ${NNODES:-1} > 1 )); then command+=(--multi_gpu); fi
        ;;
    python)
        command=(python)
        DS_CONFIG=""
        ;;
esac
if [[ -n "$gpus" && "$LAUNCHER" != deepspeed ]]; then export CUDA_VISIBLE_DEVICES="$gpus"; fi

command+=(train_dft.py)
if [[ -n "${MODEL:-}" ]]; then command+=(--model_name_or_path "$MODEL"); fi
# shellcheck disable=SC2206  # the words of DATA are the files
if [[ -n "${DATA:-}" ]]; then command+=(--data_files $DATA); fi
if [[ -n "${OUTPUT_DIR:-}" ]]; then command+=(--output_dir "$OUTPUT_DIR"); fi
if [[ -n "$DS_CONFIG" ]]; then command+=(--deepspeed "$DS_CONFIG"); fi
command+=("$@")

start="$(printf 'Command:'; printf ' %q' "${command[@]}"; printf '\nLog file: %s' "$LOG_FILE")"
echo "$start" || true
why="$({ echo "$start" > "$LOG_FILE"; } 2>&1)" || lose_log "$why"
write_log() {  # what a program says; where the disk is full, tee says so once and goes on
    tee -a "$LOG_FILE" || true
}

# What DeepSpeed would build in the middle of the run, with one process building and the others waiting
if [[ -n "$DS_CONFIG" ]]; then
    for (( i = 1; i < $#; i++ )); do
        if [[ "${!i}" == --deepspeed ]]; then next=$(( i + 1 )) && DS_CONFIG="${!next}"; fi
    done
    python -m dft.operators "$DS_CONFIG" 2>&1 | write_log ||
        fail "an operator of DeepSpeed could not be built: see the compiler's messages above"
fi

# The launchers would try for 15 minutes, and end with traces from C++.
if [[ "$has_nodes" == 1 && "${NODE_RANK:-0}" != 0 ]]; then
    python -m dft.parallel.master "$MASTER_ADDR" "$MASTER_PORT" 2>&1 | write_log || exit 2
fi

# The run gets its own process group, so that all ranks can be ended when this script is. In DFT_RUN_DIR each rank that can
# save a checkpoint first writes its process number, and the first rank its exit status, because launchers end with others.
DFT_RUN_DIR="$(mktemp -d)"
export DFT_RUN_DIR
deadline=$(( 1 << 60 ))
pass_on() {  # a signal: to the ranks alone, if they can save first, because a launcher would kill them after 30 s
    local ranks signal="$1"
    ranks="$(cat "$DFT_RUN_DIR"/rank-* 2> /dev/null || true)"
    if [[ -z "$ranks" && "$signal" == USR1 ]]; then signal=TERM; fi
    # shellcheck disable=SC2086  # several numbers
    kill -s "$signal" ${ranks:--- "-$run"} 2> /dev/null || true
    if (( deadline > SECONDS + STOP_SECONDS )); then deadline=$(( SECONDS + STOP_SECONDS )); fi
}
set -m
# tee has to outlive the signals that the terminal or SLURM sends to all processes of this script
# SLURM sends USR1 to the launcher too, which would end, and the ranks' store with it; the ranks do listen to it
(trap '' USR1; exec "${command[@]}") > >(trap '' TERM INT HUP USR1; exec tee -a "$LOG_FILE") 2>&1 &
run=$!
set +m
trap 'pass_on TERM' TERM HUP
trap 'pass_on INT' INT
trap 'pass_on USR1' USR1
wait "$run" || true
while kill -0 -- "-$run" 2> /dev/null; do  # a signal has come, or ranks end after the launcher
    if (( SECONDS > deadline )); then kill -s KILL -- "-$run" 2> /dev/null || true; fi
    sleep 0.5
done
status=0
wait "$run" || status=$?
said="$(cat "$DFT_RUN_DIR/status" 2> /dev/null || true)"
rm -rf "$DFT_RUN_DIR"
if [[ -n "$said" && "$said" != 0 ]]; then
    status="$said"
elif [[ "$LAUNCHER" == deepspeed && "$status" == 0 && -z "$said" && -z "${HOSTFILE:-}" ]]; then
    echo "error: the launcher was killed" >&2  # deepspeed returns 0 even if its child is killed
    status=1
fi
exit "$status"
