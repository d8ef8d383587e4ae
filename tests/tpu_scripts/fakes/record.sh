# shellcheck shell=bash
# shellcheck disable=SC2034 # shared with who sources it
# One line of JSON for a call, in $FAKE/log.jsonl.
record() {
  local word line=''
  for word in "$@"; do
    word=${word//\\/\\\\}
    word=${word//\"/\\\"}
    word=${word//$'\n'/\\n}
    line+=", \"${word//$'\t'/\\t}\""
  done
  printf '[%s]\n' "${line:2}" >>"$FAKE/log.jsonl"
}
# The next line of a script; its last line holds for ever.
next_line() { # FILE
  local lines=() at=0
  mapfile -t lines <"$1"
  [[ -e $1.at ]] && at=$(<"$1.at")
  ((at < ${#lines[@]})) || at=$((${#lines[@]} - 1))
  echo $((at + 1)) >"$1.at"
  printf '%s' "${lines[at]}"
}
# How often workers were asked for the status of the job that runs.
polls() { # POLLS
  POLLS=0
  if [[ -s $FAKE/polls ]]; then read -r POLLS <"$FAKE/polls"; fi
}
