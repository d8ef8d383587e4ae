#!/usr/bin/env bash
# Shows what a job wrote.
# shellcheck source=tpu_scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

help() {
  cat <<'END'
logs.sh --name NAME --project PROJECT --zone ZONE [--job JOB] [--lines 50] [--node 0] [--worker 0] [--all | --follow] [--internal-ips]
        [--settings FILE] [--dry-run]

The last --lines of the newest job, or of --job, of one worker (the first, where lmeff speaks), or of --all, each line with its worker. --follow
goes on until Ctrl-C, which ends the view and not the job.
END
}

DEFAULT=([job]=latest [lines]=50 [node]=0 [worker]=0)
parse "name project zone job lines node worker" "all follow internal-ips" "name project zone" -- "$@"
no_positional
[[ -v SET[all] && -v SET[follow] ]] && die "$USAGE" "--all and --follow: got both, expected one of the two"
words=(log "${SET[job]}" "${SET[lines]}")
if [[ -v SET[follow] ]]; then
  reach "${SET[node]}" "${SET[worker]}" "${words[@]}" follow
  dry && show "${REACH[@]}" && exit 0
  rm -rf "$TEMPORARY" # exec leaves no trap behind
  exec "${REACH[@]}"
elif [[ -v SET[all] ]]; then
  far all all "${words[@]}" each
else
  far "${SET[node]}" "${SET[worker]}" "${words[@]}"
fi
dry && exit 0
(($(answers log))) || die "$LOST" "${SET[name]}: no log was read: $(grep '^@ ' <<<"$OUT" | head -n 1) $(reason)"
if [[ -v SET[all] ]]; then sort -s -k 1,1 <<<"$(grep -v '^@ ' <<<"$OUT")"; else printf '%s\n' "$OUT"; fi
