"""Textual inversion: learned words by name, as diffusers has them, in the prompts that name them and no others."""

import shutil

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models.adapters.textual_inversion import TextualInversion
from models.errors import InvalidRequest
from models.prompt import Span
from models.registered import Adapters
from models.request import GenerationRequest
from models.tokens import Wording, cut, named
from tests.models.conftest import bare, folder, loaded_family, new_engine, pipeline
from tests.models.test_parity import drawn


def learned(count: int, seed: int, width: int = 128) -> torch.Tensor:
    """Embeddings as long as those of real words, (count, width)."""
    known = pipeline("sd15").text_encoder.get_input_embeddings().weight
    vectors = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return vectors * known.norm(dim=1).mean() / vectors.norm(dim=1, keepdim=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The three layouts: A1111's with one vector, diffusers' with three, SDXL's with two for each encoder."""
    made = tmp_path_factory.mktemp("inversions")
    tensors = {
        "easy-zorp": {"emb_params": learned(1, 1)},
        "quux": {"<quux>": learned(3, 2)},
        "flarb": {"clip_l": learned(2, 3), "clip_g": learned(2, 4)},
    }
    for name, content in tensors.items():
        save_file(content, made / f"{name}.safetensors")
    return made


@pytest.fixture(scope="module")
def inversions(files):
    return {path.stem: TextualInversion.read(path.stem, path.read_bytes()) for path in files.iterdir()}


def engine(model: str, inversions):
    made = Adapters(loaded_family(model))
    made.inversions = inversions
    return new_engine(model, adapters=made)


def ask(prompt: str, model: str = "sd15", **fields) -> GenerationRequest:
    fields = {"steps": 4, "seed": 2, "sampler": "ddim", "guidance_scale": 5.0} | fields
    return GenerationRequest(model=model, prompt=prompt, **fields)


def pictures(engine, *requests: GenerationRequest) -> list[np.ndarray]:
    return [drawn(finished.data) for [finished] in engine.generate(requests)]


def by_diffusers(pipe, request: GenerationRequest) -> np.ndarray:
    config = dict(pipeline(request.model).scheduler.config)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(config)
    image = pipe(
        request.prompt,
        negative_prompt=request.negative_prompt or None,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(request.seed),
        height=128,
        width=128,
    ).images[0]
    return np.asarray(image).astype(int)


def fresh(model: str):
    """A pipeline of its own: diffusers writes inversions into tokenizer and encoder."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder(model), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_inversions_draw_what_diffusers_draws(inversions):
    pipe = fresh("sd15")
    pipe.load_textual_inversion({"<easy-zorp>": inversions["easy-zorp"].vectors[0]})
    pipe.load_textual_inversion({"<quux>": inversions["quux"].vectors[0]})
    requests = [
        ask("a <quux> on a blue background"),
        ask("a red circle", negative_prompt="<quux>, <easy-zorp>"),
        ask("a <easy-zorp> , a <quux>"),
    ]
    ours = pictures(engine("sd15", inversions), *requests, ask("a red circle"))
    for request, own in zip(requests, ours, strict=False):
        assert np.abs(own - by_diffusers(pipe, request)).max() <= 1, request.prompt
    [without] = pictures(new_engine("sd15"), ask("a red circle"))
    assert np.abs(ours[-1] - without).max() <= 1, "the neighbour that names none"
    assert np.abs(ours[1] - without).max() > 20


def test_both_encoders_of_sdxl_get_theirs(inversions):
    pipe = fresh("sdxl")
    for k, suffix in enumerate(("", "_2")):
        pipe.load_textual_inversion(
            {"<flarb>": inversions["flarb"].vectors[k]},
            tokenizer=getattr(pipe, f"tokenizer{suffix}"),
            text_encoder=getattr(pipe, f"text_encoder{suffix}"),
        )
    request = ask("a red <flarb> on a blue background", "sdxl")
    [ours] = pictures(engine("sdxl", inversions), request)
    assert np.abs(ours - by_diffusers(pipe, request)).max() <= 1


def test_it_leaves_no_trace(inversions):
    family = loaded_family("sd15")
    before = family.embed([Wording.plain("a quux")], bare)
    family.embed([Wording(((Span("a quux"),),), inversions=(("quux", inversions["quux"]),))], bare)
    assert torch.equal(family.embed([Wording.plain("a quux")], bare)[0].context, before[0].context)
    assert not family._text_encoder.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a <quux>", {"quux"}),
        ("a quux, easy-zorp.", {"quux", "easy-zorp"}),
        ("a QUUX", {"quux"}),
        ("quuxes zorp easy -quux- quux_ a.quux", set()),
        ("<unknown> <quux", {"quux"}),
    ],
)
def test_names_are_whole_words_or_in_angle_brackets(inversions, text, found):
    assert set(named(((Span(text),),), inversions)) == found


def test_each_vector_takes_a_token_and_the_word_its_weight(inversions):
    tokenizer = pipeline("sd15").tokenizer
    named_here = (("quux", inversions["quux"]),)
    [[chunk]] = cut(
        [tokenizer], Wording(((Span("a "), Span("<quux>", 1.3), Span(" b")),), inversions=named_here)
    ).chunks
    assert chunk.weights[:6] == [1.0, 1.0, 1.3, 1.3, 1.3, 1.0]
    assert list(chunk.vectors) == [2]
    crowded = cut([tokenizer], Wording(((Span("red " * 73 + "quux"),),), inversions=named_here))
    assert crowded.report.tokens == 76
    assert [list(chunk.vectors) for chunk in crowded.chunks[0]] == [[], [1]]


def test_one_made_for_another_model_is_refused_when_it_is_asked_for(inversions):
    with pytest.raises(
        InvalidRequest, match=r"'flarb' was made for another base model.* 128 and 128 wide.* 128$"
    ) as no:
        engine("sd15", inversions).submit(ask("a flarb"), lambda event: None)
    assert no.value.field == "prompt"
    with pytest.raises(InvalidRequest, match="another base model") as no:
        engine("sdxl", inversions).submit(ask("a ring", "sdxl", negative_prompt="quux"), lambda event: None)
    assert no.value.field == "negative_prompt"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({"a": torch.ones(1, 4), "b": torch.ones(1, 4)}, "holds a, b: that is no textual inversion"),
        ({"emb_params": torch.ones(76, 4)}, "holds 76x4 numbers"),
        ({"emb_params": torch.ones(1, 2, 4)}, "holds 1x2x4 numbers"),
        ({"emb_params": torch.full((1, 4), torch.nan)}, "finite"),
        ({"clip_l": torch.ones(1, 4), "clip_g": torch.ones(2, 6)}, "not as many"),
        ({"a": torch.ones(5_000_000)}, "larger than 16 MiB"),
    ],
    ids=["two", "many", "deep", "nan", "uneven", "large"],
)
def test_what_is_no_textual_inversion_is_refused(tmp_path, content, why):
    file = tmp_path / "x.safetensors"
    save_file(content, file)
    with pytest.raises(InvalidRequest, match=why):
        TextualInversion.read("x", file.read_bytes())


def test_only_whole_safetensors_files_are_read():
    for content in (b"\x80\x04", b"\x08", b""):
        with pytest.raises(InvalidRequest, match=r"\.safetensors file"):
            TextualInversion.read("x", content)


def test_a_folder_of_files_is_a_mapping_by_name(files, tmp_path):
    inversions = Adapters(loaded_family("sd15"), tmp_path).inversions
    assert list(inversions) == []
    shutil.copy(files / "quux.safetensors", tmp_path)
    assert list(inversions) == ["quux"]
    assert inversions["quux"] is inversions["quux"]
    assert "other" not in inversions


def test_a_single_vector_may_be_flat(tmp_path):
    save_file({"emb_params": torch.ones(8, dtype=torch.float16)}, tmp_path / "x.safetensors")
    [vectors] = TextualInversion.read("x", (tmp_path / "x.safetensors").read_bytes()).vectors
    assert (vectors.shape, vectors.dtype) == ((1, 8), torch.float32)
