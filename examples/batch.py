"""Draws a contact sheet without a server: the engine in this process, eight requests sharing its steps."""

import io

from PIL import Image

from models import families
from models.card import ModelCard
from models.engine import Engine
from models.request import GenerationRequest

SOURCE = "models/embedded/sd15"
THINGS = ("a red circle", "two green stars", "a white ring", "a large pink heart", "three orange squares")
THINGS += ("a yellow triangle in the top left", "a small black cross", "a red star above a white circle")
GROUNDS = ("blue", "black", "striped purple", "white", "dotted green", "blue", "checkered yellow", "cyan")

card = ModelCard.read("sd15", "sd", SOURCE)
engine = Engine(families.load(family="sd", source=SOURCE), card)
prompts = [f"{thing} on a {ground} background" for thing, ground in zip(THINGS, GROUNDS, strict=True)]
requests = [GenerationRequest(model="sd15", prompt=p, steps=20 + n, seed=n) for n, p in enumerate(prompts)]
sheet = Image.new("RGB", (4 * card.width, 2 * card.height))
for n, [picture] in enumerate(engine.generate(requests)):
    sheet.paste(Image.open(io.BytesIO(picture.data)), (n % 4 * card.width, n // 4 * card.height))
sheet.save("sheet.png")
print(f"sheet.png: {sum(request.steps or 0 for request in requests)} steps in {engine.load().forwards} forwards")
