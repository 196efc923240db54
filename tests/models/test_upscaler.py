"""Enlargement: networks told by their tensors, tiles without seams, alpha, limits, and that learning paid."""

import importlib
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from models import tiles, upscaler
from models.alpha import Layers
from models.embedded.upscalers import scores
from models.errors import Cancelled, GenerationFailed, InvalidRequest, NotFound
from models.esrgan import RRDB, Compact, build
from models.parts import Upscale
from models.upscaler import Upscaler
from models.upscaler_card import UpscalerCard

SHIPPED = Path(upscaler.__file__).parent / "embedded" / "upscalers"
RANDOM = np.random.default_rng(0)


def made(sources: dict[str, str], *, tile: int = 256, **limits: int) -> Upscaler:
    return Upscaler(UpscalerCard(names=("lanczos", *sources), **limits), sources, device="cpu", tile=tile)


@pytest.fixture(scope="module")
def shipped() -> dict[str, str]:
    return {name: str(SHIPPED / f"{name}.safetensors") for name in ("2x", "4x")}


@pytest.fixture(scope="module")
def esrgan(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An ESRGAN of random weights: its architecture has to be told from its tensors."""
    path = tmp_path_factory.mktemp("weights") / "esrgan.safetensors"
    torch.manual_seed(0)
    network = RRDB(8, blocks=1, growth=4, doublings=2)
    with torch.no_grad():  # as it is initialised it draws next to nothing
        network.conv_last.weight *= 10
        network.conv_last.bias += 0.5
    save_file(network.state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def scene() -> np.ndarray:
    """A picture of the world, uint8 (200, 300, 3)."""
    [picture] = scores.held_out(1)
    return np.asarray(picture.resize((300, 200)))


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def off_by(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.mark.parametrize(("scale", "size"), [(1, (300, 200)), (1.5, (450, 300)), (2, (600, 400)), (3.337, (1001, 667))])
def test_lanczos_is_always_there_at_any_scale(scene: np.ndarray, scale: float, size: tuple[int, int]):
    enlarged = made({}).upscale(png(scene), Upscale(scale=scale, model="lanczos"))
    expected = Image.fromarray(scene).resize(size, Image.Resampling.LANCZOS)
    assert off_by(enlarged.colour, np.asarray(expected)) == 0
    assert enlarged.size == size


def test_a_checkpoint_is_told_by_its_tensors(esrgan: str, scene: np.ndarray):
    small = scene[80:120, 130:182]
    enlarged = made({"mine": esrgan}).upscale(png(small), Upscale(scale=4, model="mine")).colour
    network = RRDB(8, blocks=1, growth=4, doublings=2)
    network.load_state_dict(load_file(esrgan))
    with torch.inference_mode():
        drawn = network(torch.from_numpy(small.astype(np.float32)).permute(2, 0, 1)[None] / 255)[0]
    assert off_by(enlarged, np.clip(np.rint(drawn.permute(1, 2, 0).numpy() * 255), 0, 255)) <= 1
    assert enlarged.std() > 1


LAYOUTS = {  # how others have named the same tensors: ours first
    "ESRGAN": (
        (r"body\.(\d+)\.rdb(\d)\.conv(\d)", r"model.1.sub.\1.RDB\2.conv\3.0"),
        (r"conv_body", "model.1.sub.2"), (r"conv_first", "model.0"), (r"conv_up\.0", "model.3"),
        (r"conv_up\.1", "model.6"), (r"conv_hr", "model.8"), (r"conv_last", "model.10"),
    ),
    "BSRGAN": (
        (r"body\.(\d+)\.rdb(\d)\.conv(\d)", r"RRDB_trunk.\1.RDB\2.conv\3"),
        (r"conv_body", "trunk_conv"), (r"conv_up\.0", "upconv1"), (r"conv_up\.1", "upconv2"), (r"conv_hr", "HRconv"),
    ),
    "Real-ESRGAN": ((r"conv_up\.0", "conv_up1"), (r"conv_up\.1", "conv_up2")),
    "wrapped": ((r"^", "module.params_ema."),),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("unshuffle", [1, 2])
def test_every_layout_of_esrgan_is_the_same_network(layout: str, unshuffle: int):
    torch.manual_seed(1)
    network = RRDB(8, blocks=2, growth=4, doublings=2, unshuffle=unshuffle)
    tensors = {}
    for name, tensor in network.state_dict().items():
        for pattern, theirs in LAYOUTS[layout]:
            name = re.sub(pattern, theirs, name)
        tensors[name] = tensor
    found = build(tensors)
    assert found is not None
    assert found.scale == 4 // unshuffle
    x = torch.rand(1, 3, 9, 7)
    torch.testing.assert_close(found(x), network(x))
    assert found(x).shape == (1, 3, 9 * found.scale, 7 * found.scale)


@pytest.mark.parametrize("make", [lambda: Compact(8, 2, 3), lambda: RRDB(8, 2, 32, 2), lambda: RRDB(8, 2, 32, 2, 2)])
def test_networks_draw_what_spandrels_draw(make: Any):
    spandrel = pytest.importorskip("spandrel")
    torch.manual_seed(2)
    network = make()
    tensors = {
        re.sub(r"conv_up\.(\d)", lambda m: f"conv_up{int(m[1]) + 1}", k): v for k, v in network.state_dict().items()
    }
    theirs = spandrel.MAIN_REGISTRY.load(tensors)
    x = torch.rand(1, 3, 16, 24)
    assert theirs.scale == network.scale
    with torch.inference_mode():
        torch.testing.assert_close(theirs.model(x), network(x), atol=1e-6, rtol=0)


def test_another_architecture_runs_through_spandrel(tmp_path: Path, scene: np.ndarray):
    pytest.importorskip("spandrel")
    architecture = importlib.import_module("spandrel.architectures.SPAN")
    torch.manual_seed(3)
    network = architecture.SPAN(num_in_ch=3, num_out_ch=3, feature_channels=8, upscale=2)
    save_file({name: tensor.clone() for name, tensor in network.state_dict().items()}, tmp_path / "span.safetensors")
    mine = {"mine": str(tmp_path / "span.safetensors")}
    assert made(mine).upscale(png(scene[:30, :40]), Upscale(scale=2, model="mine")).size == (80, 60)


@pytest.mark.parametrize("name", ["2x", "4x"])
def test_tiles_leave_no_seam(shipped: dict[str, str], scene: np.ndarray, name: str):
    wanted = Upscale(scale=int(name[0]), model=name)
    whole = made(shipped, tile=512).upscale(png(scene), wanted).colour
    tiled = made(shipped, tile=128).upscale(png(scene), wanted).colour
    assert off_by(whole, tiled) <= 1


def test_a_network_that_looks_further_than_a_tile_fades_over(esrgan: str, scene: np.ndarray):
    """ESRGAN's receptive field is wider than the context: no pixel jumps where one tile takes over from the next."""
    wanted = Upscale(scale=4, model="mine")
    whole = made({"mine": esrgan}, tile=512).upscale(png(scene), wanted).colour.astype(int)
    tiled = made({"mine": esrgan}, tile=128).upscale(png(scene), wanted).colour.astype(int)
    error = tiled - whole
    assert max(np.abs(np.diff(error, axis=axis)).max() for axis in (0, 1)) <= 2


@pytest.mark.parametrize("scale", [1.5, 2, 3, 8])
def test_a_network_of_another_scale_is_resized(shipped: dict[str, str], scene: np.ndarray, scale: float):
    both = made(shipped)
    enlarged = both.upscale(png(scene[:64, :64]), Upscale(scale=scale, model="2x")).colour
    native = both.upscale(png(scene[:64, :64]), Upscale(scale=2, model="2x")).colour
    side = round(64 * scale)
    expected = np.asarray(Image.fromarray(native).resize((side, side), Image.Resampling.LANCZOS))
    assert off_by(enlarged, expected) == 0


def test_the_smallest_pictures_are_pictures_too(shipped: dict[str, str], esrgan: str):
    for name in ("2x", "4x", "mine"):
        for height, width in ((1, 1), (1, 300), (3, 2)):
            pixels = np.full((height, width, 3), 90, np.uint8)
            enlarged = made(shipped | {"mine": esrgan}, tile=128).upscale(png(pixels), Upscale(scale=2, model=name))
            assert enlarged.size == (2 * width, 2 * height)


def test_alpha_is_kept_and_hidden_colours_stay_hidden(shipped: dict[str, str]):
    """Red where it is seen, green where nobody sees it: no green may come out at the border."""
    rgba = np.zeros((60, 80, 4), np.uint8)
    rgba[...] = (0, 255, 0, 0)
    rgba[15:45, 20:60] = (200, 30, 30, 255)
    enlarged = made(shipped).upscale(png(rgba), Upscale(scale=2, model="2x"))
    assert enlarged.alpha is not None
    expected = Image.fromarray(rgba[..., 3]).resize((160, 120), Image.Resampling.LANCZOS)
    assert off_by(enlarged.alpha, np.asarray(expected)) == 0
    seen = enlarged.colour[enlarged.alpha > 0]
    assert seen[:, 1].max() < 60
    for format in ("png", "webp"):
        with Image.open(io.BytesIO(enlarged.encode(format))) as image:
            assert (image.mode, image.size) == ("RGBA", (160, 120))
    with pytest.raises(InvalidRequest, match="transparency"):
        enlarged.encode("jpeg")


def test_what_has_alpha_besides_rgba_is_read():
    palette = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 4).convert("P")
    grey = Image.new("LA", (8, 8), (128, 128))
    for image, options in ((palette, {"transparency": 0}), (grey, {})):
        buffer = io.BytesIO()
        image.save(buffer, "PNG", **options)
        assert Layers.read(buffer.getvalue()).alpha is not None
    assert Layers.read(png(np.zeros((8, 8, 3), np.uint8))).alpha is None


