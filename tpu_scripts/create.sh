#!/usr/bin/env bash
# Asks the cloud for TPUs: one slice, or several that train together.
# shellcheck source=tpu_scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

help() {
  cat <<'END'
create.sh --name NAME --project PROJECT --zone ZONE --type TYPE [--slices N] [--spot | --reserved] [--runtime VERSION] [--valid-for 6h]
          [--startup-script FILE] [--internal-ips] [--settings FILE] [--dry-run]

Asks for a queued resource, which waits until there are chips. Then: wait.sh, setup.sh, launch.sh.
  --type             v5litepod-N and v6e-N have N chips; v4-N and v5p-N have N/2: v5p-64 is 32 chips
  --slices N         so many slices that train together (nodes NAME-0, NAME-1, ...)
  --spot             cheaper, and may be taken away at any time: babysit.sh goes on with the run
  --reserved         from a reservation of the project
  --runtime          the VM's image; by default the one that belongs to the type
  --startup-script   a file that every worker runs as root when it starts, such as one that mounts --runs
  --valid-for        give up where there are no chips so long
  --internal-ips     no addresses that the internet sees; then every script needs it

WHAT IT COSTS TO FORGET delete.sh
  From ACTIVE on every chip is billed for every hour until it is deleted, whether something runs on it or not, also after a run has ended or
  failed: chips x hours x the price of a chip-hour in that zone (https://cloud.google.com/tpu/pricing). v5litepod-256 for a forgotten weekend
  (60 h) is 15,360 chip-hours. All slices count.
  A request that waits, or that is FAILED or SUSPENDED, costs nothing, but one that waits may become ACTIVE later.
  What is there:    gcloud compute tpus queued-resources list --project PROJECT --zone ZONE
                    gcloud compute tpus tpu-vm list --project PROJECT --zone ZONE
  End it:           tpu_scripts/delete.sh --name NAME --project PROJECT --zone ZONE
END
}

# https://cloud.google.com/tpu/docs/runtimes
declare -A RUNTIME=([v4]=tpu-ubuntu2204-base [v5litepod]=v2-alpha-tpuv5-lite [v5p]=v2-alpha-tpuv5 [v6e]=v2-alpha-tpuv6e)

parse "name project zone type slices runtime valid-for startup-script" "spot reserved internal-ips" "name project zone type" -- "$@"
no_positional
[[ -v SET[spot] && -v SET[reserved] ]] && die "$USAGE" "--spot and --reserved: got both, expected one of the two"
slices=${SET[slices]:-1}
command=("${QUEUED[@]}" create "${SET[name]}" "${WHERE[@]}" --accelerator-type="${SET[type]}"
  --runtime-version="${SET[runtime]-${RUNTIME[${SET[type]%-*}]}}")
if ((slices > 1)); then
  command+=(--node-count="$slices" --node-prefix="${SET[name]}")
else
  command+=(--node-id="${SET[name]}")
fi
for switch in spot reserved internal-ips; do
  [[ -v SET[$switch] ]] && command+=("--$switch")
done
[[ -v SET[valid-for] ]] && command+=(--valid-until-duration="${SET[valid-for]}")
if [[ -v SET[startup-script] ]]; then
  [[ -f ${SET[startup-script]} && -r ${SET[startup-script]} ]] || die "$USAGE" "--startup-script: got ${SET[startup-script]}, expected a file that can be read"
  command+=(--metadata-from-file=startup-script="${SET[startup-script]}")
fi
command+=(--quiet)
dry && show "${command[@]}" && exit 0

ask "${command[@]}"
if ((CODE)); then
  [[ $ERR == *ALREADY_EXISTS* ]] && die "$REFUSED" "${SET[name]}: is there already; wait.sh waits for it, delete.sh ends it"
  told=$(reason)
  describe
  case $STATE in
    GONE) left="nothing was left behind" ;;
    UNREAD) left="whether something was left behind cannot be seen: run delete.sh --name ${SET[name]}" ;;
    *) left="the request is left behind as $STATE; delete.sh --name ${SET[name]} takes it away" ;;
  esac
  die "$REFUSED" "${SET[name]}: the cloud refused: $told; $left"
fi
say "${SET[name]}: asked for $slices x ${SET[type]} in ${SET[zone]}. It is billed from ACTIVE until delete.sh; next: wait.sh"
