#!/usr/bin/env bash
# Sees a run through: makes the machines, launches, watches, and makes them anew where they are taken away.
# shellcheck source=tpu_scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

help() {
  cat <<'END'
babysit.sh --name NAME --project PROJECT --zone ZONE --type TYPE --wheel FILE.whl --runs /mnt/runs [options of create, wait, setup and launch]
           [--preemptions 20] [--failures 3] [--backoff 30] [--poll 60] [--delete] [--job JOB] CONFIG [-- SETTINGS...]

  taken away, or exit code 42 (told to stop, and saved)   machines again where they are gone, and the same command: it goes on where it saved;
                                                          --preemptions times at most
  exit codes 2 to 6 (usage, config, data, checkpoint, does not fit)   stops at once: again would be the same
  any other exit code, or a refusal by the cloud          again, --failures times at most, after --backoff seconds, twice as long each time
  done                                                    exit code 0
--runs must outlive the machines, so it is needed here. The machines stay at the end, and are billed, unless --delete is given; a request that
only waits is always taken back. Ctrl-C ends the watch and not the job: --job JOB goes on watching one that runs.
END
}

DEFAULT=([poll]=60 [timeout]=86400 [preemptions]=20 [failures]=3 [backoff]=30)
making="name project zone type slices runtime valid-for"
installing="wheel constraints extras python"
launching="topology runs verb env-file"
parse "$making $installing $launching timeout poll preemptions failures backoff job" "spot reserved internal-ips dirty no-plan delete" \
  "name project zone type wheel runs" -- "$@"
config_of
readonly LONGEST=1800 SILENT=5 UNREAD=20 STRAGGLING=3 GRACE=120
# shellcheck disable=SC2086 # lists of names
share $making $installing $launching timeout poll spot reserved internal-ips dirty no-plan dry-run
began=$(date -u +%Y%m%d-%H%M%S)
adopted=${SET[job]-}

step() { # SCRIPT ARGUMENTS...: its exit code in CODE
  CODE=0
  "$HERE/$1" "${@:2}" || CODE=$?
}

if dry; then
  for script in create wait setup; do step "$script.sh"; done
  step launch.sh --job babysit-1 "$CONFIG" -- "${ARGUMENTS[@]}"
  count_workers
  far all all status babysit-1
  [[ -v SET[delete] ]] && step delete.sh
  exit 0
fi

# outcome KIND CODE REASON: what an attempt came to. KIND is done, again (taken away or saved), failed or stop.
outcome() {
  RESULT=$1 RESULT_CODE=$2
  say "attempt $attempt: $3"
}
judge_step() { # SCRIPT: what a script's exit code means
  case $CODE in
    0) return 0 ;;
    "$SUSPENDED" | "$GONE") outcome again "$CODE" "$1: the machines were taken away" ;;
    [2-6]) outcome stop "$CODE" "$1 ended with exit code $CODE" ;;
    "$LATE") outcome stop "$CODE" "$1: no chips in time" ;;
    *) outcome failed "$CODE" "$1 ended with exit code $CODE" ;;
  esac
  return 1
}

machines() { # ACTIVE machines with everything installed
  describe
  if ((renew)) || [[ $STATE == FAILED || $STATE == SUSPENDED || $STATE == SUSPENDING || $STATE == DELETING ]]; then
    step delete.sh
    judge_step delete.sh || return 1
    STATE=GONE
  fi
  renew=0
  if [[ $STATE == GONE ]]; then
    step create.sh
    judge_step create.sh || return 1
  fi
  step wait.sh
  judge_step wait.sh || return 1
  step setup.sh
  judge_step setup.sh
}

attempt() {
  if [[ -n $adopted ]]; then
    job=$adopted
    adopted=''
    count_workers
  else
    if [[ -n $job ]]; then
      describe
      [[ $STATE != ACTIVE ]] || far all all stop "$job" "$GRACE"
    fi
    machines || return 0
    job=$began-$attempt
    step launch.sh --job "$job" "$CONFIG" -- "${ARGUMENTS[@]}"
    judge_step launch.sh || return 0
    count_workers
  fi
  watch
}

