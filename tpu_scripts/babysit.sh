#!/usr/bin/env bash
# Sees a run through: makes the machines, launches, watches, and makes them anew where they are taken away.
# shellcheck source=tpu_scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

help() {
  cat <<'END'
babysit.sh --name NAME --project PROJECT --zone ZONE --type TYPE --wheel FILE.whl --runs /mnt/runs [options of create, wait, setup and launch]
           [--preemptions 20] [--failures 3] [--backoff 30] [--poll 60] [--delete] [--job JOB] [--settings FILE] [--dry-run] CONFIG [-- SETTINGS...]

  machines taken away, or exit code 42 of any worker    the same command again, on new machines where they are gone: it goes on where it saved;
  (told to stop, and saved)                             --preemptions times at most, --backoff seconds apart
  exit codes 2 to 6 (usage, config, data, checkpoint,   stops at once: again would be the same
  does not fit)
  any other exit code, or a refusal by the cloud        again, --failures times at most, after --backoff seconds, twice as long each time
  done                                                  exit code 0
--runs must outlive the machines, so it is needed here.
At the end no job runs, and a request that only waits is taken back. Machines that are ACTIVE stay, and are billed until delete.sh, unless --delete
is given. Ctrl-C ends the watch and not the job: --job JOB goes on watching one that runs. Without a terminal that stays, run this in tmux.
END
}

DEFAULT=([poll]=60 [timeout]=86400 [preemptions]=20 [failures]=3 [backoff]=30)
making="name project zone type slices runtime valid-for startup-script"
installing="wheel constraints extras python"
launching="topology runs verb profile env-file"
parse "$making $installing $launching timeout poll preemptions failures backoff job" "spot reserved internal-ips dirty no-plan delete" \
  "name project zone type wheel runs" -- "$@"
config_of
readonly LONGEST=1800 SILENT=5 UNREAD=20 STRAGGLING=3 GRACE=120
# shellcheck disable=SC2086 # lists of names
share $making $installing $launching timeout poll spot reserved internal-ips dirty no-plan dry-run
unset LMEFF_TPU_JOB LMEFF_TPU_SETTINGS # what they say is in the settings by now

# --- what can be interrupted: a shell hears a signal only between commands, so the long ones run beside it
child='' running=''
beside() { # COMMAND...: its exit code in CODE
  CODE=0
  "$@" </dev/null &
  child=$! running=$1
  wait "$child" || CODE=$?
  child=''
}
step() { beside "$HERE/$1" "${@:2}"; } # SCRIPT ARGUMENTS...
rest() { beside sleep "$1"; }
interrupted() {
  trap '' INT TERM HUP
  if [[ -n $child ]]; then
    [[ $running != sleep && $running != */wait.sh ]] || kill -TERM "$child" 2>/dev/null || true
    wait "$child" || true # a create.sh that is half done would leave a request behind
  fi
  describe
  case $STATE in
    GONE) say "the watch ends; there are no machines" ;;
    ACTIVE) say "the watch ends, ${job:+the job does not: --job $job watches it again; }the machines stay ACTIVE and billed: delete.sh ends them" ;;
    UNREAD) say "the watch ends; what is there cannot be seen, and may be billed: delete.sh ends it" ;;
    *) "$HERE/delete.sh" || say "${SET[name]}: WAS NOT DELETED and may be billed: delete.sh" ;;
  esac
  exit 130
}

# --- what an attempt comes to. KIND is done, again (taken away, or saved), failed or stop.
outcome() { # KIND CODE REASON
  RESULT=$1 RESULT_CODE=$2
  say "attempt $attempt: $3"
}
judge_step() { # SCRIPT: what a script's exit code means
  local code=$CODE
  case $code in
    0) return 0 ;;
    "$SUSPENDED" | "$GONE") outcome again "$code" "$1: the machines were taken away" ;;
    [2-6]) outcome stop "$code" "$1 ended with exit code $code" ;;
    "$LATE") outcome stop "$code" "$1: no chips in time" ;;
    *)
      describe
      case $1,$STATE in
        setup.sh,GONE | setup.sh,SUSPEND* | launch.sh,GONE | launch.sh,SUSPEND*) outcome again "$code" "$1: the machines were taken away" ;;
        *) outcome failed "$code" "$1 ended with exit code $code" ;;
      esac
      ;;
  esac
  return 1
}

# --- an attempt
machines() { # ACTIVE machines with everything installed
  describe
  if [[ $STATE == UNREAD ]]; then
    outcome failed 1 "the cloud does not answer: $(reason)"
    return 1
  fi
  if [[ $STATE != GONE ]] && { ((renew)) || [[ $STATE == FAILED || $STATE == SUSPEND* || $STATE == DELETING ]]; }; then
    step delete.sh
    judge_step delete.sh || return 1
    STATE=GONE
  fi
  renew=0
  if [[ $STATE == GONE ]]; then
    step create.sh
    judge_step create.sh || return 1
  elif [[ $STATE == ACTIVE && -n $job ]]; then
    far all all stop "$job" "$GRACE"
  fi
  step wait.sh
  judge_step wait.sh || return 1
  step setup.sh
  judge_step setup.sh
}

