"""What a request to draw is answered: at once, as a stream of events, or with a job that will draw."""

from collections.abc import Awaitable, Callable
from functools import partial

from fastapi import Request
from fastapi.responses import Response

from app import wire
from app.dialects.native import answers, job_form, submission, visiting
from app.dialects.native.bodies import Delivered
from app.dialects.native.schemas import EVENTS
from app.experiments.enrolment import Enrolment
from app.jobs.job import Job, Submission
from app.jobs.service import Delivery
from app.service import Service
from models.request import GenerationRequest

Wanted = Callable[[], Awaitable[GenerationRequest]]


async def answer(
    request: Request, service: Service, body: Delivered, kind: str, media_type: str, wanted: Wanted
) -> Response:
    """What a body asks for, in the form that `async` and the media type ask for.

    `wanted` reads the request out of the body: not for one whose job is there already, by its idempotency key.
    """

    async def enrolled() -> Enrolment:
        return service.enrol(await wanted(), visiting.visit(request, body))

    delivery, as_urls = submission.delivery(request, body, media_type), body.response == "url"
    if delivery is not None:
        submit = partial(_submit, service, kind, enrolled)
        at_once = partial(_kept, service, media_type)
        return await submission.answer(request, service.jobs, delivery, body.asynchronous, submit, at_once)
    if as_urls:
        service.check_urls()
    drawing = await wire.unless_disconnected(request, enrolled())
    if media_type == EVENTS:
        return await wire.unless_disconnected(request, _stream(service, drawing, body.cache))
    generating = service.generate(drawing.request, cache=body.cache, urls=as_urls, shadows=drawing.shadows)
    result = await wire.unless_disconnected(request, generating)
    return await answers.response(result, media_type, await service.urls(result) if as_urls else None)


async def _submit(
    service: Service, kind: str, enrolled: Callable[[], Awaitable[Enrolment]], delivery: Delivery
) -> Submission:
    """A job has the arms of its submission, whenever it is drawn. Shadows are drawn beside what is answered at once."""
    return await service.submit(kind, (await enrolled()).request, delivery)


async def _kept(service: Service, media_type: str, job: Job) -> Response:
    """The answer of a job that drew, as it would have been at once."""
    if job.request["response"] == "url":
        told = await job_form.by_address(service.jobs, job)
        headers = answers.cache_headers(told["cached"]) | visiting.headers(visiting.arms_of(job))
        return wire.json_response(told, headers)
    return await answers.response(job_form.generation(job, await service.jobs.pictures(job)), media_type)


async def _stream(service: Service, wanted: Enrolment, cache: bool) -> Response:
    """Waits until a replica has taken the request on, so that a refusal is a status and not an event."""
    events = service.stream(wanted.request, cache=cache, shadows=wanted.shadows)
    headers = visiting.headers(visiting.arms(wanted.request))
    return wire.EventStream(answers.from_events(await anext(events), events), headers)
