"""Draws two pictures through the API and prints what the server decided for each."""

import base64
import os
from pathlib import Path

import requests

address = os.environ.get("HELIOGRAPH_URL", "http://127.0.0.1:8000")
body = {"prompt": "a green square on a black background", "samples": 2, "seed": 7, "sampler": "DPM++ 2M Karras"}

answer = requests.post(f"{address}/v1/generate", json=body, timeout=120)
answer.raise_for_status()
result = answer.json()
for image in result["images"]:
    path = Path(f"square-{image['seed']}.png")
    path.write_bytes(base64.b64decode(image["base64"]))
    print(path, result["parameters"]["sampler"], result["timings"])
