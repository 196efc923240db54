"""Who sends a request, and what it says itself, for the experiments that it may belong to; and what is told of them."""

from collections.abc import Mapping
from typing import Any

from fastapi import Request
from pydantic import BaseModel

from app.experiments.enrolment import Visit
from app.jobs.job import Job
from app.keys.caller import current
from models.request import GenerationRequest

EXPERIMENT_HEADER = "x-experiment"

Arms = Mapping[str, str]  # by experiment


def visit(request: Request, body: BaseModel) -> Visit:
    """A field that is given as null is not stated: the model decides it, or an arm."""
    stated = frozenset(name for name in body.model_fields_set if getattr(body, name) is not None)
    return Visit(caller=current.get(), headers=request.headers, stated=stated)


def arms(request: GenerationRequest) -> Arms:
    """Those that a request is drawn for."""
    return {use.experiment: use.arm for use in request.experiments}


def arms_of(job: Job) -> Arms:
    """Those that a job was put in when it was submitted. Of another version's job, which may say more, just these."""
    return {use["experiment"]: use["arm"] for use in job.request.get("request", {}).get("experiments", ())}


def told(arms: Arms) -> dict[str, Any]:
    """Arms as an answer's field; none where there are none."""
    return {"experiments": [{"name": name, "arm": arm} for name, arm in arms.items()]} if arms else {}


def headers(arms: Arms) -> dict[str, str]:
    """The same as a header, `name=arm` for each, with commas between."""
    return {EXPERIMENT_HEADER: ", ".join(f"{name}={arm}" for name, arm in arms.items())} if arms else {}
