# Sourced by the other scripts.

# Prints the comment at the top of a script, which says how it is used.
show_usage() {
    sed -n '2,/^set /s/^# \{0,1\}//p' "$1"
}

# Ends a script that was asked for help and passes its arguments on to train_dft.py: end_with_help SCRIPT "$@"
end_with_help() {
    if [[ "${2:-}" == --help || "${2:-}" == -h ]]; then
        show_usage "$1"
        echo "The flags of train_dft.py: python train_dft.py --help, or docs/flags.md"
        exit 0
    fi
}