def test_progress_is_told_by_tile_and_a_caller_may_leave_between_two(shipped: dict[str, str], scene: np.ndarray):
    told: list[tuple[int, int]] = []
    wanted = Upscale(scale=2, model="2x")
    one = made(shipped, tile=128)
    one.upscale(png(scene), wanted, on_tile=lambda done, total: told.append((done, total)))
    assert told == [(done, 8) for done in range(9)]
    told.clear()
    with pytest.raises(Cancelled):
        one.upscale(
            png(scene),
            wanted,
            on_tile=lambda done, total: told.append((done, total)),
            cancelled=lambda: len(told) == 3,
        )
    assert len(told) == 3


def test_limits_say_what_is_allowed(shipped: dict[str, str], scene: np.ndarray):
    small = made(shipped, max_input_pixels=60_000, max_output_pixels=250_000)
    with pytest.raises(InvalidRequest, match="660x440 of 300x200; allowed: 250000") as refused:
        small.upscale(png(scene), Upscale(scale=2.2, model="lanczos"))
    assert refused.value.field == "scale"
    with pytest.raises(InvalidRequest, match="1200x800"):  # what the network makes on the way
        small.upscale(png(scene), Upscale(scale=1.5, model="4x"))
    with pytest.raises(InvalidRequest, match="at most 60000") as refused:
        small.upscale(png(np.zeros((300, 300, 3), np.uint8)), Upscale(scale=1, model="lanczos"))
    assert refused.value.field == "image"
    for scale in (0.5, 8.1, float("nan")):
        with pytest.raises(InvalidRequest, match=r"between 1.0 and 8.0"):
            small.upscale(png(scene), Upscale(scale=scale))
    with pytest.raises(NotFound, match="lanczos, 2x, 4x"):
        small.upscale(png(scene), Upscale(scale=2, model="../2x"))
    with pytest.raises(InvalidRequest, match="readable"):
        small.upscale(b"no picture", Upscale(scale=2))
    with pytest.raises(InvalidRequest, match="multiple of 8"):
        made(shipped, tile=100)


