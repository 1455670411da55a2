"""A job for Kubernetes: an Indexed Job with a headless service, which every cluster knows, or a TrainJob of Kubeflow's Trainer.

Job --plan--> manifest (forms/job.yaml, forms/trainjob.yaml) --kubectl apply
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from roots_dist.runs.launch.job import Job, Plan
from roots_dist.runs.launch.quoting import refused
from roots_dist.runs.launch.templates import render

LABEL = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
"""RFC 1035, as names of services and of their pods want it."""
FORMS = {"job": "job.yaml", "trainjob": "trainjob.yaml"}
PLACE = Path("/work")
"""Where the volume is mounted: the working folder of the images (docker/), from which relative paths of a config begin."""
PORT = 29400


def plan(job: Job, environ: Mapping[str, str]) -> Plan:
    wishes = job.wishes
    if wishes.kind not in FORMS:
        raise refused("--kind", wishes.kind, "job or trainjob", "choose one of the two")
    for option, value in (("--image", wishes.image), ("--claim", wishes.claim)):
        if value is None:
            what = (
                "an image with roots (docker/)"
                if option == "--image"
                else f"the volume claim with data and runs, mounted at {PLACE}"
            )
            raise refused(option, None, what, f"add {option} NAME")
    for option, value, longest in (
        ("--name", job.name, 50),
        ("--namespace", wishes.namespace, 63),
        ("--claim", wishes.claim, 63),
    ):
        if value is not None and (not LABEL.fullmatch(value) or len(value) > longest):
            raise refused(option, value, f"at most {longest} of a-z, 0-9 and -, a letter first", "choose such a name")
    if wishes.template is None and not Path(os.path.normpath(PLACE / job.folder)).is_relative_to(PLACE):
        expected = f"a folder below {PLACE}, where the claim is mounted: what a pod writes elsewhere is gone with it"
        raise refused("track.folder", str(job.folder), expected, f"name one from {PLACE} on, such as runs/{job.name}")
    values = {
        "job": job,
        "place": PLACE,
        "port": PORT,
        "launcher": (literal(wishes.python or "python"), "-m", "torch.distributed.run"),
        "agent": job.agent(),
        "meet": f"{job.name}-0.{job.name}:{PORT}",
        "command": tuple(map(literal, job.command)),
        "environ": {name: literal(value) for name, value in job.variables.items()},
    }
    file = job.files / f"{FORMS[wishes.kind]}"
    return Plan(
        command=(wishes.program or "kubectl", "apply", *wishes.extra, "-f", str(file)),
        files={file: render(FORMS[wishes.kind], wishes.template, values)},
        logs=f"kubectl --namespace {wishes.namespace} logs --prefix --follow --selector app.kubernetes.io/instance={job.name}",
        notes=(
            f"{job.words[0]}, its data and {job.folder} are looked for in the claim {wishes.claim}, below {PLACE}, where it hides "
            "what the image has; nothing here has checked that",
            f"one of this name that has ended stands in the way of the next: kubectl delete -f {shlex.quote(str(file))}",
        ),
    )


def literal(text: str) -> str:
    """Text in which Kubernetes replaces nothing: $(NAME) in commands and values is a variable, $$ is a dollar sign."""
    return text.replace("$", "$$")
