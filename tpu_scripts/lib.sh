# shellcheck shell=bash
# What the scripts share: settings that are checked before they reach a command, commands that are shown or run, and what the cloud answers.
#
# A value comes from a flag, else from the environment (LMEFF_TPU_ZONE for --zone), else from a file of lines such as zone=us-east5-b, else from
# a default. It must match its pattern whole. Commands are arrays; what goes through ssh is quoted by printf %q; nothing is evaluated.

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

readonly WORD='[A-Za-z0-9_][A-Za-z0-9_.+-]*'
declare -A PATTERN=(
  [name]='[a-z]([a-z0-9-]{0,38}[a-z0-9])?'
  [project]='([a-z][a-z0-9.-]{1,60}:)?[a-z][a-z0-9-]{4,28}[a-z0-9]'
  [zone]='[a-z]{2,20}-[a-z]{2,20}[0-9]{1,2}-[a-z][a-z0-9]{0,4}'
  [type]='(v2|v3|v4|v5litepod|v5p|v6e)-[1-9][0-9]{0,4}'
  [slices]='[1-9][0-9]{0,2}'
  [runtime]='[a-z0-9][a-z0-9.-]{1,60}'
  [topology]='(v4|v5e|v5p|v6e|tpu7x):[1-9][0-9]{0,2}(x[1-9][0-9]{0,2}){1,2}(:[1-9][0-9]{0,2})?'
  [timeout]='[1-9][0-9]{0,6}'
  [poll]='[1-9][0-9]{0,3}'
  [valid-for]='[1-9][0-9]{0,3}[smhd]'
  [wheel]="/?($WORD/)*${WORD}[.]whl"
  [constraints]="/?($WORD/)*$WORD"
  [env-file]="/?([.]?$WORD/)*[.]?$WORD"
  [settings]="/?([.]?$WORD/)*[.]?$WORD"
  [out]="/?($WORD/)*$WORD"
  [extras]='[a-z][a-z0-9]*(,[a-z][a-z0-9]*)*'
  [python]='3[.]1[1-9]'
  [runs]="/($WORD/)*$WORD"
  [run]="$WORD"
  [job]='[A-Za-z0-9][A-Za-z0-9_-]{0,60}'
  [verb]='run|train'
  [node]='[0-9]{1,3}'
  [worker]='[0-9]{1,4}'
  [lines]='[1-9][0-9]{0,4}'
  [seconds]='[1-9][0-9]{0,2}'
  [preemptions]='[0-9]{1,3}'
  [failures]='[0-9]{1,2}'
  [backoff]='[1-9][0-9]{0,3}'
  [image]='[a-z0-9][a-z0-9.-]{0,100}(:[0-9]{1,5})?(/[a-z0-9][a-z0-9._-]{0,100}){1,6}((:[A-Za-z0-9_][A-Za-z0-9_.-]{0,100})|(@sha256:[0-9a-f]{64}))'
  [cluster]='[a-z]([a-z0-9-]{0,38}[a-z0-9])?'
  [claim]='[a-z]([a-z0-9-]{0,60}[a-z0-9])?'
  [secret]='[a-z]([a-z0-9-]{0,60}[a-z0-9])?'
  [chips-per-host]='[148]'
  [restarts]='[0-9]{1,3}'
)
declare -A EXPECTED=(
  [name]='1 to 40 lower-case letters, digits and dashes, a letter first, such as lmeff-1'
  [project]='the id of a project, such as my-project'
  [zone]='a zone, such as us-east5-b'
  [type]='an accelerator type, such as v5litepod-16, v5p-128 or v6e-256; TPU7x is had through GKE alone: gke.sh'
  [slices]='a number of slices from 1 to 999'
  [runtime]='a runtime version, such as v2-alpha-tpuv6e'
  [topology]='FAMILY:SHAPE[:SLICES], such as v5e:4x4 or v5p:4x4x4:2'
  [valid-for]='a duration, such as 6h'
  [wheel]='a .whl file, its path of letters, digits and ._+-'
  [runs]='an absolute path of letters, digits and ._+-, such as /mnt/runs'
  [run]='the name of a run, such as quickstart'
  [job]='letters, digits, dashes and underscores'
  [verb]='run or train'
  [python]='3.11, 3.12 or 3.13'
  [image]='a container image with its registry and a tag or digest, such as us-docker.pkg.dev/my-project/lmeff/train:0.1'
  [chips-per-host]='1, 4 or 8'
)
readonly CONFIG_PATTERN="($WORD/)*${WORD}[.]py"
readonly ARGUMENT_PATTERN='[A-Za-z0-9._=,:/@%+^-]+' # of lmeff: settings such as --optim.learning-rate 1e-3
readonly PASSING='UNAVAILABLE|DEADLINE_EXCEEDED|INTERNAL|ABORTED|[Cc]onnection (reset|aborted|refused)|timed out|Unable to find the server'