attempt() {
  if [[ -z ${SET[job]-} ]] || ((attempt > 1)); then
    machines || return 0
    job=$began-$attempt
    step launch.sh --job "$job" "$CONFIG" -- "${ARGUMENTS[@]}"
    judge_step launch.sh || return 0
  fi
  if count_workers; then watch; else outcome failed "$LOST" "$WHY"; fi
}

watch() { # until the job has ended or the machines are gone
  local silent=0 unread=0 straggling=0 codes
  while true; do
    rest "${SET[poll]}"
    describe
    case $STATE in
      GONE | SUSPENDING | SUSPENDED | FAILED | DELETING)
        outcome again "$SUSPENDED" "the machines are $STATE${WHY:+: $WHY}"
        return
        ;;
      UNREAD)
        unread=$((unread + 1))
        say "the cloud does not answer ($unread of $UNREAD times): $(reason)"
        ((unread < UNREAD)) && continue
        outcome failed 1 "the cloud does not answer any more"
        return
        ;;
      *) unread=0 ;;
    esac
    far all all status "$job"
    if (($(answers) < WORKERS)); then
      silent=$((silent + 1))
      say "$(answers) of $WORKERS workers answer ($silent of $SILENT times)"
      ((silent < SILENT)) && continue
      renew=1
      outcome again "$LOST" "workers do not answer any more; the machines are made anew"
      return
    fi
    silent=0
    codes=$(sed -n -e 's/^@ [^ ]* ended \([0-9]*\)$/\1/p' -e 's/^@ [^ ]* absent$/137/p' <<<"$OUT" | sort -n)
    if grep -qv '^0*$' <<<"$codes"; then straggling=$((straggling + 1)); fi
    if (($(answers running) == 0 || straggling >= STRAGGLING)); then
      judge "$codes"
      return
    fi
  done
}

judge() { # CODES of the workers that ended, smallest first
  local code
  code=$(grep -x '[2-6]' <<<"$1" | head -n 1) || true
  if [[ -n $code ]]; then
    outcome stop "$code" "lmeff ended with exit code $code: $(last_words)"
  elif grep -qx "$SAVED" <<<"$1"; then # whatever its peers died of: they lost one that had saved with them
    outcome again "$SAVED" "lmeff was told to stop, and saved"
  elif code=$(grep -v '^0*$' <<<"$1" | head -n 1) && [[ -n $code ]]; then
    rest "${SET[poll]}" # a machine that goes takes its process along before the cloud says so
    describe
    if [[ $STATE == ACTIVE || $STATE == UNREAD ]]; then
      outcome failed "$code" "lmeff ended with exit code $code: $(last_words)"
    else
      outcome again "$SUSPENDED" "the machines are $STATE"
    fi
  else
    outcome "done" 0 "done"
  fi
}
last_words() {
  far all all log "$job" 3
  grep -v '^@ ' <<<"$OUT" | grep . | tail -n 3 | tr '\n' ' ' || true
}

finish() { # CODE WHY: nothing is left that was not asked for
  describe
  if [[ $STATE == ACTIVE && -n $job ]] && (($1)); then far all all stop "$job" "$GRACE"; fi
  case $STATE in
    GONE) ;;
    UNREAD) say "${SET[name]}: cannot be looked up, may be ACTIVE and billed: delete.sh" ;;
    ACTIVE)
      [[ -v SET[delete] ]] ||
        say "${SET[name]}: is still ACTIVE and billed: delete.sh --name ${SET[name]} --project ${SET[project]} --zone ${SET[zone]}"
      ;;
  esac
  if [[ $STATE != GONE ]] && { [[ -v SET[delete] ]] || [[ $STATE != ACTIVE && $STATE != UNREAD ]]; }; then
    step delete.sh
    ((CODE == 0)) || say "${SET[name]}: WAS NOT DELETED and may be billed: delete.sh"
  fi
  die "$1" "$2"
}

if dry; then
  for script in create wait setup; do "$HERE/$script.sh"; done
  "$HERE/launch.sh" --job babysit-1 "$CONFIG" -- "${ARGUMENTS[@]}"
  far all all status babysit-1
  [[ -v SET[delete] ]] && "$HERE/delete.sh"
  exit 0
fi

began=$(date -u +%Y%m%d-%H%M%S)
attempt=0 preemptions=0 failures=0 renew=0 wait_for=${SET[backoff]} job=${SET[job]-}
trap interrupted INT TERM HUP
while true; do
  attempt=$((attempt + 1))
  attempt
  case $RESULT in
    done) finish 0 "$CONFIG: done after $attempt attempts ($preemptions times again, $failures failures)" ;;
    stop) finish "$RESULT_CODE" "$CONFIG: stopped, since the same would happen again" ;;
    again)
      preemptions=$((preemptions + 1))
      ((preemptions <= SET[preemptions])) || finish "$RESULT_CODE" "$CONFIG: given up: taken away more than ${SET[preemptions]} times"
      rest "${SET[backoff]}"
      ;;
    failed)
      failures=$((failures + 1))
      ((failures <= SET[failures])) || finish "$RESULT_CODE" "$CONFIG: given up after $failures failures"
      rest "$wait_for"
      wait_for=$((wait_for * 2 > LONGEST ? LONGEST : wait_for * 2))
      ;;
  esac
done
