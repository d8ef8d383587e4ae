#!/usr/bin/env bash
# Starts one command of lmeff on every worker, after its plan has said that it fits.
# shellcheck source=tpu_scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

help() {
  cat <<'END'
launch.sh --name NAME --project PROJECT --zone ZONE [--type TYPE] [--topology v5e:4x4] [--slices N] [--runs /mnt/runs] [--verb run|train] [--dirty]
          [--profile 10:13] [--no-plan] [--env-file FILE] [--job JOB] [--internal-ips] [--settings FILE] [--dry-run] CONFIG [-- SETTINGS...]

Run it at the top of the repository. CONFIG is a file in it; SETTINGS are those that `lmeff run` and `lmeff plan` both know: --mesh.fsdp 16
  1  takes the committed tree (git archive); --dirty takes the files as they are
  2  runs `lmeff plan CONFIG --topology ...` of that tree, here: exit code 6 and nothing is started where it does not fit. The topology follows
     from --type where that has one shape. --no-plan leaves it out (the compiled plan needs libtpu: pip install 'lmeff[tpu]')
  3  sends the tree to every worker; with several workers, makes sure that all of them see the same --runs
  4  starts `lmeff run CONFIG --distributed SETTINGS` on every worker, in a session that outlives ssh (setsid, nohup), and returns.
     Where not every worker could be started, those that were are stopped
  --profile 10:13   also traces these steps of each stage that trains, into RUN/profile/STAGE; profile.sh traces a run that is going
  --env-file FILE   lines VARIABLE=VALUE for the command, such as tokens: a file only you can read (chmod 600), sent as a file, never an argument
The command, commit and the config's SHA-256 are kept in .lmeff-tpu/NAME/JOB, and what the workers write in ~/lmeff-tpu/jobs/JOB there.
Then: logs.sh, profile.sh, fetch.sh. The job's end does not end the billing: delete.sh does. babysit.sh restarts what was taken away.
END
}

DEFAULT=([verb]=run)
parse "name project zone type topology slices runs verb profile env-file job" "dirty no-plan internal-ips" "name project zone" -- "$@"
config_of

# --- what runs
top=$(git rev-parse --show-toplevel 2>/dev/null) || die "$USAGE" "expected to be called inside the repository that is to run"
[[ $top == "$(pwd -P)" ]] || die "$USAGE" "expected to be called at the top of the repository, $top"
commit=$(git rev-parse --verify --quiet HEAD) || die "$USAGE" "$top: has no commit; expected one, its tree is what runs"
environment=-
if [[ -v SET[env-file] ]]; then
  [[ -r ${SET[env-file]} ]] || die "$USAGE" "--env-file: got ${SET[env-file]}, expected a file that can be read"
  mode=$(stat -c %a "${SET[env-file]}" 2>/dev/null || stat -f %Lp "${SET[env-file]}")
  [[ $mode == 600 || $mode == 400 ]] || die "$USAGE" "--env-file: ${SET[env-file]} can be read by others (mode $mode), expected chmod 600"
  environment=environment
fi

archive() { # FILE: the tree as a .tar.gz
  if [[ -v SET[dirty] ]]; then
    git ls-files -z --cached --others --exclude-standard |
      while IFS= read -r -d '' entry; do [[ ! -e $entry && ! -L $entry ]] || printf '%s\0' "$entry"; done |
      COPYFILE_DISABLE=1 tar -czf "$1" --no-recursion --null -T -
  else
    git archive --format=tar.gz --output="$1" HEAD
  fi
}
tree=${commit:0:12}
changed=$(git status --porcelain --untracked-files=no)
if [[ -v SET[dirty] && -n $(git status --porcelain) ]]; then
  tree+=-dirty
elif [[ -n $changed ]]; then
  say "changes that are not committed are not sent; --dirty sends them"
fi
job=${SET[job]-$(date -u +%Y%m%d-%H%M%S)-${commit:0:7}}
[[ ! -e .lmeff-tpu/${SET[name]}/$job ]] || die "$USAGE" "--job: $job was launched before, expected a new name; leave it out for one by date and commit"
bundle=$TEMPORARY/tree.tar.gz
mkdir "$TEMPORARY/tree"
archive "$bundle"
tar -xzf "$bundle" -C "$TEMPORARY/tree"
[[ -f $TEMPORARY/tree/$CONFIG ]] || die "$USAGE" "$CONFIG: is not in the tree that is sent; commit it, or pass --dirty"
config_digest=$(digest "$TEMPORARY/tree/$CONFIG")
command=(lmeff "${SET[verb]}" "$CONFIG" --distributed)
[[ -v SET[runs] ]] && command+=(--runs "${SET[runs]}")
[[ -v SET[profile] ]] && command+=(--profile "${SET[profile]}")
command+=("${ARGUMENTS[@]}")

