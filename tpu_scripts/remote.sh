#!/usr/bin/env bash
# What the scripts run on a worker. Every verb answers by one line "@ HOST WORD ..." and exits 0 where it could answer: the other end counts lines.
#
#   ~/lmeff-tpu/                venv, wheel, constraints, this file
#   ~/lmeff-tpu/trees/COMMIT/   the code that runs
#   ~/lmeff-tpu/jobs/JOB/       log, pid (of the job's session), lmeff.pid, exit_code, profile/
set -euo pipefail
cd "$HOME/lmeff-tpu"
HOST=$(hostname)

answer() { printf '@ %s %s\n' "$HOST" "$*"; }

install() { # WHEEL SHA256 EXTRAS PYTHON UV
  local found
  found=$(sha256sum "$1")
  [[ ${found%% *} == "$2" ]] || { answer "failed the wheel arrived damaged"; return; }
  {
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user "uv==$5" # newer images refuse --user without it
    "$HOME/.local/bin/uv" venv --quiet --allow-existing --python "$4" venv
    "$HOME/.local/bin/uv" pip install --quiet --python venv/bin/python --constraint constraints.txt "./$1[$3]"
  } >install.log 2>&1 || { answer "failed $(tail -n 3 install.log | tr -s '[:space:]' ' ')"; return; }
  answer installed
}

versions() {
  answer "versions $(venv/bin/python -c '
import importlib.metadata, platform
print("python=" + platform.python_version(), *(name + "=" + importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu", "lmeff")))
' 2>&1 | tail -n 1)"
}

unpack() { # ARCHIVE SHA256 TREE
  local found
  found=$(sha256sum "$1")
  [[ ${found%% *} == "$2" ]] || { answer "failed the tree arrived damaged"; return; }
  mkdir -p "trees/$3"
  if tar -xzf "$1" -C "trees/$3"; then answer unpacked; else answer "failed the tree cannot be unpacked"; fi
}

mark() { # FOLDER JOB: one worker leaves a mark that all must see
  if mkdir -p "$1" && : >"$1/.lmeff-tpu-$2"; then answer marked; else answer "failed $1 cannot be written"; fi
}
seen() { # FOLDER JOB
  if [[ -e $1/.lmeff-tpu-$2 ]]; then answer seen; else answer unseen; fi
}
unmark() { # FOLDER JOB
  rm -f "$1/.lmeff-tpu-$2"
  answer unmarked
}

# Begins a job that outlives this connection: a session of its own that ignores SIGHUP. A job that is there already is left as it is, so that
# the launch can be repeated when the connection was lost in the middle. A second job would not get the chips.
start() { # JOB TREE ENV_FILE(or -) WORDS...: of lmeff
  local job=$1 tree=$2 environment=$3 other
  shift 3
  trap '' HUP
  if [[ -s jobs/$job/pid ]]; then
    answer "started before"
    return
  fi
  for other in jobs/*/; do
    other=${other#jobs/}
    if alive "${other%/}"; then
      answer "failed job ${other%/} runs here; stop.sh ends it"
      return
    fi
  done
  mkdir -p "jobs/$job"
  [[ $environment == - ]] || chmod 600 "$environment"
  setsid nohup bash "$PWD/remote.sh" hold "$job" "$tree" "$environment" "$@" >"jobs/$job/log" 2>&1 </dev/null &
  echo $! >"jobs/$job/pid"
  answer started
}

# As start: runs lmeff, passes notices on to it, and keeps its exit code. A SIGTERM that reaches the whole session, as at a shutdown, is lmeff's to
# answer: this shell waits for it.
hold() {
  local job=$1 tree=$2 environment=$3 code=0 line home=$PWD
  shift 3
  if [[ $environment != - ]]; then
    while IFS= read -r line || [[ -n $line ]]; do
      [[ $line =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] && export "${line?}"
    done <"$environment"
  fi
  export LMEFF_JOB=$PWD/jobs/$job
  notice preempted TRUE &
  notice maintenance-event TERMINATE_ON_HOST_MAINTENANCE &
  cd "trees/$tree"
  trap : TERM
  # shellcheck disable=SC2016 # expands in the shell that becomes lmeff
  bash -c 'echo $$ >"$LMEFF_JOB/lmeff.pid" && exec "$@"' lmeff "$home/venv/bin/python" "$home/profiled.py" "$@" || code=$?
  ((code != 143)) || code=42 # SIGTERM before lmeff could hear it: it was told to stop, and there was nothing yet to save
  echo "$code" >"$LMEFF_JOB/exit_code.new"
  mv "$LMEFF_JOB/exit_code.new" "$LMEFF_JOB/exit_code"
  kill -KILL -- "-$$" # whatever is left of the session: the listeners, lmeff's helpers
}

# notice KEY VALUE: waits until Google's metadata server says so of this machine, and tells lmeff to stop, which saves and exits with 42.
# https://cloud.google.com/compute/docs/instances/create-use-spot#detect-preemption and .../metadata/getting-live-migration-notice
notice() {
  local query='' said=''
  until [[ $said == "$2" ]]; do
    if said=$(curl -sf --max-time 900 -H 'Metadata-Flavor: Google' "http://metadata.google.internal/computeMetadata/v1/instance/$1$query"); then
      query='?wait_for_change=true&timeout_sec=600' # the first answer is of now
    else
      query=''
      sleep 60
    fi
  done
  echo "lmeff-tpu: notice: $1 is $said: lmeff is told to stop"
  until [[ -s $LMEFF_JOB/lmeff.pid ]]; do sleep 1; done
  kill -TERM "$(<"$LMEFF_JOB/lmeff.pid")"
}

alive() { # JOB: by its command, since a number may be another's after the machine began anew; what has ended and was not waited for has none
  local pid
  [[ -s jobs/$1/pid && ! -e jobs/$1/exit_code ]] || return 1
  pid=$(<"jobs/$1/pid")
  [[ -r /proc/$pid/cmdline && $(tr '\0' ' ' <"/proc/$pid/cmdline") == *"/remote.sh hold $1 "* ]]
}

status() { # JOB
  if [[ -s jobs/$1/exit_code ]]; then
    answer "ended $(<"jobs/$1/exit_code")"
  elif alive "$1"; then
    answer running
  elif [[ -d jobs/$1 ]]; then
    answer "ended 137" # nothing is left to write an exit code: killed with its session, or the machine began anew
  else
    answer absent
  fi
}

stop() { # JOB GRACE: lmeff politely, then all of the session not
  local waited=0 pid
  if alive "$1"; then
    pid=$(<"jobs/$1/pid")
    kill -TERM "$(cat "jobs/$1/lmeff.pid" 2>/dev/null || echo "-$pid")" 2>/dev/null || true
    while alive "$1" && ((waited < $2)); do
      sleep 1
      waited=$((waited + 1))
    done
    kill -KILL -- "-$pid" 2>/dev/null || true
  fi
  answer stopped
}

stop_all() { # GRACE: whatever these scripts have begun
  local folder
  for folder in jobs/*/; do
    folder=${folder#jobs/}
    stop "${folder%/}" "$1" >/dev/null
  done
  answer stopped
}

log() { # JOB LINES [follow | each]: each line with its worker
  local job=$1
  if [[ $job == latest ]]; then job=$(newest); fi
  [[ -f jobs/$job/log ]] || { answer "failed there is no job '$job'"; return; }
  answer "log of $job"
  case ${3-} in
    follow) exec tail -n "$2" -f "jobs/$job/log" ;;
    each) tail -n "$2" "jobs/$job/log" | sed "s/^/$HOST | /" ;;
    *) tail -n "$2" "jobs/$job/log" ;;
  esac
}

