"""Repaints the middle of a picture: a form with two files, where white in the mask is drawn anew."""

import base64
import io
import os
from pathlib import Path

import requests
from PIL import Image, ImageDraw

address = os.environ.get("HELIOGRAPH_URL", "http://127.0.0.1:8000")
scene = {"prompt": "a large red circle in the center on a blue background", "seed": 1}
photo = requests.post(f"{address}/v1/generate", json=scene, headers={"Accept": "image/png"}, timeout=120).content

mask, size = io.BytesIO(), Image.open(io.BytesIO(photo)).size
canvas = Image.new("L", size, "black")
ImageDraw.Draw(canvas).rectangle([size[0] // 4, size[1] // 4, size[0] * 3 // 4, size[1] * 3 // 4], fill="white")
canvas.save(mask, "PNG")

files = {"image": photo, "mask": mask.getvalue()}
wanted = {"prompt": "a large green square in the center on a blue background", "seed": 2}
answer = requests.post(f"{address}/v1/inpaint", data=wanted, files=files, timeout=120)
answer.raise_for_status()
Path("inpainted.png").write_bytes(base64.b64decode(answer.json()["images"][0]["base64"]))
print("inpainted.png", answer.json()["parameters"])
