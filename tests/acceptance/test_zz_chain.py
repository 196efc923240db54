"""The chain through a real server: generate with upscale; one-off check."""
import base64, io, json, sys, time
sys.path.insert(0, '/tmp/h/upscale')
from PIL import Image
import httpx2, pytest
from tests.acceptance.conftest import *
def test_chain(server):
    a = httpx2.post(f"{server.address}/v1/generate", json={"prompt":"a red circle on a blue background","seed":7,"steps":8,"samples":2,"upscale":{"scale":2},"output_format":"jpeg","metadata":"full"}, timeout=300)
    print(a.status_code, a.text[:300])
    v = a.json()
    assert [(i["width"], i["height"], i["format"]) for i in v["images"]] == [(256,256,"jpeg")]*2
    data = base64.b64decode(v["images"][1]["base64"])
    im = Image.open(io.BytesIO(data)); assert (im.format, im.size) == ("JPEG", (256,256))
    m = httpx2.post(f"{server.address}/v1/metadata", content=data, timeout=30).json()
    print(m["parameters"])
    assert m["parameters"]["upscale"] == {"scale": 2.0, "model": "2x"} and m["parameters"]["seed"] == 8
    print(v["parameters"], v["timings"])
    r = httpx2.post(f"{server.address}/v1/generate", json={"prompt":"x","upscale":{"scale":2,"model":"no"}}, timeout=60); print(r.status_code, r.text)
    assert r.status_code == 404
    again = httpx2.post(f"{server.address}/v1/generate", json=m["parameters"] | {"metadata":"full"}, timeout=300).json()
    import numpy as np
    b = Image.open(io.BytesIO(base64.b64decode(again["images"][0]["base64"])))
    print("DIFF", np.abs(np.asarray(im).astype(int)-np.asarray(b)).max(), len(data))
    print(httpx2.get(f"{server.address}/v1/adapters", timeout=30).text)
