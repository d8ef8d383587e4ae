# shellcheck shell=bash
# What the scripts share. Commands are arrays, shown in a dry run and else run; what goes through ssh is quoted; nothing is evaluated.

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "tpu_scripts: got bash $BASH_VERSION, expected 4.4 or newer; on a Mac: brew install bash" >&2
  exit 2
fi
set -euo pipefail
export LC_ALL=C # ranges such as a-z mean ASCII

SCRIPT=${0##*/}
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
FAR=lmeff-tpu # the folder in a worker's home

# Exit codes beside those of lmeff (2 usage, 3 config, 4 data, 5 checkpoint, 6 does not fit, 42 stopped and saved).
# shellcheck disable=SC2034 # used by the scripts
readonly USAGE=2 FITS_NOT=6 SAVED=42 REFUSED=20 SUSPENDED=21 LATE=22 GONE=23 DIFFERENT=24 LOST=25

say() { printf '%s: %s\n' "$SCRIPT" "$*" >&2; }
die() { # CODE MESSAGE
  say "$2"
  exit "$1"
}

# shellcheck source=tpu_scripts/settings.sh
source "$HERE/settings.sh"

dry() { [[ -v SET[dry-run] ]]; }

# quoted WORD...: LINE, which a shell reads back as these words.
quoted() {
  local word flag
  LINE=''
  for word in "$@"; do
    flag=''
    if [[ $word =~ ^--[a-z-]+= ]]; then
      flag=${BASH_REMATCH[0]}
      word=${word#"$flag"}
    fi
    if [[ $word == *"'"* ]]; then
      printf -v word %q "$word"
    elif [[ ! $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then
      word="'$word'"
    fi
    LINE+=" $flag$word"
  done
  LINE=${LINE# }
}
show() { # COMMAND...: prints it so that it can be pasted
  local LINE
  quoted "$@"
  printf '%s\n' "$LINE"
}
run() { # COMMAND...: shown in a dry run, else run
  if dry; then show "$@"; else "$@"; fi
}

# What passes by itself. It is tried three times.
readonly PASSING='UNAVAILABLE|DEADLINE_EXCEEDED|INTERNAL|ABORTED|[Cc]onnection (reset|aborted|refused)|timed out|Unable to find the server'

# ask COMMAND...: OUT, ERR and CODE of it.
OUT='' ERR='' CODE=0
ask() {
  local left=3 rest=5
  while true; do
    CODE=0
    "$@" >"$TEMPORARY/out" 2>"$TEMPORARY/err" </dev/null || CODE=$?
    OUT=$(<"$TEMPORARY/out")
    ERR=$(<"$TEMPORARY/err")
    ((CODE && --left)) && [[ $ERR =~ $PASSING ]] || return 0
    sleep "$rest"
    rest=$((rest * 2))
  done
}
perform() { # COMMAND...: shown in a dry run, else asked
  if dry; then show "$@"; else ask "$@"; fi
}
reason() { # the other side's own words in one line, the last of them where there are many
  local words
  words=$(tr -s '[:space:]' ' ' <<<"${ERR:-$OUT}")
  words=${words% }
  ((${#words} <= 600)) || words="... ${words: -600}"
  printf '%s' "$words"
}

digest() { # FILE: its SHA-256
  local found
  if command -v sha256sum >/dev/null; then found=$(sha256sum "$1"); else found=$(shasum -a 256 "$1"); fi
  printf '%s' "${found%% *}"
}

# shellcheck source=tpu_scripts/cloud.sh
source "$HERE/cloud.sh"
