"""The preprocessors: what each one sees in a picture, and what the ones without weights say."""

import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from transformers import DPTConfig, DPTForDepthEstimation, VitPoseConfig, VitPoseForPoseEstimation
from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil
from transformers.models.vitpose.image_processing_pil_vitpose import VitPoseImageProcessorPil

from models.errors import InvalidRequest, NotFound
from models.images import Picture
from models.preprocessors import NAMES, preprocess
from models.preprocessors.pose import draw

WITHOUT_WEIGHTS = ("blur", "canny", "invert", "lineart", "none", "scribble", "sketch", "threshold", "tile")
WITH_WEIGHTS = ("depth", "pose")


def square(inside=(220, 40, 40), outside=(40, 40, 220)) -> Picture:
    """A square from 32 to 96 in a picture 128 high and 160 wide; its two colours are equally bright."""
    pixels = np.full((128, 160, 3), outside, np.uint8)
    pixels[32:96, 32:96] = inside
    return Picture.from_array(pixels)


def outline(picture: Picture) -> np.ndarray:
    """Where the square's rim is, 5 pixels to either side."""
    mask = np.zeros((picture.height, picture.width), bool)
    mask[27:101, 27:101] = True
    mask[37:91, 37:91] = False
    return mask


def test_the_names_are_the_modules():
    assert set(NAMES) == {*WITHOUT_WEIGHTS, *WITH_WEIGHTS}


@pytest.mark.parametrize("name", WITHOUT_WEIGHTS)
def test_a_hint_has_the_pictures_size_and_is_the_same_every_time(name):
    before = square()
    first, second = preprocess(name, before), preprocess(name, square())
    assert (first.width, first.height) == (160, 128)
    assert first == second
    assert before == square()


@pytest.mark.parametrize("name", ["canny", "scribble", "sketch"])
def test_outlines_are_white_on_black_even_between_equally_bright_colours(name):
    hint = preprocess(name, square()).array()
    rim = outline(square())
    assert (hint[..., 0] == hint[..., 1]).all()
    assert hint[~rim].max() < 30
    assert hint[rim].max() > 200
    rows = hint[40:88, 29:35, 0].max(1)
    assert (rows > 100).all(), "the left edge is whole"


def test_canny_is_opencvs_own():
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    picture = Picture.from_array(noise).resized(128, 128)
    edges = preprocess("canny", picture).array()
    assert set(np.unique(edges)) == {0, 255}
    assert np.array_equal(edges[..., 2], cv2.Canny(picture.array(), 100, 200))


def test_lineart_finds_dark_lines_and_invert_turns_them():
    pixels = np.full((128, 128, 3), 250, np.uint8)
    pixels[60:63, 10:118] = 20
    drawing = Picture.from_array(pixels)
    lines = preprocess("lineart", drawing).array()
    assert lines[61, 20:100].min() > 240
    assert lines[:40].max() < 15
    assert np.array_equal(preprocess("invert", drawing).array(), 255 - pixels)


def test_a_flat_picture_has_no_lines():
    flat = Picture.from_array(np.full((64, 64, 3), 90, np.uint8))
    for name in ("canny", "scribble", "sketch", "lineart"):
        assert not preprocess(name, flat).array().any(), name


def test_threshold_splits_light_from_dark():
    hint = preprocess("threshold", square(inside=(250, 250, 250), outside=(30, 30, 30))).array()
    assert (hint[33:95, 33:95] == 255).all()
    assert (hint[:31] == 0).all()


@pytest.mark.parametrize("name", ["blur", "tile"])
def test_detail_goes_and_layout_stays(name):
    grain = np.random.default_rng(1).integers(-30, 31, (128, 160, 1))
    picture = Picture.from_array((square().array().astype(int) + grain).clip(0, 255).astype(np.uint8))
    hint = preprocess(name, picture).array().astype(int)
    assert np.abs(hint[60:68, 60:68] - np.array([220, 40, 40])).max() < 20
    assert hint[10:20, 10:150].std(0).mean() < picture.array()[10:20, 10:150].astype(float).std(0).mean() / 2


def test_a_picture_that_is_a_hint_already_is_left_alone():
    picture = square()
    assert preprocess("none", picture) is picture


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (64, 8)])
@pytest.mark.parametrize("name", WITHOUT_WEIGHTS)
def test_odd_sizes_are_taken(name, size):
    width, height = size
    hint = preprocess(name, Picture.from_array(np.zeros((height, width, 3), np.uint8)))
    assert (hint.width, hint.height) == size


def test_an_unknown_name_says_which_there_are():
    with pytest.raises(NotFound, match="canny"):
        preprocess("os", square())


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_without_weights_it_says_what_to_do(name):
    with pytest.raises(InvalidRequest, match="none are registered") as refused:
        preprocess(name, square())
    assert refused.value.field == "preprocessor"
    assert "none" in refused.value.message


@pytest.fixture(scope="module")
def depth_model(tmp_path_factory):
    """A DPT of the real class and layout, tiny and untrained."""
    torch.manual_seed(0)
    config = DPTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=64,
        patch_size=16,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        is_hybrid=False,
        initializer_range=0.5,  # with the usual one the untrained estimate is nowhere above 0
    )
    folder = tmp_path_factory.mktemp("depth")
    DPTForDepthEstimation(config).save_pretrained(folder)
    DPTImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def test_depth_uses_the_registered_model(depth_model):
    hint = preprocess("depth", square(), {"depth": depth_model})
    assert (hint.width, hint.height) == (160, 128)
    assert (hint.array()[..., 0] == hint.array()[..., 1]).all()
    assert hint.array().min() == 0
    assert hint.array().max() == 255


def test_depth_refuses_another_kind_of_model(depth_model, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InvalidRequest, match="dpt"):
        preprocess("depth", square(), {"depth": tmp_path})
    with pytest.raises(InvalidRequest, match="missing"):
        preprocess("depth", square(), {"depth": tmp_path / "nothing"})


def test_preprocessing_without_weights_loads_no_torch():
    program = (
        "import sys, numpy as np\n"
        "from models.images import Picture\n"
        "from models.preprocessors import preprocess\n"
        f"for name in {WITHOUT_WEIGHTS}: preprocess(name, Picture.from_array(np.zeros((64, 64, 3), np.uint8)))\n"
        "print(*{'torch', 'transformers', 'diffusers'} & sys.modules.keys())"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert not ran.stdout.strip()


def test_a_pose_is_drawn_as_openpose_draws_it():
    keypoints = np.zeros((17, 2))
    scores = np.zeros(17)
    for number, point in {5: (90, 40), 6: (30, 40), 8: (20, 70), 0: (60, 15)}.items():  # shoulders, right elbow, nose
        keypoints[number], scores[number] = point, 0.9
    picture = draw(keypoints, scores, 128, 128)
    assert tuple(picture[40, 60]) == (255, 85, 0), "the neck, between the shoulders"
    assert picture[28, 60].any(), "the line from the neck to the nose"
    assert not picture[80:].any(), "nothing where the estimate is unsure"


def test_pose_uses_the_registered_model(tmp_path):
    torch.manual_seed(0)
    backbone = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "model_type": "vitpose_backbone"}
    config = VitPoseConfig(backbone_config=backbone, num_labels=17, use_simple_decoder=True, scale_factor=4)
    VitPoseForPoseEstimation(config).save_pretrained(tmp_path)
    VitPoseImageProcessorPil().save_pretrained(tmp_path)
    hint = preprocess("pose", square(), {"pose": tmp_path})
    assert (hint.width, hint.height) == (160, 128)
