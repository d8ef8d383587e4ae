#!/usr/bin/env bash
# Waits until a queued resource is ACTIVE, and says what it is meanwhile.
# shellcheck source=tpu_scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

help() {
  cat <<'END'
wait.sh --name NAME --project PROJECT --zone ZONE [--timeout SECONDS] [--poll SECONDS] [--settings FILE] [--dry-run]

Asks every --poll seconds (30) until the resource is ACTIVE, no longer than --timeout (7200), and tells every change of its state. From ACTIVE on
it is billed, until delete.sh.
Exit code 0 ACTIVE, 20 FAILED, 21 SUSPENDED or about to be, 22 too late, 23 there is none, 1 the cloud did not answer five times in a row.
A request that was waited for too long still waits: delete.sh ends it.
END
}

DEFAULT=([timeout]=7200 [poll]=30)
parse "name project zone timeout poll" "" "name project zone" -- "$@"
no_positional
dry && show "${QUEUED[@]}" describe "${SET[name]}" "${WHERE[@]}" "$STATE_FORMAT" && exit 0

waited=0 before='' unread=0
while true; do
  describe
  [[ $STATE == "$before" || $STATE == UNREAD ]] || say "${SET[name]}: $STATE after $waited s"
  before=$STATE
  [[ $STATE == UNREAD ]] || unread=0
  case $STATE in
    ACTIVE) exit 0 ;;
    CREATING | ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING) ;;
    FAILED) die "$REFUSED" "${SET[name]}: FAILED: ${WHY:-the cloud gives no reason}. It costs nothing; delete.sh takes it away." ;;
    SUSPENDING | SUSPENDED | DELETING) 
      die "$SUSPENDED" "${SET[name]}: $STATE by ${BY:-an unnamed side}${WHY:+: $WHY}. It does not come back; delete.sh, then create.sh, or babysit.sh for both."
      ;;
    GONE) die "$GONE" "${SET[name]}: there is none in ${SET[zone]}; create.sh makes one" ;;
    UNREAD)
      unread=$((unread + 1))
      ((unread < 5)) || die 1 "${SET[name]}: cannot be looked up: $(reason). It may be waiting or billed: delete.sh ends it"
      say "${SET[name]}: the cloud does not answer ($unread of 5 times): $(reason)"
      ;;
    *) say "${SET[name]}: a state that these scripts do not know; waiting goes on" ;;
  esac
  ((waited + SET[poll] <= SET[timeout])) ||
    die "$LATE" "${SET[name]}: still $STATE after $waited s; the request goes on waiting and may become ACTIVE, and billed, later: delete.sh ends it"
  sleep "${SET[poll]}"
  waited=$((waited + SET[poll]))
done