declare -A SET=()   # the settings by name
POSITIONAL=()       # words that belong to no flag
ARGUMENTS=()        # words behind --
declare -A DEFAULT=() # a script's own defaults

say() { printf '%s: %s\n' "$SCRIPT" "$*" >&2; }
die() { # CODE MESSAGE
  say "$2"
  exit "$1"
}

matches() { [[ $1 =~ ^($2)$ && $1 != *$'\n'* ]]; }

# --- settings ---------------------------------------------------------------------------------------------------------------------------

# parse OPTIONS SWITCHES REQUIRED -- WORDS...: fills SET, POSITIONAL and ARGUMENTS. The first three are lists of names with blanks between them.
parse() {
  local options=" settings $1 " switches=" dry-run $2 " required=$3 word key
  local -A flags=() file=()
  shift 4
  while (($#)); do
    word=$1
    shift
    case $word in
      --help | -h) help && exit 0 ;;
      --) ARGUMENTS=("$@") && break ;;
      --*=*)
        key=${word%%=*}
        _known "${key#--}" "$options" "$key"
        flags[${key#--}]=${word#*=}
        ;;
      --*)
        key=${word#--}
        if [[ $key =~ ^[a-z-]+$ && $switches == *" $key "* ]]; then
          flags[$key]=1
        else
          _known "$key" "$options" "$word"
          (($#)) || die $USAGE "$word: got nothing behind it, expected a value"
          flags[$key]=$1
          shift
        fi
        ;;
      -*) die $USAGE "$(printf %q "$word"): is no option here; see $SCRIPT --help" ;;
      *) POSITIONAL+=("$word") ;;
    esac
  done
  _settings_file "${flags[settings]-${LMEFF_TPU_SETTINGS-}}"
  local name variable
  for name in $options $switches; do
    variable=${name^^}
    variable=LMEFF_TPU_${variable//-/_}
    if [[ -v flags[$name] ]]; then
      _keep "$name" "--$name" "${flags[$name]}" "$switches"
    elif [[ -n ${!variable-} ]]; then
      _keep "$name" "$variable" "${!variable}" "$switches"
    elif [[ -v file[$name] ]]; then
      _keep "$name" "${flags[settings]-${LMEFF_TPU_SETTINGS-}}: $name" "${file[$name]}" "$switches"
    elif [[ -v DEFAULT[$name] ]]; then
      SET[$name]=${DEFAULT[$name]}
    fi
  done
  for name in $required; do
    [[ -v SET[$name] ]] || die $USAGE "--$name: is missing, expected ${EXPECTED[$name]-a value}; a flag, a line of --settings or $(variable_of "$name") says it"
  done
  for word in "${ARGUMENTS[@]}"; do
    matches "$word" "$ARGUMENT_PATTERN" || die $USAGE "$(printf %q "$word") behind --: expected letters, digits and ._=,:/@%+^- only"
  done
  WHERE=(--project="${SET[project]-}" --zone="${SET[zone]-}")
  TEMPORARY=$(mktemp -d "${TMPDIR:-/tmp}/lmeff-tpu.XXXXXX")
  trap 'rm -rf "$TEMPORARY"' EXIT
}

variable_of() { # NAME: of the environment
  local upper=${1^^}
  printf 'LMEFF_TPU_%s' "${upper//-/_}"
}

_known() { # NAME OPTIONS WORD
  [[ $1 =~ ^[a-z-]+$ && $2 == *" $1 "* ]] || die $USAGE "$(printf %q "$3"): is no option here; see $SCRIPT --help"
}

_keep() { # NAME WHERE VALUE SWITCHES
  if [[ $4 == *" $1 "* ]]; then
    [[ $3 =~ ^[01]$ ]] || die $USAGE "$2: got $(printf %q "$3"), expected 1 or 0"
    [[ $3 == 0 ]] || SET[$1]=1
    return 0
  fi
  matches "$3" "${PATTERN[$1]}" || die $USAGE "$2: got $(printf %q "$3"), expected ${EXPECTED[$1]-a value of the form ${PATTERN[$1]}}"
  SET[$1]=$3
}

# Fills the caller's `file`. The lines are read, not run.
_settings_file() {
  local line number=0 key
  [[ -n $1 ]] || return 0
  matches "$1" "${PATTERN[settings]}" || die $USAGE "--settings: got $(printf %q "$1"), expected a path of letters, digits and ._+-"
  [[ -r $1 ]] || die $USAGE "--settings: got $1, expected a file that can be read"
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    [[ $line =~ ^[[:space:]]*(#.*)?$ ]] && continue
    key=${line%%=*}
    [[ $line == *=* && $key =~ ^[a-z-]+$ && (-v PATTERN[$key] || $key =~ ^(spot|reserved|internal-ips)$) ]] ||
      die $USAGE "$1: line $number: got $(printf %q "$line"), expected SETTING=VALUE, such as zone=us-east5-b"
    file[$key]=${line#*=}
  done <"$1"
}

# share NAME...: settings for a script that this one runs, by its environment.
share() {
  local name
  for name in "$@"; do
    [[ -v SET[$name] ]] && export "$(variable_of "$name")=${SET[$name]}"
  done
  return 0
}

config_of() { # checks the one positional word, a config: CONFIG
  ((${#POSITIONAL[@]} == 1)) || die $USAGE "got ${#POSITIONAL[@]} configs, expected one, such as configs/quickstart.py"
  CONFIG=${POSITIONAL[0]}
  matches "$CONFIG" "$CONFIG_PATTERN" || die $USAGE "config: got $(printf %q "$CONFIG"), expected a .py file by its path from the top of the repository, of letters, digits and ._+-"
}

no_positional() { ((${#POSITIONAL[@]} == 0)) || die $USAGE "$(printf %q "${POSITIONAL[0]}"): is no option here; see $SCRIPT --help"; }

# --- commands ---------------------------------------------------------------------------------------------------------------------------

dry() { [[ -v SET[dry-run] ]]; }
show() { # COMMAND...: prints it so that it can be pasted
  local text
  printf -v text '%q ' "$@"
  printf '%s\n' "${text% }"
}
run() { # COMMAND...: shown in a dry run, else run
  if dry; then show "$@"; else "$@"; fi
}
pause() { # SECONDS
  if dry; then show sleep "$1"; else sleep "$1"; fi
}

# ask COMMAND...: OUT, ERR and CODE of it. What passes by itself is tried three times.
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
reason() { # the cloud's own words in one line
  local words
  words=$(tr -s '[:space:]' ' ' <<<"${ERR:-$OUT}")
  printf '%s' "${words% }"
}

# --- the cloud --------------------------------------------------------------------------------------------------------------------------

QUEUED=(gcloud compute tpus queued-resources)

# describe [calm]: STATE (GONE where there is none), BY (who began it) and WHY (the cloud's reason). Calm: STATE is UNREAD where the cloud does not
# answer, which ends the script else.
describe() {
  ask "${QUEUED[@]}" describe "${SET[name]}" "${WHERE[@]}" '--format=value[separator="|"](state.state,state.stateInitiator,state.failedData.error.message)'
  if ((CODE)); then
    STATE=GONE BY='' WHY=''
    [[ $ERR == *NOT_FOUND* ]] && return
    [[ ${1-} == calm ]] || die 1 "${SET[name]}: cannot be looked up: $(reason)"
    STATE=UNREAD
    return
  fi
  # shellcheck disable=SC2034 # used by the scripts
  IFS='|' read -r STATE BY WHY <<<"${OUT//[[:space:]]/ }"
}

count_workers() { # WORKERS: how many there are, over all slices
  local node nodes=("${SET[name]}") i
  WORKERS=0
  if ((${SET[slices]:-1} > 1)); then
    nodes=()
    for ((i = 0; i < SET[slices]; i++)); do nodes+=("${SET[name]}-$i"); done
  fi
  for node in "${nodes[@]}"; do
    if dry; then
      show gcloud compute tpus tpu-vm describe "$node" "${WHERE[@]}" '--format=value(networkEndpoints.len())'
      continue
    fi
    ask gcloud compute tpus tpu-vm describe "$node" "${WHERE[@]}" '--format=value(networkEndpoints.len())'
    [[ $CODE == 0 && $OUT =~ ^[1-9][0-9]*$ ]] || die $LOST "$node: its workers cannot be counted: $(reason)"
    WORKERS=$((WORKERS + OUT))
  done
}

# far NODE WORKER VERB ARGUMENTS...: remote.sh on workers ("all" or a number), its answers in OUT. gcloud's exit code is not trusted: of several
# slices it may tell another's. Every worker answers by a line "@ HOST ...", and answers are counted.
far() {
  local node=$1 worker=$2 line
  shift 2
  printf -v line '%q ' bash "$FAR/remote.sh" "$@"
  on "$node" "$worker" "${line% }"
}
on() { # NODE WORKER LINE
  local command=("${QUEUED[@]}" ssh "${SET[name]}" "${WHERE[@]}" --node="$1" --worker="$2" --quiet --command="$3")
  [[ -v SET[internal-ips] ]] && command+=(--internal-ip)
  if dry; then show "${command[@]}"; else ask "${command[@]}"; fi
}
send() { # FILE...: to the folder on every worker
  local command=("${QUEUED[@]}" scp "$@" "${SET[name]}:$FAR/" "${WHERE[@]}" --node=all --worker=all --quiet)
  [[ -v SET[internal-ips] ]] && command+=(--internal-ip)
  if dry; then
    show "${command[@]}"
    return
  fi
  ask "${command[@]}"
  ((CODE == 0)) || die $LOST "${SET[name]}: files did not reach every worker: $(reason)"
}
answers() { # [WORD]: how many workers answered, or answered WORD
  grep -c "^@ [^ ]* ${1-}" <<<"$OUT" || true
}
refusals() { # what workers could not do
  sed -n 's/^@ \([^ ]*\) failed /\1: /p' <<<"$OUT" | head -n 3
}
prepare() { # the folder and remote.sh on every worker
  on all all "mkdir -p $FAR"
  dry || ((CODE == 0)) || die $LOST "${SET[name]}: not every worker was reached: $(reason). Several at once need the key in an agent: ssh-add ~/.ssh/google_compute_engine"
  send "$HERE/remote.sh" "$HERE/profiled.py"
}

# The shape that --type stands for, where it stands for one: https://cloud.google.com/tpu/docs/v5p, v5e, v6e. Others need --topology.
declare -A FLAT=([1]=1x1 [4]=2x2 [8]=2x4 [16]=4x4 [32]=4x8 [64]=8x8 [128]=8x16 [256]=16x16)
declare -A SOLID=([8]=2x2x1 [16]=2x2x2 [32]=2x2x4 [64]=2x4x4 [128]=4x4x4 [256]=4x4x8 [512]=4x8x8 [1024]=8x8x8 [2048]=8x8x16 [4096]=8x16x16 [8192]=16x16x16)
topology_of() { # TOPOLOGY for `lmeff plan`
  local kind=${SET[type]-} size shape=''
  TOPOLOGY=${SET[topology]-}
  [[ -z $TOPOLOGY ]] || return 0
  size=${kind##*-}
  case $kind in
    v5litepod-*) kind=v5e shape=${FLAT[$size]-} ;;
    v6e-*) kind=v6e shape=${FLAT[$size]-} ;;
    v4-* | v5p-*) kind=${kind%-*} shape=${SOLID[$size]-} ;;
  esac
  [[ -n $shape ]] || die $USAGE "--topology: is missing, and --type ${SET[type]-} says no shape; expected ${EXPECTED[topology]}"
  TOPOLOGY=$kind:$shape
  ((${SET[slices]:-1} == 1)) || TOPOLOGY+=:${SET[slices]}
}

# bring FILE NODE WORKER FOLDER: an archive from a worker, unpacked here. tar drops a leading / and refuses ..
bring() {
  local here=$TEMPORARY/$1
  local command=("${QUEUED[@]}" scp "${SET[name]}:$FAR/$1")
  dry && here=$1
  command+=("$here" "${WHERE[@]}" --node="$2" --worker="$3" --quiet)
  [[ -v SET[internal-ips] ]] && command+=(--internal-ip)
  if dry; then
    show "${command[@]}"
    show mkdir -p "$4"
    show tar -xzf "$here" --no-same-owner -C "$4"
    return
  fi
  ask "${command[@]}"
  ((CODE == 0)) || die $LOST "${SET[name]}: $1 did not arrive: $(reason)"
  mkdir -p "$4"
  tar -xzf "$here" --no-same-owner -C "$4"
  say "${SET[name]}: is in $4"
}