newest() {
  local folder
  # shellcheck disable=SC2012 # names are letters, digits, - and _
  folder=$(ls -1t jobs 2>/dev/null | head -n 1)
  echo "${folder:-none}"
}

profile() { # JOB SECONDS: asks profiled.py, and packs what it wrote
  local job=$1 waited=0
  if [[ $job == latest ]]; then job=$(newest); fi
  alive "$job" || { answer "failed job '$job' does not run"; return; }
  rm -rf "jobs/$job/profile" "jobs/$job/profile.done"
  echo "$2" >"jobs/$job/profile.ask"
  while [[ ! -e jobs/$job/profile.done ]]; do
    if ((waited >= $2 + 120)) || ! alive "$job"; then
      answer "failed no profile after $waited s; see logs.sh"
      return
    fi
    sleep 1
    waited=$((waited + 1))
  done
  if [[ -s jobs/$job/profile.done ]]; then
    answer "failed $(<"jobs/$job/profile.done")"
    return
  fi
  tar -czf profile.tar.gz -C "jobs/$job" profile
  answer "packed $(du -h profile.tar.gz | cut -f1)"
}

pack() { # FOLDER KIND: of a run: "results" or "all"
  [[ -d $1 ]] || { answer "failed there is no run in $1"; return; }
  if [[ $2 == all ]]; then
    tar -czf fetched.tar.gz -C "$1" .
  else
    local wanted=(-name 'report*' -o -name metrics.jsonl -o -name config.json -o -name done.json -o -path './profile/*')
    (cd "$1" && find . -name checkpoints -prune -o -type f \( "${wanted[@]}" \) -print0) |
      tar -czf fetched.tar.gz -C "$1" --null -T -
  fi
  answer "packed $(du -h fetched.tar.gz | cut -f1)"
}

mkdir -p jobs trees
case ${1-} in
  install | versions | unpack | mark | seen | unmark | start | hold | status | stop | stop_all | log | profile | pack) "$@" ;;
  *) answer "failed no such verb" ;;
esac