def test_what_is_not_finite_is_no_picture(tmp_path: Path, scene: np.ndarray):
    weights = {name: tensor * float("nan") for name, tensor in Compact(4, 1, 4).state_dict().items()}
    save_file(weights, tmp_path / "nan.safetensors")
    with pytest.raises(GenerationFailed) as failed:
        made({"nan": str(tmp_path / "nan.safetensors")}).upscale(png(scene), Upscale(scale=4, model="nan"))
    assert failed.value.reason == "nan_latents"


def test_only_upscalers_in_safetensors_are_taken(tmp_path: Path):
    files = {
        "other.safetensors": {"a": torch.zeros(2)},
        "sharpener.safetensors": Compact(4, 1, 1).state_dict(),
        "grey.safetensors": Compact(4, 1, 2).state_dict() | {"body.0.weight": torch.zeros(4, 1, 3, 3)},
        "torn.safetensors": {
            name: tensor for name, tensor in Compact(4, 1, 4).state_dict().items() if name != "body.2.weight"
        },
    }
    for name, weights in files.items():
        save_file(weights, tmp_path / name)
    torch.save(files["sharpener.safetensors"], tmp_path / "pickled.pth")
    for name, word in (
        ("other.safetensors", "spandrel"),
        ("sharpener.safetensors", "does not enlarge"),
        ("grey.safetensors", "takes and gives RGB"),
        ("torn.safetensors", "cannot be loaded"),
        ("pickled.pth", "pickled weights can run code"),
        ("absent.safetensors", "absent"),
    ):
        with pytest.raises(InvalidRequest, match=word):
            made({"x": str(tmp_path / name)})


