"""`POST /v1/feedback`, and for administrators `GET /v1/experiments`: outcomes in, reports out."""

import re
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from app import wire
from app.auth import scope
from app.dialects.native import visiting
from app.dialects.native.bodies import Wire
from app.dialects.native.schemas import body_schema
from app.experiments.experiments import Offered
from app.experiments.report import ArmReport, Report, report
from app.experiments.store import OUTCOMES, RATINGS, check_outcome
from app.jobs.states import State
from app.keys.caller import current
from app.service import Service
from models.errors import NotFound

_ADMIN = scope("admin")
_LOW, _HIGH = RATINGS
_ID = re.compile("[0-9a-f]{32}")


class FeedbackBody(Wire):
    """What became of what was drawn."""

    id: str = Field(max_length=64, description="The `id` or `receipt_id` of an answer, or a job's `job_id`")
    outcome: str = Field(description=f"One of {', '.join(OUTCOMES)}; of each kind, the last word counts")
    value: float | None = Field(None, description=f"Of a rating: {_LOW:g} to {_HIGH:g}")


def add(router: APIRouter, service: Service) -> None:
    """Adds the paths."""
    extra = body_schema(FeedbackBody, form=False)

    @router.post("/feedback", summary="Say what became of pictures of an experiment", openapi_extra=extra)
    async def feedback(request: Request) -> Response:
        body = await wire.read_json(request, FeedbackBody)
        outcome, value = check_outcome(body.outcome, body.value)
        id = await _generation(service, body.id)
        arms = await service.experiments.store.say(current.get().id, id, outcome, value)
        return wire.json_response({"id": body.id, "outcome": outcome, "value": body.value, **visiting.told(arms)})

    @router.get("/experiments", summary="The experiments and how their arms stand", openapi_extra=_ADMIN)
    async def experiments() -> Response:
        found = [from_offered(offered) for offered in service.experiments.all()]
        return wire.json_response({"object": "list", "data": found, "shadows_left_out": service.shadows.left_out})

    @router.get("/experiments/{name}", summary="What an experiment has come to", openapi_extra=_ADMIN)
    async def experiment(name: str) -> Response:
        offered = service.experiments.get(name)
        return wire.json_response(from_report(await report(service.experiments.store, offered)))


async def _generation(service: Service, id: str) -> str:
    """The id under which a generation is known: that of a job's result, where it is a job's. Raises NotFound."""
    if not _ID.fullmatch(id):  # which not every database would compare
        raise NotFound("there are no such ids; an answer's `id` and `receipt_id` have 32 hexadecimal digits")
    try:
        job = await service.jobs.get(id)
    except NotFound:  # of the job, or of all jobs: this server keeps none
        return id
    if job.state is not State.SUCCEEDED or not job.result:
        raise NotFound(f"job {id} has drawn nothing: it is {job.state}")
    return str(job.result.get("id", id))


def from_offered(offered: Offered) -> dict[str, Any]:
    """An experiment as it is configured, and what this gateway has switched off."""
    settings = offered.settings
    arms = {
        name: {"weight": arm.weight, "shadow": arm.shadow, "parameters": arm.decided, "rail": offered.rails.get(name)}
        for name, arm in settings.arms.items()
    }
    who = {"unit": settings.unit, "share": settings.share, "keys": list(settings.keys), "header": settings.header}
    rules = {"layer": settings.layer, "force": settings.force, "control": settings.control}
    return {
        "name": offered.name,
        "enabled": settings.enabled,
        "version": settings.version,
        **who,
        **rules,
        "arms": arms,
    }


def from_report(report: Report) -> dict[str, Any]:
    """A report: rates and differences are shares of 1, those of ratings stars, times seconds."""
    told = {name: getattr(report, name) for name in ("name", "version", "control", "confidence", "earlier")}
    check = {"p_value": report.mismatch_p, "mismatched": report.mismatched}
    return told | {"assignment": check, "arms": [_arm(arm) for arm in report.arms]}


def _arm(arm: ArmReport) -> dict[str, Any]:
    return asdict(arm) | {"error_rate": arm.errors / arm.exposures if arm.exposures else None}
