"""What is drawn anew and how it goes back: exact outside the mask, and diffusers' own numbers for masks and crops."""

from itertools import product

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from scipy import ndimage

from models.canvas import Canvas, plan
from models.errors import InvalidRequest
from models.images import Picture
from models.parts import Outpaint
from models.request import EffectiveRequest

SIDE = 128
MASKS = VaeImageProcessor(vae_scale_factor=8, do_normalize=False, do_binarize=True, do_convert_grayscale=True)
PICTURES = VaeImageProcessor(vae_scale_factor=8)


def photo(width: int = SIDE, height: int = SIDE, seed: int = 0) -> Picture:
    """Noise: no pixel is like its neighbours, so that nothing moves unseen."""
    return Picture.from_array(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def masked(box: tuple[int, int, int, int], width: int = SIDE, height: int = SIDE, grey: int = 255) -> Picture:
    """Black with a rectangle of left, top, right, bottom."""
    left, top, right, bottom = box
    array = np.zeros((height, width, 3), np.uint8)
    array[top:bottom, left:right] = grey
    return Picture.from_array(array)


def planned(image: Picture, mask: Picture | None = None, **options) -> Canvas:
    size = {"width": image.width - image.width % 8, "height": image.height - image.height % 8}
    soft = {"mask_blur": 0, "mask_grow": 0, "mask_fill": "original", "mask_region": "whole", "mask_padding": 0}
    ask = {"model": "sd15", "prompt": "", "image": image, "mask": mask, **size, **soft, **options}
    return plan(EffectiveRequest(**ask), image)


def pasted(canvas: Canvas, seed: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """What was drawn, and the picture with it in."""
    drawn = photo(canvas.picture.width, canvas.picture.height, seed).array()
    return drawn, canvas.paste(drawn)


def white(mask: Picture) -> np.ndarray:
    return mask.array()[..., 0] > 0


def distance(region: np.ndarray, metric: str = "chessboard") -> np.ndarray:
    """Pixels from each place to the region."""
    if metric == "euclidean":
        return ndimage.distance_transform_edt(~region)
    return ndimage.distance_transform_cdt(~region, metric)


def grey(mask: Picture) -> Image.Image:
    return Image.fromarray(mask.array()).convert("L")


def random_masks(count: int, width: int = SIDE, height: int = SIDE) -> list[Picture]:
    rng = np.random.default_rng(3)
    masks = []
    for _ in range(count):
        left, top = rng.integers(0, width - 9), rng.integers(0, height - 9)
        right, bottom = rng.integers(left + 8, width) + 1, rng.integers(top + 8, height) + 1
        masks.append(masked((left, top, right, bottom), width, height))
    return masks


# Going back


@pytest.mark.parametrize("region", ["whole", "masked"])
@pytest.mark.parametrize("mask", random_masks(6), ids=range(6))
def test_outside_the_mask_the_picture_is_the_input_and_inside_it_is_new(mask, region):
    image = photo()
    drawn, result = pasted(planned(image, mask, mask_region=region))
    assert np.array_equal(result[~white(mask)], image.array()[~white(mask)])
    assert (result[white(mask)] != image.array()[white(mask)]).any(-1).mean() > 0.9
    if region == "whole":
        assert np.array_equal(result[white(mask)], drawn[white(mask)])


@pytest.mark.parametrize("blur", [1, 4, 10, 20])
def test_blur_reaches_three_times_its_sigma_and_no_farther(blur):
    image, mask = photo(256, 256), masked((100, 100, 250, 250), 256, 256)
    drawn, result = pasted(planned(image, mask, mask_blur=blur))
    changed = (result != image.array()).any(-1)
    away = distance(white(mask))
    assert not changed[away > 3 * blur].any()
    assert changed[(away > 0) & (away <= blur)].mean() > 0.9
    deep = distance(~white(mask)) > 3 * blur
    assert np.array_equal(result[deep], drawn[deep])


def test_blur_is_a_gaussian():
    canvas = planned(photo(), masked((0, 0, 64, SIDE)), mask_blur=8)
    exact = ndimage.gaussian_filter1d((np.arange(SIDE) < 64) * 255.0, 8, mode="nearest")
    assert np.abs(canvas.cover[64] - exact).max() < 4


@pytest.mark.parametrize("grow", [1, 5, 100])
def test_growing_moves_every_edge_outwards(grow):
    mask = masked((60, 60, 70, 65))
    assert np.array_equal(planned(photo(), mask, mask_grow=grow).cover > 0, distance(white(mask)) <= grow)


@pytest.mark.parametrize(("level", "drawn_anew"), [(127, False), (128, True), (200, True)])
def test_grey_is_cut_at_one_half_for_the_latents_and_kept_in_the_paste(level, drawn_anew):
    array = masked((0, 0, 32, 32)).array().copy()
    array[64:96, 64:96] = level
    image = photo()
    canvas = planned(image, Picture.from_array(array))
    assert canvas.latent_mask(8)[8:12, 8:12].all() == drawn_anew
    drawn, result = pasted(canvas)
    mixed = (image.array() * (255.0 - level) + drawn * float(level)) / 255
    assert np.abs(result - mixed)[64:96, 64:96].max() <= 0.5 + 1e-6


@pytest.mark.parametrize("region", ["whole", "masked"])
@pytest.mark.parametrize(("width", "height"), [(130, 133), (200, 96), (64, 300)])
def test_what_is_drawn_at_another_size_goes_back_at_the_inputs_own(width, height, region):
    image, mask = photo(width, height), masked((20, 30, 60, 70), width, height)
    canvas = planned(image, mask, width=SIDE, height=SIDE, mask_region=region, mask_blur=2)
    assert (canvas.picture.width, canvas.picture.height, canvas.mask.shape) == (SIDE, SIDE, (SIDE, SIDE))
    _, result = pasted(canvas)
    assert result.shape == (height, width, 3)
    outside = distance(white(mask)) > 6
    assert np.array_equal(result[outside], image.array()[outside])


def test_an_all_white_mask_draws_everything():
    canvas = planned(photo(), masked((0, 0, SIDE, SIDE)), mask_blur=4)
    drawn, result = pasted(canvas)
    assert canvas.latent_mask(8).all()
    assert np.array_equal(result, drawn)


# As diffusers does it


@pytest.mark.parametrize("size", [(128, 128), (96, 160)])
def test_the_latent_mask_has_diffusers_numbers(size):
    width, height = size
    for seed in range(5):
        coarse = np.random.default_rng(seed).integers(0, 256, (9, 7), dtype=np.uint8)
        levels = np.asarray(Image.fromarray(coarse).resize((128, 128), Image.Resampling.BICUBIC))
        mask = Picture.from_array(np.repeat(levels[..., None], 3, 2))
        pixels = MASKS.preprocess(grey(mask), height=height, width=width)
        latents = torch.nn.functional.interpolate(pixels, size=(height // 8, width // 8))
        canvas = planned(photo(), mask, width=width, height=height)
        assert np.array_equal(canvas.latent_mask(8), latents[0, 0].numpy())
        assert np.array_equal(canvas.mask >= 128, pixels[0, 0].numpy() == 1)


def test_the_region_is_diffusers_region():
    rng = np.random.default_rng(5)
    for mask in random_masks(150, 160, 112):
        width, height = (int(8 * side) for side in rng.integers(8, 33, 2))
        padding = int(rng.integers(0, 60))
        canvas = planned(photo(160, 112), mask, width=width, height=height, mask_region="masked", mask_padding=padding)
        assert canvas.box == MASKS.get_crop_region(grey(mask), width, height, pad=padding)


CROPS = list(product([(40, 40, 60, 50), (0, 0, 30, 100), (5, 90, 155, 110), (0, 0, 160, 112)], [0, 7, 32]))


@pytest.mark.parametrize(("box", "padding"), CROPS)
@pytest.mark.parametrize("size", [(128, 128), (64, 200)])
def test_a_region_drawn_alone_is_cut_out_and_put_back_as_diffusers_does_it(box, padding, size):
    width, height = size
    image, mask = photo(160, 112), masked(box, 160, 112)
    canvas = planned(image, mask, width=width, height=height, mask_region="masked", mask_padding=padding)
    coordinates = MASKS.get_crop_region(grey(mask), width, height, pad=padding)
    cut = {"height": height, "width": width, "crops_coords": coordinates, "resize_mode": "fill"}
    original = Image.fromarray(image.array())
    pixels = (PICTURES.preprocess(original, **cut)[0].permute(1, 2, 0).numpy() / 2 + 0.5) * 255
    assert np.abs(canvas.picture.array() - pixels).max() < 0.01
    assert np.array_equal(canvas.mask >= 128, MASKS.preprocess(grey(mask), **cut)[0, 0].numpy() == 1)
    drawn, result = pasted(canvas)
    overlaid = MASKS.apply_overlay(grey(mask), original, Image.fromarray(drawn), coordinates)
    assert np.array_equal(result, np.asarray(overlaid))


# Outpainting

BORDERS = [
    Outpaint(right=64),
    Outpaint(left=20, right=12, top=9, bottom=15),
    Outpaint(top=3, bottom=5),
    Outpaint(left=200, top=200),
]


def grown(image: Picture, border: Outpaint, **options) -> Canvas:
    width, height = image.width + border.left + border.right, image.height + border.top + border.bottom
    return planned(image, outpaint=border, width=width, height=height, **options)


def old_part(image: Picture, border: Outpaint) -> tuple[slice, slice]:
    return slice(border.top, border.top + image.height), slice(border.left, border.left + image.width)


@pytest.mark.parametrize("border", BORDERS, ids=str)
def test_outpainting_keeps_the_old_picture_and_draws_all_that_is_new(border):
    image = photo()
    canvas = grown(image, border)
    drawn, result = pasted(canvas)
    old = old_part(image, border)
    assert result.shape[:2] == (SIDE + border.top + border.bottom, SIDE + border.left + border.right)
    assert np.array_equal(result[old], image.array())
    new = np.ones(result.shape[:2], bool)
    new[old] = False
    assert np.array_equal(result[new], drawn[new])
    assert canvas.latent_mask(8).repeat(8, 0).repeat(8, 1)[new].all(), "a latent keeps something that is new"
    assert not canvas.latent_mask(8).all()


@pytest.mark.parametrize(("grow", "blur"), [(16, 0), (0, 4), (16, 4)])
def test_outpainting_may_overlap_the_old_picture(grow, blur):
    image, border = photo(), Outpaint(right=64)
    drawn, result = pasted(grown(image, border, mask_grow=grow, mask_blur=blur))
    kept = SIDE - grow - 3 * blur
    assert np.array_equal(result[:, :kept], image.array()[:, :kept])
    assert (result[:, SIDE - grow - blur : SIDE] != image.array()[:, SIDE - grow - blur :]).any()
    assert np.array_equal(result[:, SIDE:], drawn[:, SIDE:])


def test_outpainting_takes_a_mask_too():
    image, mask, border = photo(), masked((10, 10, 40, 40)), Outpaint(left=64)
    drawn, result = pasted(planned(image, mask, outpaint=border, width=192, height=128))
    edited = np.pad(white(mask), ((0, 0), (64, 0)), constant_values=True)
    assert np.array_equal(result[edited], drawn[edited])
    assert np.array_equal(result[:, 64:][~white(mask)], image.array()[~white(mask)])


# What stands in the masked part at first


def two_colours() -> Picture:
    array = np.full((SIDE, SIDE, 3), (200, 30, 30), np.uint8)
    array[:, SIDE // 2 :] = (30, 30, 200)
    return Picture.from_array(array)


@pytest.mark.parametrize("fill", ["original", "noise", "nothing"])
def test_only_fill_changes_the_picture(fill):
    assert planned(photo(), masked((30, 30, 60, 60)), mask_fill=fill).picture == photo()


@pytest.mark.parametrize("blur", [0, 4])
def test_fill_hides_what_was_there_behind_the_colours_around_it(blur):
    mask = masked((8, 8, 120, 120))
    scribbled = two_colours().array().copy()
    scribbled[20:108, 20:108] = photo(88, 88).array()
    filled = [
        planned(image, mask, mask_fill="fill", mask_blur=blur).picture.array().astype(int)
        for image in (two_colours(), Picture.from_array(scribbled))
    ]
    beyond = distance(white(mask)) > 3 * blur
    assert np.array_equal(filled[0][beyond], two_colours().array()[beyond])
    assert np.array_equal(filled[0], filled[1])
    assert np.abs(filled[0][60:68, 20:30] - (200, 30, 30)).max() < 20
    assert np.abs(filled[0][60:68, 100:110] - (30, 30, 200)).max() < 20
    assert np.abs(np.diff(filled[0][:, :40], axis=0)).max() <= 2, "a step where all around is one colour"


def test_fill_with_nothing_around_it_is_grey():
    filled = planned(photo(), masked((0, 0, SIDE, SIDE)), mask_fill="fill").picture.array()
    assert np.abs(filled.astype(int) - 128).max() <= 1


@pytest.mark.parametrize("fill", ["original", "fill"])
def test_what_is_outpainted_continues_the_colours_at_the_border(fill):
    filled = grown(two_colours(), Outpaint(left=40, right=40), mask_fill=fill).picture.array().astype(int)
    assert np.abs(filled[:, :40] - (200, 30, 30)).max() <= 1
    assert np.abs(filled[:, -40:] - (30, 30, 200)).max() <= 1
    assert np.array_equal(filled[:, 40:-40], two_colours().array())


# Other pictures of the same


@pytest.mark.parametrize("region", ["whole", "masked"])
@pytest.mark.parametrize("mask", random_masks(4), ids=range(4))
def test_another_picture_is_cut_out_and_scaled_as_the_canvas_was(mask, region):
    canvas = planned(photo(), mask, mask_region=region, mask_padding=5, width=96, height=120)
    assert canvas.fitted(photo()) == canvas.picture
    assert canvas.fitted(photo().resized(2 * SIDE, SIDE)).array().shape == (120, 96, 3)


def test_another_picture_of_an_outpainted_one_is_of_all_that_it_grows_to():
    canvas = grown(photo(), Outpaint(left=40, top=8))
    whole = Picture.from_array(canvas.base)
    assert canvas.fitted(whole) == whole


# What is refused


@pytest.mark.parametrize(
    ("mask", "options", "says"),
    [
        (masked((0, 0, 9, 9), 100, SIDE), {}, "128x128, not 100x128"),
        (masked((0, 0, 0, 0)), {}, "nothing to edit"),
        (masked((0, 0, SIDE, SIDE), grey=127), {}, "nothing to edit: no pixel"),
        (masked((30, 30, 31, 31)), {"mask_blur": 64}, "mask_grow"),
        (masked((30, 30, 31, 31)), {"mask_blur": 64, "mask_region": "masked"}, "mask_grow"),
        (masked((33, 33, 39, 39)), {}, "too small"),
    ],
)
def test_a_mask_that_edits_nothing_is_refused(mask, options, says):
    with pytest.raises(InvalidRequest, match=says) as refused:
        planned(photo(), mask, **options)
    assert refused.value.field == "mask"


def test_what_lies_between_the_latents_can_be_drawn_alone_or_grown():
    mask = masked((33, 33, 39, 39))
    assert planned(photo(), mask, mask_region="masked", mask_padding=8).latent_mask(8).any()
    assert planned(photo(), mask, mask_grow=1).latent_mask(8).any()
