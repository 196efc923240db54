"""Follows one picture step by step: server-sent events, each an `event:` line and a `data:` line with JSON."""

import base64
import json
import os
from pathlib import Path

import requests

address = os.environ.get("HELIOGRAPH_URL", "http://127.0.0.1:8000")
body = {"prompt": "a yellow star on a purple background", "seed": 7, "stream": True}

with requests.post(f"{address}/v1/generate", json=body, timeout=120, stream=True) as answer:
    answer.raise_for_status()
    name = ""
    for line in answer.iter_lines(decode_unicode=True):
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            values = json.loads(line.removeprefix("data: "))
            print(name, values.get("step", ""))
            if name == "image":
                Path("star.png").write_bytes(base64.b64decode(values["base64"]))