# --- whether it fits
if [[ ! -v SET[no-plan] ]]; then
  topology_of
  planning=(lmeff plan "$CONFIG" --topology "$TOPOLOGY" "${ARGUMENTS[@]}")
  if dry; then
    show "${planning[@]}"
  else
    code=0
    # The tree's own lmeff comes before the one that is installed.
    (cd "$TEMPORARY/tree" && PYTHONPATH=$PWD "${planning[@]}") >&2 || code=$?
    ((code != FITS_NOT)) || die "$FITS_NOT" "$CONFIG does not fit $TOPOLOGY; nothing was started"
    ((code == 0)) || die "$code" "the plan of $CONFIG for $TOPOLOGY failed with exit code $code; nothing was started"
  fi
fi

# --- every worker has it
sum=$(digest "$bundle")
if dry; then
  if [[ -v SET[dirty] ]]; then
    printf '%s\n' "git ls-files -z --cached --others --exclude-standard | tar -czf tree.tar.gz --no-recursion --null -T -"
  else
    show git archive --format=tar.gz --output=tree.tar.gz HEAD
  fi
  bundle=tree.tar.gz
fi
count_workers || die "$LOST" "$WHY"
if ((WORKERS > 1)) && [[ ! -v SET[runs] ]]; then
  die "$USAGE" "--runs: is missing, expected a folder that all $WORKERS workers see (NFS, Filestore, gcsfuse), such as /mnt/runs: they write one run together"
fi
prepare
files=("$bundle")
if [[ $environment != - ]]; then
  secrets=$TEMPORARY/environment
  dry && secrets=environment
  run install -m 600 "${SET[env-file]}" "$secrets"
  files+=("$secrets")
fi
send "${files[@]}"
far all all unpack tree.tar.gz "$sum" "$tree"
unpacked=$(answers unpacked) refused=$(refusals)
dry || ((unpacked == WORKERS)) || die "$LOST" "the tree is on $unpacked of $WORKERS workers only; ${refused:-$(reason)}; nothing was started"

# shared_runs: worker 0 leaves a mark in --runs, which every worker must see. BLIND says what is wrong.
shared_runs() {
  local all
  BLIND=''
  far 0 0 mark "${SET[runs]}" "$job"
  dry || (($(answers marked) == 1)) || BLIND="${SET[runs]} cannot be written on worker 0: $(refusals)$(reason)"
  [[ -z $BLIND ]] || return 0
  far all all seen "${SET[runs]}" "$job"
  all=$OUT
  far 0 0 unmark "${SET[runs]}" "$job"
  dry && return
  OUT=$all
  all=$(sed -n 's/^@ \([^ ]*\) unseen.*/\1/p' <<<"$OUT" | head -n 3 | tr '\n' ' ')
  if [[ -n $all ]]; then
    BLIND="${SET[runs]} is not the same folder everywhere: worker ${all}does not see what worker 0 wrote; mount shared storage there"
  elif (($(answers seen) != WORKERS)); then
    BLIND="${SET[runs]} was seen by $(answers seen) of $WORKERS workers: $(reason)"
  fi
}
if [[ -v SET[runs] ]] && { dry || ((WORKERS > 1)); }; then
  for try in 1 2 3; do # a start-up script may still be mounting it
    shared_runs
    [[ -n $BLIND ]] || break
    say "try $try of 3: --runs: $BLIND"
    ((try == 3)) || sleep 20
  done
  [[ -z $BLIND ]] || die "$LOST" "--runs: $BLIND. Nothing was started"
fi

# --- start
record=$TEMPORARY/record
{
  printf 'job=%s\ncommit=%s\ntree=%s\nconfig=%s\nconfig_sha256=%s\ntopology=%s\ncommand=' "$job" "$commit" "$tree" "$CONFIG" "$config_digest" "${TOPOLOGY-}"
  show "${command[@]}"
} >"$record"
begin=(far all all start "$job" "$tree" "$environment" "${command[@]:1}")
if dry; then
  "${begin[@]}"
  sed 's/^/# /' "$record"
  exit 0
fi
mkdir -p ".lmeff-tpu/${SET[name]}"
cp "$record" ".lmeff-tpu/${SET[name]}/$job"
for try in 1 2 3; do
  "${begin[@]}"
  (($(answers started) == WORKERS)) && break
  refused=$(refusals)
  [[ -z $refused ]] || break
  say "try $try of 3: started on $(answers started) of $WORKERS workers: $(reason)"
  ((try == 3)) || sleep $((try * 10))
done
if (($(answers started) != WORKERS)); then
  last=$(answers started)
  far all all stop "$job" 30
  stopped=$(answers stopped)
  left="nothing of it runs"
  ((stopped == WORKERS)) || left="on the others it may run: delete.sh ends them"
  die "$LOST" "$job: started on $last of $WORKERS workers only${refused:+ ($refused)}, and stopped on $stopped; $left"
fi
say "$job: runs on $WORKERS workers; logs.sh --name ${SET[name]} shows it. It goes on without this terminal. delete.sh ends the billing"
