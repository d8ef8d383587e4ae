# shellcheck shell=bash
# shellcheck disable=SC2034,SC2153,SC2154 # names shared with lib.sh and the scripts
# Settings, each checked before it reaches a command.
#
# A value comes from a flag, else from the environment (LMEFF_TPU_ZONE for --zone; an empty variable counts as none), else from a file of lines such as
# zone=us-east5-b, else from a default. It must match its pattern whole and be no longer than LONGEST_VALUE.

readonly WORD='[A-Za-z0-9_][A-Za-z0-9_.+-]*'
declare -A PATTERN=(
  [name]='[a-z]([a-z0-9-]{0,38}[a-z0-9])?'
  [project]='([a-z][a-z0-9.-]{1,60}:)?[a-z][a-z0-9-]{4,28}[a-z0-9]'
  [zone]='[a-z]{2,20}-[a-z]{2,20}[0-9]{1,2}-[a-z][a-z0-9]{0,4}'
  [type]='(v4|v5litepod|v5p|v6e)-[1-9][0-9]{0,4}'
  [slices]='[1-9][0-9]{0,2}'
  [runtime]='[a-z0-9][a-z0-9.-]{1,60}'
  [topology]='((v5e|v6e):[1-9][0-9]{0,2}|(v4|v5p|tpu7x):[1-9][0-9]{0,2}x[1-9][0-9]{0,2})x[1-9][0-9]{0,2}(:[1-9][0-9]{0,2})?'
  [timeout]='[1-9][0-9]{0,6}'
  [poll]='[1-9][0-9]{0,3}'
  [profile]='[0-9]{1,8}:[0-9]{1,8}'
  [startup-script]="/?([.]?$WORD/)*[.]?$WORD"
  [valid-for]='[1-9][0-9]{0,3}[smhd]'
  [wheel]="/?($WORD/)*${WORD}[.]whl"
  [constraints]="/?($WORD/)*$WORD"
  [env-file]="/?([.]?$WORD/)*[.]?$WORD"
  [settings]="/?([.]?$WORD/)*[.]?$WORD"
  [out]="/?($WORD/)*$WORD"
  [extras]='[a-z][a-z0-9]*(,[a-z][a-z0-9]*)*'
  [python]='3[.]1[123]'
  [runs]="/($WORD/)*$WORD"
  [run]="$WORD"
  [job]='[A-Za-z0-9][A-Za-z0-9_-]{0,60}'
  [verb]='run|train'
  [node]='[0-9]{1,3}'
  [worker]='[0-9]{1,4}'
  [lines]='[1-9][0-9]{0,4}'
  [grace]='[0-9]{1,4}'
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
  [profile]='FIRST:LAST, steps, such as 10:13'
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
readonly SWITCHES=' dry-run spot reserved internal-ips dirty no-plan delete all follow checkpoints ' # as lines of a settings file
readonly LONGEST_VALUE=250

declare -A SET=()     # the settings by name
declare -A DEFAULT=() # a script's own defaults
POSITIONAL=()         # words that belong to no flag
ARGUMENTS=()          # words behind --

matches() { [[ ${#1} -le $LONGEST_VALUE && $1 =~ ^($2)$ && $1 != *$'\n'* ]]; }

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
          (($#)) || die "$USAGE" "$word: got nothing behind it, expected a value"
          flags[$key]=$1
          shift
        fi
        ;;
      -*) die "$USAGE" "$(printf %q "$word"): is no option here; see $SCRIPT --help" ;;
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
    [[ -v SET[$name] ]] ||
      die "$USAGE" "--$name: is missing, expected ${EXPECTED[$name]-a value}; a flag, a line of --settings or $(variable_of "$name") says it"
  done
  for word in "${ARGUMENTS[@]}"; do
    matches "$word" "$ARGUMENT_PATTERN" || die "$USAGE" "$(printf %q "$word") behind --: expected letters, digits and ._=,:/@%+^- only"
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
  [[ $1 =~ ^[a-z-]+$ && $2 == *" $1 "* ]] || die "$USAGE" "$(printf %q "$3"): is no option here; see $SCRIPT --help"
}

_keep() { # NAME WHERE VALUE SWITCHES
  if [[ $4 == *" $1 "* ]]; then
    [[ $3 =~ ^[01]$ ]] || die "$USAGE" "$2: got $(printf %q "$3"), expected 1 or 0"
    [[ $3 == 0 ]] || SET[$1]=1
    return 0
  fi
  matches "$3" "${PATTERN[$1]}" || die "$USAGE" "$2: got $(printf %q "$3"), expected ${EXPECTED[$1]-a value of the form ${PATTERN[$1]}}"
  SET[$1]=$3
}

# Fills the caller's `file`. The lines are read, not run.
_settings_file() {
  local line number=0 key
  [[ -n $1 ]] || return 0
  matches "$1" "${PATTERN[settings]}" || die "$USAGE" "--settings: got $(printf %q "$1"), expected a path of letters, digits and ._+-"
  [[ -r $1 ]] || die "$USAGE" "--settings: got $1, expected a file that can be read"
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    [[ $line =~ ^[[:space:]]*(#.*)?$ ]] && continue
    key=${line%%=*}
    [[ $line == *=* && $key =~ ^[a-z-]+$ && (-v PATTERN[$key] || $SWITCHES == *" $key "*) ]] ||
      die "$USAGE" "$1: line $number: got $(printf %q "$line"), expected SETTING=VALUE, such as zone=us-east5-b"
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
  ((${#POSITIONAL[@]} == 1)) || die "$USAGE" "got ${#POSITIONAL[@]} configs, expected one, such as configs/quickstart.py"
  CONFIG=${POSITIONAL[0]}
  matches "$CONFIG" "$CONFIG_PATTERN" ||
    die "$USAGE" "config: got $(printf %q "$CONFIG"), expected a .py file by its path from the top of the repository"
}

no_positional() { ((${#POSITIONAL[@]} == 0)) || die "$USAGE" "$(printf %q "${POSITIONAL[0]}"): is no option here; see $SCRIPT --help"; }
