#!/usr/bin/env bash
# Stops what launch.sh started; the machines stay.
# shellcheck source=tpu_scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

help() {
  cat <<'END'
stop.sh --name NAME --project PROJECT --zone ZONE [--slices N] [--seconds 120] [--internal-ips] [--settings FILE] [--dry-run]

Sends SIGTERM to every job on every worker and SIGKILL --seconds later. The machines stay, and are billed: delete.sh ends them.
END
}

DEFAULT=([seconds]=120)
parse "name project zone slices seconds" "internal-ips" "name project zone" -- "$@"
no_positional
count_workers
far all all stop_all "${SET[seconds]}"
dry && exit 0
(($(answers stopped) == WORKERS)) || die $LOST "${SET[name]}: stopped on $(answers stopped) of $WORKERS workers: $(reason)"
say "${SET[name]}: nothing runs on its $WORKERS workers, which are billed until delete.sh"
