# shellcheck shell=bash
# shellcheck disable=SC2034,SC2153,SC2154 # names shared with lib.sh and the scripts
# What is asked of the cloud: states, workers, files, and remote.sh on workers.

QUEUED=(gcloud compute tpus queued-resources)

readonly STATE_FORMAT='--format=value[separator="|"](state.state,state.stateInitiator,state.failedData.error.message)'

# describe: STATE (GONE where there is none, UNREAD where the cloud does not answer), BY (who began it) and WHY (the cloud's reason).
describe() {
  ask "${QUEUED[@]}" describe "${SET[name]}" "${WHERE[@]}" "$STATE_FORMAT"
  STATE=UNREAD BY='' WHY=''
  if ((CODE == 0)); then
    IFS='|' read -r STATE BY WHY <<<"${OUT//[[:space:]]/ }"
  elif [[ $ERR == *NOT_FOUND* ]]; then
    STATE=GONE
  fi
}
must_describe() { # as describe; ends the script where the cloud does not answer
  describe
  [[ $STATE != UNREAD ]] || die 1 "${SET[name]}: cannot be looked up: $(reason)"
}

# count_workers: WORKERS, over all slices. Fails, with the reason in WHY, where they cannot be counted.
count_workers() {
  local node nodes=("${SET[name]}") i ends networks command
  if ((${SET[slices]:-1} > 1)); then
    nodes=()
    for ((i = 0; i < SET[slices]; i++)); do nodes+=("${SET[name]}-$i"); done
  fi
  WORKERS=0
  for node in "${nodes[@]}"; do
    command=(gcloud compute tpus tpu-vm describe "$node" "${WHERE[@]}" '--format=value[separator="|"](networkEndpoints.len(),networkConfigs.len())')
    if dry; then
      show "${command[@]}"
      continue
    fi
    ask "${command[@]}"
    IFS='|' read -r ends networks <<<"$OUT" || true
    if [[ $CODE != 0 || ! $ends =~ ^[1-9][0-9]{0,4}$ ]]; then
      WHY="$node: its workers cannot be counted: $(reason)"
      return 1
    fi
    [[ $networks =~ ^[1-9][0-9]?$ ]] || networks=1 # a worker has an endpoint in each of its networks
    WORKERS=$((WORKERS + (ends + networks - 1) / networks))
  done
}

# far NODE WORKER VERB ARGUMENTS...: remote.sh on workers ("all" or a number), its answers in OUT. gcloud's exit code is not trusted: of several
# slices it may tell another's. Every worker answers by a line "@ HOST ...", and answers are counted.
far() {
  reach "$@"
  perform "${REACH[@]}"
}
reach() { # as far: the command in REACH
  local LINE node=$1 worker=$2
  shift 2
  quoted bash "$FAR/remote.sh" "$@"
  on "$node" "$worker" "$LINE"
}
on() { # NODE WORKER LINE: the command in REACH
  REACH=("${QUEUED[@]}" ssh "${SET[name]}" "${WHERE[@]}" --node="$1" --worker="$2" --quiet --command="$3")
  [[ ! -v SET[internal-ips] ]] || REACH+=(--internal-ip)
}
send() { # FILE...: to the folder on every worker
  local command=("${QUEUED[@]}" scp "$@" "${SET[name]}:$FAR/" "${WHERE[@]}" --node=all --worker=all --quiet)
  [[ ! -v SET[internal-ips] ]] || command+=(--internal-ip)
  perform "${command[@]}"
  dry || ((CODE == 0)) || die "$LOST" "${SET[name]}: files did not reach every worker: $(reason)"
}
answers() { # [WORD]: how many workers answered, or answered WORD
  grep -c "^@ [^ ]* ${1-}" <<<"$OUT" || true
}
refusals() { # what workers could not do
  sed -n 's/^@ \([^ ]*\) failed /\1: /p' <<<"$OUT" | head -n 3
}
prepare() { # the folder and remote.sh on every worker
  on all all "mkdir -p $FAR"
  perform "${REACH[@]}"
  dry || ((CODE == 0)) ||
    die "$LOST" "${SET[name]}: not every worker was reached: $(reason). Several at once need the key in an agent: ssh-add ~/.ssh/google_compute_engine"
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
  [[ -n $shape ]] || die "$USAGE" "--topology: is missing, and --type ${SET[type]-} says no shape; expected ${EXPECTED[topology]}"
  TOPOLOGY=$kind:$shape
  ((${SET[slices]:-1} == 1)) || TOPOLOGY+=:${SET[slices]}
}

# bring FILE NODE WORKER FOLDER: an archive from a worker, unpacked here. tar drops a leading / and refuses ..
bring() {
  local here=$TEMPORARY/$1
  local command=("${QUEUED[@]}" scp "${SET[name]}:$FAR/$1")
  dry && here=$1
  command+=("$here" "${WHERE[@]}" --node="$2" --worker="$3" --quiet)
  [[ ! -v SET[internal-ips] ]] || command+=(--internal-ip)
  if dry; then
    show "${command[@]}"
    show mkdir -p "$4"
    show tar -xzf "$here" --no-same-owner -C "$4"
    return
  fi
  ask "${command[@]}"
  ((CODE == 0)) || die "$LOST" "${SET[name]}: $1 did not arrive: $(reason)"
  mkdir -p "$4"
  tar -xzf "$here" --no-same-owner -C "$4"
  say "${SET[name]}: is in $4"
}