@pytest.mark.parametrize("length", [1, 48, 49, 127, 128, 129, 176, 209, 500])
def test_the_weights_of_tiles_add_up(length: int):
    covered = np.zeros(length * 2)
    found = tiles.spans(length, 128, 2)
    for span in found:
        assert span.stop - span.start <= 128
        covered[span.start * 2 : span.stop * 2] += span.weights
    assert found[0].start == 0
    assert found[-1].stop == length
    np.testing.assert_allclose(covered, 1, atol=1e-6)


def test_tiles_come_together_as_the_picture(scene: np.ndarray):
    def repeat(pixels: np.ndarray) -> np.ndarray:
        return pixels.repeat(3, 0).repeat(3, 1).astype(np.float32)

    assert off_by(tiles.enlarge(scene, 3, 128, repeat, lambda done, total: None), repeat(scene)) == 0


@pytest.mark.parametrize("by", ["area", "bicubic"])
@pytest.mark.parametrize("name", ["2x", "4x"])
def test_the_learned_upscalers_beat_lanczos(shipped: dict[str, str], name: str, by: str):
    both, pictures, scale = made(shipped), scores.held_out(6), int(name[0])
    learned = scores.score(both, name, scale, by, pictures)
    lanczos = scores.score(both, "lanczos", scale, by, pictures)
    assert learned[0] > lanczos[0] + {"2x": 4, "4x": 2}[name]  # dB
    assert learned[1] > lanczos[1]
    assert (SHIPPED / f"{name}.safetensors").stat().st_size < 2_000_000


def test_the_scores_are_those_of_the_papers():
    flat = np.full((64, 64, 3), 100, np.uint8)
    assert scores.psnr(flat, flat + 1) == pytest.approx(48.13, abs=0.01)
    assert scores.ssim(flat, flat) == pytest.approx(1)
    noisy = np.clip(flat + RANDOM.normal(0, 20, flat.shape), 0, 255).astype(np.uint8)
    assert scores.ssim(flat, noisy) < 0.3