watch() {
  local silent=0 unread=0 straggling=0 codes
  while true; do
    sleep "${SET[poll]}"
    describe calm
    case $STATE in
      ACTIVE) unread=0 ;;
      UNREAD)
        unread=$((unread + 1))
        say "the cloud does not answer ($unread of $UNREAD times): $(reason)"
        ((unread < UNREAD)) && continue
        outcome failed 1 "the cloud does not answer any more"
        return
        ;;
      GONE | SUSPENDING | SUSPENDED | FAILED | DELETING)
        outcome again $SUSPENDED "the machines are $STATE${WHY:+: $WHY}"
        return
        ;;
      *) say "$STATE: a state that is not expected of machines that run" ;;
    esac
    far all all status "$job"
    if (($(answers) < WORKERS)); then
      silent=$((silent + 1))
      say "$(answers) of $WORKERS workers answer ($silent of $SILENT times)"
      if ((silent >= SILENT)); then
        renew=1
        outcome again $LOST "workers do not answer any more; the machines are made anew"
        return
      fi
      continue
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

judge() { # CODES of the workers that ended
  local code
  for code in 2 3 4 5 6; do
    if grep -qx "$code" <<<"$1"; then
      outcome stop "$code" "lmeff ended with exit code $code: $(last_words)"
      return
    fi
  done
  if ! grep -qv '^0*$' <<<"$1"; then
    outcome "done" 0 "done"
  elif grep -qx $SAVED <<<"$1"; then
    outcome again $SAVED "lmeff was told to stop, and saved"
  else
    code=$(grep -v '^0*$' <<<"$1" | head -n 1)
    sleep "${SET[poll]}" # a machine that goes takes its process along before the cloud says so
    describe
    if [[ $STATE == ACTIVE ]]; then
      outcome failed "$code" "lmeff ended with exit code $code: $(last_words)"
    else
      outcome again $SUSPENDED "the machines are $STATE"
    fi
  fi
}
last_words() {
  far all all log "$job" 3
  grep -v '^@ ' <<<"$OUT" | grep . | tail -n 3 | tr '\n' ' ' || true
}

finish() { # CODE WHY: nothing is left that was not asked for
  describe
  if [[ $STATE == ACTIVE && -n $job ]] && (($1)); then far all all stop "$job" "$GRACE"; fi
  if [[ $STATE != GONE ]] && { [[ $STATE != ACTIVE ]] || [[ -v SET[delete] ]]; }; then
    step delete.sh
    ((CODE == 0)) || say "${SET[name]}: WAS NOT DELETED and may be billed: delete.sh"
  elif [[ $STATE == ACTIVE ]]; then
    say "${SET[name]}: is still ACTIVE and billed: delete.sh --name ${SET[name]} --project ${SET[project]} --zone ${SET[zone]}"
  fi
  die "$1" "$2"
}

trap 'say "the watch ends, the job does not: --job ${job:-JOB} watches it again, delete.sh ends it and the billing"; exit 130' INT TERM
attempt=0 preemptions=0 failures=0 renew=0 rest=${SET[backoff]} job=''
while true; do
  attempt=$((attempt + 1))
  attempt
  case $RESULT in
    done) finish 0 "$CONFIG: done after $attempt attempts ($preemptions times again, $failures failures)" ;;
    stop) finish "$RESULT_CODE" "$CONFIG: stopped, since the same would happen again" ;;
    again)
      preemptions=$((preemptions + 1))
      ((preemptions <= SET[preemptions])) || finish "$RESULT_CODE" "$CONFIG: given up: taken away more than ${SET[preemptions]} times"
      sleep "${SET[backoff]}"
      ;;
    failed)
      failures=$((failures + 1))
      ((failures <= SET[failures])) || finish "$RESULT_CODE" "$CONFIG: given up after $failures failures"
      sleep "$rest"
      rest=$((rest * 2 > LONGEST ? LONGEST : rest * 2))
      ;;
  esac
done
