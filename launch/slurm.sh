#!/bin/bash
# Train on Slurm: one torchrun on each node, a checkpoint before the time limit, requeued until the run has finished.
#   sbatch --nodes=2 --gpus-per-node=8 --cpus-per-task=64 --time=24:00:00 launch/slurm.sh CONFIG [section.key=value ...]
#   sbatch --array=1-4%1 ... launch/slurm.sh CONFIG ...     four jobs, one after another; none of them is requeued
# Settings: the options of sbatch can be replaced on its command line, the others by environment variables.
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
: "${COMMAND:=train}"                                  # or finetune
: "${PROCESSES_PER_NODE:=${SLURM_GPUS_ON_NODE:-1}}"
: "${SPARE_NODES:=0}"                                  # of the job's nodes: all are examined first, the sick left out
: "${MAX_RESTARTS:=0}"                                 # of ranks that fail, from the newest checkpoint
: "${GRACE:=120}"                                      # seconds for a step and a checkpoint, as in --signal
: "${RUN:=}"                                           # folder of the run; empty: track.folder of CONFIG
: "${LOGS:=logs}"                                      # folder for the logs of each node
: "${PYTHON:=python}"
# End of settings
set -u
: "${1:?usage: sbatch launch/slurm.sh CONFIG [section.key=value ...]}"
if [[ -z $RUN ]]; then
  RUN=$("$PYTHON" -c 'import sys; from roots_dist.config.load import read
print(read(sys.argv[1], sys.argv[2:]).config.track.folder)' "$@") || exit 1
fi
if ((MAX_RESTARTS > 0)); then export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1; fi # the old store holds keys of dead ranks
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi # srun inherits no other
log_pattern=${LOGS//'%'/%%} # %j and %N below are replaced by Slurm

step='' signaled=''
trap 'signaled=1; [[ -n $step ]] && kill -USR1 "$step" 2> /dev/null' USR1 # srun forwards it to each torchrun
ended() { head -n 1 -- "$RUN/ended.txt" 2> /dev/null; }
array=${SLURM_ARRAY_JOB_ID:-}
if [[ -n $array && $(ended) == finished* ]]; then echo "the run has finished: nothing is left to do"; exit 0; fi
rm -f -- "$RUN/ended.txt"
mkdir -p -- "$LOGS" || exit 1
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
needed=$((${#nodes[@]} - SPARE_NODES))

if ((SPARE_NODES > 0)); then # the first nodes that pass `roots doctor`
  passed=$(mktemp -d -- "$LOGS/passed-$SLURM_JOB_ID-XXXXXX") || exit 1
  for node in "${nodes[@]}"; do # a step for each node: one that cannot start would end a common step
    { srun --nodes=1 --ntasks=1 --nodelist="$node" --output="$log_pattern/%j-check-$node.log" \
      timeout 120 env -u SLURM_STEP_ID -u SLURM_STEPID \
      "$PYTHON" -m roots_dist doctor --quick --processes "$PROCESSES_PER_NODE" && : > "$passed/$node"; } &
  done
  until wait; do :; done # a signal interrupts wait
  healthy=()
  for node in "${nodes[@]}"; do
    if [[ -e $passed/$node ]]; then healthy+=("$node"); continue; fi
    echo "$node is left out: $LOGS/$SLURM_JOB_ID-check-$node.log" >&2
  done
  rm -r -- "$passed"
  echo "${#healthy[@]} of ${#nodes[@]} nodes are healthy, $needed are needed" >&2
  if ((${#healthy[@]} < needed)); then exit 1; fi
  nodes=("${healthy[@]:0:needed}")
fi

srun --nodes="$needed" --ntasks="$needed" --ntasks-per-node=1 --nodelist="$(IFS=,; echo "${nodes[*]}")" \
  --kill-on-bad-exit=1 --output="$log_pattern/%j-%N.log" --open-mode=append \
  "$PYTHON" -m torch.distributed.run --nnodes="$needed" --nproc-per-node="$PROCESSES_PER_NODE" \
  --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
  --rdzv-endpoint="${nodes[0]}:$((20000 + SLURM_JOB_ID % 20000))" --max-restarts="$MAX_RESTARTS" \
  --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout="$GRACE" \
  -m roots_dist "$COMMAND" "$@" &
step=$!
while kill -0 "$step" 2> /dev/null; do wait "$step"; done
wait "$step"
code=$?

echo "$(date +%FT%T) job $SLURM_JOB_ID, exit code $code: $(ended)"
case "$(ended)" in stopped*) again=1 ;; "") again=$signaled ;; *) again='' ;; esac # "": signaled before training
if [[ -n $again && -n $array ]]; then exit 0; fi # the next job of the array resumes
if [[ -n $again && (-n $(ended) || ${SLURM_RESTART_COUNT:-0} -lt 10) ]]; then # the limit may be too short ever to begin
  scontrol requeue "$SLURM_JOB_ID" && sleep 60 # which ends this script
fi
exit "$code"
