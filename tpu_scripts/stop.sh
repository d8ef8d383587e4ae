#!/usr/bin/env bash
# Stops what launch.sh started; the machines stay.
# shellcheck source=tpu_scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

help() {
  cat <<'END'
stop.sh --name NAME --project PROJECT --zone ZONE [--slices N] [--grace 120] [--internal-ips] [--settings FILE] [--dry-run]

Tells lmeff to stop on every worker (SIGTERM: it saves, and exits with 42),
and kills what still runs --grace seconds later. The machines stay, and are billed: delete.sh ends them.
END
}

DEFAULT=([grace]=120)
parse "name project zone slices grace" "internal-ips" "name project zone" -- "$@"
no_positional
count_workers || die "$LOST" "$WHY"
far all all stop_all "${SET[grace]}"
dry && exit 0
(($(answers stopped) == WORKERS)) || die "$LOST" "${SET[name]}: stopped on $(answers stopped) of $WORKERS workers: $(reason)"
say "${SET[name]}: nothing runs on its $WORKERS workers, which are billed until delete.sh"
