"""The clients that people write by habit (curl and jq, Python's requests, Node's fetch) run with host and key replaced.

Everything is as in the published examples, but for the steps: a quarter of them, or this would be the heaviest work of
the suite.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.acceptance.conftest import Server, look_at
from tests.acceptance.test_documents import node

# The published Python client waits 60 s, which two cores that others use as well cannot promise.
TIMEOUT_S = 600
STEPS = re.compile(r'(?<=steps)("?: )(\d+)')

CURL = """
curl -sS -X POST \\
  $BASE/v1/generate \\
  -H "Authorization: Bearer $SD_API_KEY" \\
  -H "Content-Type: application/json" \\
  -d '{
    "model": "sdxl",
    "prompt": "a portrait of a red fox in natural light",
    "negative_prompt": "low quality, blurry",
    "steps": 30,
    "guidance_scale": 7.0,
    "width": 768,
    "height": 768,
    "seed": 123456,
    "samples": 1,
    "output_format": "png"
  }' --output response.json
jq -r '.images[0].base64' response.json | base64 --decode > fox.png
"""

REQUESTS = """
import os, base64, requests

API_KEY = os.getenv("SD_API_KEY")
url = os.environ["BASE"] + "/v1/generate"
payload = {
    "model": "sdxl",
    "prompt": "a city at twilight, seen from above",
    "negative_prompt": "lowres, deformed",
    "steps": 28,
    "guidance_scale": 6.5,
    "width": 1024,
    "height": 1024,
    "samples": 2,
}
headers = {"Authorization": f"Bearer {API_KEY}", "Content-Type": "application/json"}
r = requests.post(url, json=payload, headers=headers, timeout=TIMEOUT)
r.raise_for_status()
resp = r.json()
for i, img in enumerate(resp.get("images", [])):
    data = base64.b64decode(img["base64"]) if "base64" in img else None
    if data:
        with open(f"out_{i}.png", "wb") as f:
            f.write(data)
    else:
        print("Image URL:", img.get("url"))
"""

FETCH = """
import fs from 'node:fs/promises';

const API_KEY = process.env.SD_API_KEY;
const r = await fetch(process.env.BASE + '/v1/generate', {
  method: 'POST',
  headers: {'Authorization': `Bearer ${API_KEY}`, 'Content-Type': 'application/json'},
  body: JSON.stringify({
    model: 'sdxl',
    prompt: 'a photo of a mug on linen',
    negative_prompt: 'text, watermark',
    steps: 24,
    guidance_scale: 5.5,
    width: 768,
    height: 512
  })
});
if (!r.ok) throw new Error(await r.text());
const data = await r.json();
if (data.images?.[0]?.base64) {
  await fs.writeFile('mug.png', Buffer.from(data.images[0].base64, 'base64'));
} else if (data.images?.[0]?.url) {
  console.log('Image URL:', data.images[0].url);
}
"""


@pytest.mark.timeout(TIMEOUT_S + 60)
@pytest.mark.parametrize(
    ("language", "pictures"),
    [
        ("curl", {"fox.png": (768, 768)}),
        ("fetch", {"mug.png": (768, 512)}),
        ("requests", {"out_0.png": (1024, 1024), "out_1.png": (1024, 1024)}),
    ],
)
def test_a_client_written_by_habit_runs(
    server: Server, tmp_path: Path, language: str, pictures: dict[str, tuple[int, int]]
):
    source = {"curl": CURL, "requests": REQUESTS.replace("TIMEOUT", str(TIMEOUT_S)), "fetch": FETCH}[language]
    source, changed = STEPS.subn(lambda said: f"{said[1]}{int(said[2]) // 4}", source)
    assert changed == 1
    script = tmp_path / {"curl": "client.sh", "requests": "client.py", "fetch": "client.mjs"}[language]
    script.write_text(source)
    command = {"curl": ["bash", "-eu"], "requests": [sys.executable], "fetch": [node()]}[language]
    environment = {"BASE": server.address, "SD_API_KEY": "any", "PATH": "/usr/local/bin:/usr/bin:/bin"}
    ran = subprocess.run(
        [*command, script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert ran.returncode == 0, ran.stderr
    for name, size in pictures.items():
        assert look_at(tmp_path / name) == ("PNG", size)
