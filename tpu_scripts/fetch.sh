#!/usr/bin/env bash
# Brings a run here: reports, metrics and configs, and its checkpoints where they are asked for.
# shellcheck source=tpu_scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

help() {
  cat <<'END'
fetch.sh --name NAME --project PROJECT --zone ZONE --runs /mnt/runs --run RUN [--out fetched] [--checkpoints] [--node 0] [--worker 0]
         [--internal-ips] [--settings FILE] [--dry-run]

Brings RUNS/RUN from one worker to OUT/RUN: report*, metrics.jsonl, config.json, profile/. --checkpoints brings all of the run, which may be very large:
a bucket is the better way for that. RUNS is what launch.sh was told by --runs.
END
}

DEFAULT=([node]=0 [worker]=0 [out]=fetched)
parse "name project zone runs run out node worker" "checkpoints internal-ips" "name project zone runs run" -- "$@"
no_positional
kind=results
[[ -v SET[checkpoints] ]] && kind=all
far "${SET[node]}" "${SET[worker]}" pack "${SET[runs]}/${SET[run]}" "$kind"
dry || (($(answers packed) == 1)) || die "$LOST" "${SET[name]}: nothing to fetch: $(grep '^@ ' <<<"$OUT" | head -n 1) $(reason)"
bring fetched.tar.gz "${SET[node]}" "${SET[worker]}" "${SET[out]}/${SET[run]}"
