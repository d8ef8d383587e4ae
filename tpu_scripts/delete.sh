#!/usr/bin/env bash
# Deletes a queued resource with its TPUs, and says what is still there.
# shellcheck source=tpu_scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

help() {
  cat <<'END'
delete.sh --name NAME --project PROJECT --zone ZONE [--settings FILE] [--dry-run]

Ends the machines and the billing. What is on their own disks is gone: fetch.sh first, or keep runs on storage that outlives them.
What is gone already is no error. Exit code 1 where something is still there afterwards.
END
}

parse "name project zone" "" "name project zone" -- "$@"
no_positional
command=("${QUEUED[@]}" delete "${SET[name]}" "${WHERE[@]}" --force --quiet)
listing=("${QUEUED[@]}" list "${WHERE[@]}" '--format=value(name.basename(),state.state)')
if dry; then
  show "${command[@]}"
  show "${listing[@]}"
  exit 0
fi
ask "${command[@]}"
if ((CODE)) && [[ $ERR != *NOT_FOUND* ]]; then
  die 1 "${SET[name]}: was not deleted, and is billed while it is ACTIVE: $(reason)"
fi
must_describe
[[ $STATE == GONE ]] || die 1 "${SET[name]}: is still there as $STATE; run delete.sh again"
say "${SET[name]}: is gone"
ask "${listing[@]}"
((CODE == 0)) || die 1 "what else is there cannot be listed: $(reason)"
say "still there in ${SET[zone]}: ${OUT:-nothing}"
