#!/usr/bin/env bash
# Shows what a job wrote.
# shellcheck source=tpu_scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

help() {
  cat <<'END'
logs.sh --name NAME --project PROJECT --zone ZONE [--job JOB] [--lines 50] [--node 0] [--worker 0] [--all | --follow] [--internal-ips]
        [--settings FILE] [--dry-run]

The last --lines of the newest job, or of --job, of one worker (the first, where lmeff speaks), or of --all. --follow goes on until Ctrl-C, which
ends the view and not the job.
END
}

DEFAULT=([job]=latest [lines]=50 [node]=0 [worker]=0)
parse "name project zone job lines node worker" "all follow internal-ips" "name project zone" -- "$@"
no_positional
[[ -v SET[all] && -v SET[follow] ]] && die $USAGE "--all and --follow: got both, expected one of the two"
node=${SET[node]} worker=${SET[worker]} words=(log "${SET[job]}" "${SET[lines]}")
[[ -v SET[all] ]] && node=all worker=all
if [[ -v SET[follow] ]] && ! dry; then
  printf -v line '%q ' bash "$FAR/remote.sh" "${words[@]}" follow
  command=("${QUEUED[@]}" ssh "${SET[name]}" "${WHERE[@]}" --node="$node" --worker="$worker" --quiet --command="${line% }")
  [[ -v SET[internal-ips] ]] && command+=(--internal-ip)
  rm -rf "$TEMPORARY" # exec leaves no trap behind
  exec "${command[@]}"
fi
[[ -v SET[follow] ]] && words+=(follow)
far "$node" "$worker" "${words[@]}"
dry && exit 0
(($(answers log))) || die $LOST "${SET[name]}: no log was read: $(grep '^@ ' <<<"$OUT" | head -n 1) $(reason)"
printf '%s\n' "$OUT"
