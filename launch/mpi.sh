#!/bin/bash
# Train with mpirun of Open MPI or MPICH, on this machine or on the hosts of a hostfile.
#   PROCESSES_PER_NODE=4 launch/mpi.sh CONFIG [section.key=value ...]
#   HOSTFILE=hosts launch/mpi.sh CONFIG [section.key=value ...]     lines of HOST slots=N, as many slots on each
#   NODES=2 PROCESSES_PER_NODE=8 MASTER_ADDR=node1 launch/mpi.sh CONFIG ...     where the scheduler tells mpirun the hosts
# SIGUSR1 to mpirun stops the run with a checkpoint; the same command resumes.
#
# Settings: each can be replaced by an environment variable.
: "${COMMAND:=train}"                  # or finetune
: "${HOSTFILE:=}"
: "${NODES:=1}"                        # without a hostfile, as the next one
: "${PROCESSES_PER_NODE:=1}"
: "${MASTER_ADDR:=}"                   # where rank 0 listens; empty: the hostfile's first host, or this machine
: "${MASTER_PORT:=29500}"
: "${MPIRUN:=mpirun}"
: "${MPI:=}"                           # openmpi or mpich; empty: what mpirun --version says
: "${PYTHON:=$(command -v python)}"    # the full path, the same on all hosts
read -ra exports <<< "${EXPORTS:-}"    # names of variables for all ranks; MPICH exports the whole environment
read -ra extra <<< "${EXTRA:-}"        # more options for mpirun
# End of settings
set -u
: "${1:?usage: launch/mpi.sh CONFIG [section.key=value ...]}"
hosts=''
if [[ -n $HOSTFILE ]]; then
  hosts=$(awk '{ sub(/#.*/, ""); sub(/slots=/, "") } NF { print $1 ":" $2 }' "$HOSTFILE" | paste -s -d, -) || exit 1
  IFS=, read -ra each <<< "$hosts"
  NODES=${#each[@]} PROCESSES_PER_NODE=${each[0]#*:} MASTER_ADDR=${MASTER_ADDR:-${each[0]%:*}}
fi
export MASTER_PORT TTY_COMPATIBLE="${TTY_COMPATIBLE:-0}" # Open MPI gives ranks a terminal where there is none
exports+=(MASTER_PORT TTY_COMPATIBLE)
if [[ -n $MASTER_ADDR ]]; then export MASTER_ADDR; exports+=(MASTER_ADDR); else unset MASTER_ADDR; fi

case ${MPI:-$("$MPIRUN" --version 2>&1)} in
  openmpi | *"Open MPI"* | *OpenRTE*)
    options=(-np "$((NODES * PROCESSES_PER_NODE))" --map-by "ppr:$PROCESSES_PER_NODE:node" --bind-to none --wdir "$PWD")
    for name in "${exports[@]}"; do options+=(-x "$name"); done
    if [[ -n $hosts ]]; then options+=(--host "$hosts"); fi
    ;;
  mpich | *HYDRA* | *MPICH*)
    options=(-n "$((NODES * PROCESSES_PER_NODE))" -ppn "$PROCESSES_PER_NODE" -wdir "$PWD")
    if [[ -n $hosts ]]; then options+=(-hosts "$hosts"); fi
    ;;
  *) echo "$MPIRUN is neither Open MPI nor MPICH: set MPI=openmpi or MPI=mpich" >&2; exit 2 ;;
esac
exec "$MPIRUN" "${options[@]}" "${extra[@]}" "$PYTHON" -m roots_dist "$COMMAND" "$@"
