#!/bin/bash
# Train with DeepSpeed's launcher, on this machine or on the hosts of a hostfile.
#   launch/deepspeed.sh CONFIG [section.key=value ...]
#   HOSTFILE=hosts launch/deepspeed.sh CONFIG [section.key=value ...]     lines of HOST slots=N
# SIGTERM to it stops the run with a checkpoint; the same command resumes. With a hostfile DeepSpeed hands CONFIG, the
# values and your NCCL_* and PYTHON* variables to a shell on each host: use none that a shell would change.
#
# Settings: each can be replaced by an environment variable.
: "${COMMAND:=train}"             # or finetune
: "${PROCESSES_PER_NODE:=auto}"   # without a hostfile. auto: one for each GPU, or for each core where there is no GPU
: "${HOSTFILE:=}"
: "${INCLUDE:=}"                  # of its hosts and slots only these: node1@node2:0,1
: "${EXCLUDE:=}"                  # all but these
: "${RUNNER:=pdsh}"               # or openmpi: how the hosts are reached
: "${MASTER_ADDR:=}"              # where rank 0 listens; empty: the hostfile's first host
: "${MASTER_PORT:=29500}"
: "${LOGS:=$PWD/logs}"            # folder for the logs of each rank on the hosts
: "${PYTHON:=python}"
read -ra extra <<< "${EXTRA:-}"   # more options for pdsh or mpirun; without a hostfile, for DeepSpeed's launcher
# End of settings
set -u
: "${1:?usage: launch/deepspeed.sh CONFIG [section.key=value ...]}"

if [[ -n $HOSTFILE ]]; then
  if [[ -z $MASTER_ADDR ]]; then MASTER_ADDR=$(awk '{ sub(/#.*/, "") } NF { print $1; exit }' "$HOSTFILE"); fi
  if [[ $RUNNER == openmpi ]]; then extra=(-x "MASTER_ADDR=$MASTER_ADDR" -x "MASTER_PORT=$MASTER_PORT" "${extra[@]}"); fi
  options=(--hostfile="$HOSTFILE" --launcher="$RUNNER" --force_multi --enable_each_rank_log="$LOGS")
  options+=(--master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT")
  if [[ -n $INCLUDE ]]; then options+=(--include="$INCLUDE"); fi
  if [[ -n $EXCLUDE ]]; then options+=(--exclude="$EXCLUDE"); fi
  quote="'\\''"
  if ((${#extra[@]} > 0)); then options+=(--launcher_args="$(printf "'%s' " "${extra[@]//"'"/"$quote"}")"); fi
  exec "$PYTHON" -m deepspeed.launcher.runner "${options[@]}" --no_local_rank --module roots_dist "$COMMAND" "$@"
fi

# What the runner starts on each host. On one machine the runner itself would read /job/hostfile, use GPUs that
# CUDA_VISIBLE_DEVICES hides, and leave the ranks training when it ends.
case $OSTYPE in darwin*) loopback=lo0 ;; *) loopback=lo ;; esac
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$loopback}"
if [[ $PROCESSES_PER_NODE == auto ]]; then
  PROCESSES_PER_NODE=$("$PYTHON" -c 'import os, torch; print(torch.cuda.device_count() or os.cpu_count())') || exit 1
fi
IFS=', ' read -ra devices <<< "${CUDA_VISIBLE_DEVICES:-}"
if ((${#devices[@]} == 0)); then mapfile -t devices < <(seq 0 $((PROCESSES_PER_NODE - 1))); fi
if ((${#devices[@]} < PROCESSES_PER_NODE)); then
  echo "CUDA_VISIBLE_DEVICES shows ${#devices[@]} GPUs, $PROCESSES_PER_NODE are needed" >&2
  exit 2
fi
slots=$(printf ', "%s"' "${devices[@]:0:PROCESSES_PER_NODE}")
world=$(printf '{"localhost": [%s]}' "${slots#, }" | base64 | tr -d '\n' | tr '+/' '-_')
exec "$PYTHON" -u -m deepspeed.launcher.launch --world_info="$world" --master_addr=127.0.0.1 --master_port="$MASTER_PORT" \
  "${extra[@]}" --no_local_rank --module roots_dist "$COMMAND" "$@"
