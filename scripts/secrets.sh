# Sourced by train.sh and finetune.sh. Command lines are printed, written to logs by launchers, and can be read by
# everyone on the machine.

# Puts its arguments into the array `arguments`, without --hub_token, whose value goes on as HF_TOKEN in the environment.
take_token() {
    arguments=()
    while (( $# > 0 )); do
        case "$1" in
            --hub[_-]token=*) export HF_TOKEN="${1#*=}" ;;
            --hub[_-]token)
                if (( $# < 2 )); then echo "error: --hub_token needs a value" >&2 && return 2; fi
                export HF_TOKEN="$2"
                shift
                ;;
            --*[_-]token | --*[_-]token=* | --*[_-]key | --*[_-]key=* | --*password* | --*secret*)
                echo "error: ${1%%=*}: there is no such flag; keys are given by the environment, such as" \
                    "WANDB_API_KEY, SWANLAB_API_KEY and HF_TOKEN" >&2
                return 2
                ;;
            *) arguments+=("$1") ;;
        esac
        shift
    done
}
