"""Heliograph's own API: pictures under `/v1`, and lists of what can be asked for.

A module for each direction: `bodies` and `forms` read, `requests` converts, `answers` writes, `routes` ties them
together.
"""

from app.dialects.native.answers import from_event, from_model, from_result, parameters
from app.dialects.native.bodies import STREAM_PREVIEW_EVERY, GenerateBody
from app.dialects.native.requests import to_request
from app.dialects.native.routes import routes
from app.dialects.native.webhooks import payload

__all__ = [
    "STREAM_PREVIEW_EVERY",
    "GenerateBody",
    "from_event",
    "from_model",
    "from_result",
    "parameters",
    "payload",
    "routes",
    "to_request",
]
