#!/usr/bin/env bash
# For clusters of GKE, and so for TPU7x: prints a JobSet, or the command of xpk. It runs nothing.
# shellcheck source=tpu_scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

help() {
  cat <<'END'
gke.sh jobset --name NAME --topology v5p:4x4x4[:SLICES] --image IMAGE --claim PVC [--chips-per-host 4] [--restarts 10] [--secret SECRET] [--spot]
              [--verb run|train] [--settings FILE] [--dry-run] CONFIG [-- SETTINGS...]
gke.sh xpk    --name NAME --project PROJECT --zone ZONE --cluster CLUSTER --type TYPE [--slices N] --image IMAGE [--runs /runs] [--restarts 10]
              [--env-file FILE] [--spot] [--verb run|train] [--settings FILE] [--dry-run] CONFIG [-- SETTINGS...]

jobset prints a manifest (JobSet v1alpha2): a Job a slice, a pod a host, runs on the volume of --claim at /runs. Exit codes 2 to 6 fail it at
once; any other, 42 and evictions with it, restarts all of it --restarts times at most, and it goes on where it saved. See what it would do, then
do it:   gke.sh jobset ... | kubectl apply --dry-run=server -f -     gke.sh jobset ... | kubectl apply -f -
xpk prints the command `xpk workload create`; without --restart-on-user-code-failure, xpk restarts on 42 and on 127 and above, and on no other.
IMAGE has lmeff[tpu,report,text] in it, and CONFIG in its working folder. --chips-per-host is the node pool's: 1, 4 or 8 (v5e and v6e of 2x4).
Secrets come from a Secret of the cluster (--secret, as environment variables) or a file (--env-file), never as arguments.
It runs nothing, with --dry-run or without. What a JobSet leaves behind: pods that have ended stay until `kubectl delete jobset NAME`; node pools are
billed while they have nodes, whether something runs on them or not.
END
}

# https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
declare -A LABEL=([v4]=tpu-v4-podslice [v5e]=tpu-v5-lite-podslice [v5p]=tpu-v5p-slice [v6e]=tpu-v6e-slice [tpu7x]=tpu7x)

both="name image verb restarts"
verb=${1-}
case $verb in
  --help | -h) help && exit 0 ;;
  jobset) options="$both topology claim secret chips-per-host" needs="name topology image claim" ;;
  xpk) options="$both project zone cluster type slices runs env-file" needs="name project zone cluster type image" ;;
  *) die "$USAGE" "$(printf %q "$verb"): got this verb, expected jobset or xpk; see $SCRIPT --help" ;;
esac
shift
DEFAULT=([restarts]=10 [verb]=run)
PATTERN[type]='(v4|v5litepod|v5p|v6e|tpu7x)-[1-9][0-9]{0,4}' EXPECTED[type]='an accelerator type, such as v5p-64 or tpu7x-16'
parse "$options" "spot" "$needs" -- "$@"
config_of

jobset() {
  local family shape slices chips=1 side host hosts word
  IFS=: read -r family shape slices <<<"${SET[topology]}"
  slices=${slices:-1}
  for side in ${shape//x/ }; do chips=$((chips * side)); done
  host=${SET[chips-per-host]-$((chips < 4 ? chips : 4))}
  ((chips % host == 0)) || die "$USAGE" "--chips-per-host: got $host for $chips chips, expected a divisor"
  hosts=$((chips / host))
  cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: "${SET[name]}"
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: ${SET[restarts]}
    rules:
      - action: FailJobSet
        onJobFailureReasons: ["PodFailurePolicy"]
  replicatedJobs:
    - name: slice
      replicas: $slices
      template:
        spec:
          completionMode: Indexed
          parallelism: $hosts
          completions: $hosts
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes:
                  containerName: lmeff
                  operator: In
                  values: [2, 3, 4, 5, 6]
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 120
              hostNetwork: true
              dnsPolicy: ClusterFirstWithHostNet
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: "${LABEL[$family]}"
                cloud.google.com/gke-tpu-topology: "$shape"
END
  if [[ -v SET[spot] ]]; then
    printf '                cloud.google.com/gke-spot: "true"\n'
    printf '              tolerations:\n                - key: cloud.google.com/gke-spot\n                  operator: Equal\n'
    printf '                  value: "true"\n                  effect: NoSchedule\n'
  fi
  cat <<END
              containers:
                - name: lmeff
                  image: "${SET[image]}"
                  command: ["lmeff"]
                  args:
END
  for word in "${SET[verb]}" "$CONFIG" --distributed --runs /runs "${ARGUMENTS[@]}"; do printf '                    - "%s"\n' "$word"; done
  if [[ -v SET[secret] ]]; then
    printf '                  envFrom:\n                    - secretRef:\n                        name: "%s"\n' "${SET[secret]}"
  fi
  cat <<END
                  resources:
                    requests:
                      google.com/tpu: $host
                    limits:
                      google.com/tpu: $host
                  volumeMounts:
                    - name: runs
                      mountPath: /runs
              volumes:
                - name: runs
                  persistentVolumeClaim:
                    claimName: "${SET[claim]}"
END
}

xpk() {
  local words=(lmeff "${SET[verb]}" "$CONFIG" --distributed) LINE
  [[ -v SET[runs] ]] && words+=(--runs "${SET[runs]}")
  quoted "${words[@]}" "${ARGUMENTS[@]}"
  local command=(xpk workload create --project="${SET[project]}" --zone="${SET[zone]}" --cluster="${SET[cluster]}" --workload="${SET[name]}"
    --tpu-type="${SET[type]}" --num-slices="${SET[slices]:-1}" --docker-image="${SET[image]}" --max-restarts="${SET[restarts]}")
  [[ -v SET[env-file] ]] && command+=(--env-file="${SET[env-file]}")
  [[ -v SET[spot] ]] && command+=(--spot)
  show "${command[@]}" --command="$LINE"
}

"$verb"
