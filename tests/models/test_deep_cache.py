"""DeepCache: diffusers' pipelines with its authors' own helper draw the same, alone, in company, and captured."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from DeepCache import DeepCacheSDHelper
from diffusers import ControlNetModel

from models import batch, deep_cache
from models.batch import Batch
from models.captured import WORTH
from models.card import ModelCard
from models.deep_cache import Deep, shallow, taking
from models.engine import Engine
from models.errors import InvalidRequest
from models.events import Event, Finished, Progress
from models.family import Conditioning, Residuals, run_unet
from models.forward import Inputs, Outputs
from models.images import Picture
from models.parts import AdapterUse, ControlUse, Hires
from models.registered import Adapters
from models.request import GenerationRequest
from models.work import SHALLOW, Stage, work
from tests.models.conftest import drawn, loaded_family, new_engine, pipeline, reference, sketch
from tests.models.test_captured import capturing
from tests.models.test_mixture import square_mask

EMBEDDED = Path("models/embedded")


def ask(seed: int = 1, **options: Any) -> GenerationRequest:
    asked = {"model": "sd15", "prompt": "a red circle on a blue background", "steps": 9, "guidance_scale": 5.0}
    return GenerationRequest(seed=seed, **asked | {"sampler": "dpmpp_2m", "deep_cache": 3} | options)


def pictures(engine: Engine, *requests: GenerationRequest) -> list[np.ndarray]:
    return [drawn(one.data) for [one] in engine.generate(requests)]


def rich() -> Engine:
    """With LoRAs and a ControlNet."""
    canny = {"canny": EMBEDDED / "controlnets" / "canny-sd15"}
    return new_engine("sd15", adapters=Adapters(loaded_family("sd15"), EMBEDDED / "loras", canny))


def distance(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one - other).max())


@contextmanager
def helped(model: str, interval: int) -> Iterator[None]:
    """The pipeline's UNet as DeepCache's authors change it."""

    class Ours(DeepCacheSDHelper):
        """Theirs looks for a step by its timestep, of which solvers of two evaluations have two: this one counts."""

        def wrap_unet_forward(self) -> None:
            self.function_dict["unet_forward"] = forward = self.pipe.unet.forward
            self.calls = 0

            def counted(*given: Any, **named: Any) -> Any:
                self.cur_timestep, self.calls = self.calls, self.calls + 1
                return forward(*given, **named)

            self.pipe.unet.forward = counted

    helper = Ours(pipeline(model))
    helper.set_params(cache_interval=interval, cache_branch_id=0)
    helper.enable()
    try:
        yield
    finally:
        helper.disable()


@pytest.mark.parametrize("interval", [2, 3, 5])
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_a", "heun"])
@pytest.mark.parametrize("model", ["sd15", "sd21", "sdxl"])
def test_it_draws_what_diffusers_draws_with_its_authors_helper(model: str, sampler: str, interval: int):
    request = ask(model=model, sampler=sampler, schedule="default", deep_cache=interval)
    [ours] = pictures(new_engine(model), request)
    with helped(model, interval):
        theirs = reference("", pipeline(model).components, request, height=128, width=128)
    assert distance(ours, theirs) <= 1
    [whole] = pictures(new_engine(model), replace(request, deep_cache=1))
    assert distance(ours, whole) > 1


@pytest.mark.parametrize("steered", [False, True], ids=["", "steered"])
@pytest.mark.parametrize("model", ["sd15", "sd21", "sdxl"])
def test_on_what_was_taken_just_now_the_outermost_layer_answers_what_the_network_does(model: str, steered: bool):
    unet: Any = loaded_family(model).networks["unet"]
    torch.manual_seed(0)
    latents, timesteps = torch.randn(3, unet.config.in_channels, 16, 16), torch.tensor([3.0, 500.0, 999.0])
    mask = torch.arange(9) < torch.tensor([[9], [5], [9]])
    rows = Conditioning(context=torch.randn(3, 9, unet.config.cross_attention_dim), added=added(unet), mask=mask)
    with torch.inference_mode():
        residuals = residuals_of(unet, latents, rows) if steered else None
        with taking(unet) as taken:
            handed = {"remembered": None}
            whole = run_unet(unet, latents, timesteps, rows, residuals, cross_attention_kwargs=handed)
            deep = Deep(below=taken(), steered=residuals[0][0] if residuals else None)
        assert torch.equal(shallow(unet, latents, timesteps, rows, deep), whole)
        other = shallow(unet, latents, timesteps, rows, replace(deep, below=torch.randn_like(deep.below)))
    assert not torch.allclose(other, whole, atol=0.01)
    assert not any(module._forward_pre_hooks for module in unet.modules())


def added(unet: Any) -> dict[str, torch.Tensor]:
    if unet.config.addition_embed_type is None:
        return {}
    width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    return {"text_embeds": torch.randn(3, width), "time_ids": torch.randn(3, 6)}


def residuals_of(unet: Any, latents: torch.Tensor, rows: Conditioning) -> Residuals:
    """Of an untrained ControlNet, which answers zeros: here with noise."""
    hint, given = torch.zeros(3, 3, 128, 128), dict(rows.added)
    net: Any = ControlNetModel.from_unet(unet)
    down, mid = net(latents, 0, rows.context, hint, added_cond_kwargs=given, return_dict=False)
    return [0.1 * torch.randn_like(each) for each in down], 0.1 * torch.randn_like(mid)


def mixture() -> dict[str, GenerationRequest]:
    """Everything that goes with it, of several intervals, and some without it."""
    control = ControlUse(name="canny", image=sketch(), preprocessor="canny", weight=0.8, end=0.7)
    crescent, framed = AdapterUse(name="crescent", weight=0.9), AdapterUse(name="framed", weight=0.6)
    return {
        "plain": ask(1),
        "every second": ask(2, deep_cache=2, steps=7, sampler="euler_a"),
        "every tenth": ask(3, deep_cache=10, steps=5),
        "not at all": ask(4, deep_cache=1, steps=8),
        "unguided": ask(5, guidance_scale=1.0, sampler="heun"),
        "several": ask(6, prompt="a red circle AND a green background", steps=6),
        "edited": ask(7, prompt="a red [circle:star:0.5] on a [blue:green:0.4] background"),
        "inpaint": ask(8, image=sketch(), mask=square_mask(), sampler="euler_a"),
        "img2img": ask(9, image=sketch(), denoise_strength=0.6),
        "control": ask(10, controls=(control,), sampler="ddim"),
        "lora": ask(11, adapters=(crescent, framed), deep_cache=2),
        "everything": ask(12, image=sketch(), mask=square_mask(), controls=(control,), adapters=(framed,)),
        "hires": ask(13, hires=Hires(scale=1.5, steps=4), controls=(control,), sampler="euler_a"),
    }


@pytest.fixture(scope="module")
def alone() -> dict[str, np.ndarray]:
    return {name: pictures(rich(), request)[0] for name, request in mixture().items()}


def test_each_gets_the_picture_it_gets_alone(alone: dict[str, np.ndarray]):
    """In one batch, and where they come one step after the other."""
    requests = mixture()
    together = pictures(rich(), *requests.values())
    engine, found = rich(), dict[str, np.ndarray]()
    for name, request in requests.items():
        engine.submit(request, lambda event, name=name: _keep(found, name, event), progress=False)
        engine.step()
    while len(found) < len(requests):
        engine.step()
    for (name, picture), other in zip(alone.items(), together, strict=True):
        assert distance(other, picture) <= 1, name
        assert distance(found[name], picture) <= 1, name


def _keep(found: dict[str, np.ndarray], name: str, event: Event) -> None:
    assert isinstance(event, Finished), event
    found[name] = drawn(event.data)


def test_captured_steps_draw_what_plain_ones_draw(alone: dict[str, np.ndarray]):
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the stand-in hears the thread that calls
    try:
        engine = rich()
        made = capturing(engine)
        for _ in range(WORTH + 1):
            found = pictures(engine, *mixture().values())
    finally:
        torch.set_num_threads(before)
    assert not any(kind.refused for kind in made._kinds.values())
    for marks in ({"taken": True}, {"taken": False, "deep": True}, {"taken": False, "deep": False}):
        replayed = [kind for key, kind in made._kinds.items() if marks.items() <= _marks(key).items()]
        assert any(kind.recording is not None for kind in replayed), marks
    for (name, picture), other in zip(alone.items(), found, strict=True):
        assert distance(other, picture) <= 1, name


def _marks(key: Any) -> dict[str, bool]:
    """Of a kind of captured forward."""
    _, shapes, taken, _ = key
    return {"taken": taken, "deep": any(name.startswith(".deep") for name, *_ in shapes)}


def test_the_whole_network_runs_in_every_nth_step_alone(monkeypatch: pytest.MonkeyPatch):
    """And shallow steps of several pictures are one call."""
    engine, calls = new_engine("sd15"), list[tuple[str, int]]()
    predict, outermost = engine.family.predict, deep_cache.shallow
    monkeypatch.setattr(
        engine.family, "predict", lambda seen, *rest: calls.append(("whole", len(seen))) or predict(seen, *rest)
    )
    monkeypatch.setattr(
        "models.denoiser.shallow",
        lambda unet, seen, *rest: calls.append(("shallow", len(seen))) or outermost(unet, seen, *rest),
    )
    monkeypatch.setattr("models.rowwise.LEAST", 10**9)  # one thread
    engine.generate([ask(seed, steps=7) for seed in (1, 2)])
    kinds = ["whole", "shallow", "shallow"]
    assert calls == [(kind, 4) for kind in (*kinds, *kinds, "whole")]


def test_who_comes_later_falls_into_step():
    """It waits for the leader's next step of the whole network, a few shallow ones away, and shares all after it."""
    engine = new_engine("sd15")
    progress: dict[int, list[Progress]] = {1: [], 2: []}

    def listen(seed: int, event: Event) -> None:
        if isinstance(event, Progress):
            progress[seed].append(event)

    engine.submit(ask(1, steps=12), lambda event: listen(1, event))
    for _ in range(2):
        engine.step()
    engine.submit(ask(2, steps=6), lambda event: listen(2, event))
    while len(progress[1]) < 12 or len(progress[2]) < 6:
        engine.step()
    rows = [event.rows for event in progress[1]]
    assert rows == [2, 2, 2, 4, 4, 4, 4, 4, 4, 2, 2, 2]
    assert {event.rows for event in progress[2]} == {4}


def test_threads_with_rows_of_their_own_take_what_is_theirs(monkeypatch: pytest.MonkeyPatch):
    requests = [ask(seed, adapters=(AdapterUse(name="crescent", weight=0.2 * seed),)) for seed in range(1, 5)]
    monkeypatch.setattr("models.rowwise.LEAST", 10**9)
    expected = pictures(rich(), *requests)
    monkeypatch.setattr("models.rowwise.LEAST", 1)
    engine = rich()
    engine._denoiser._share._threads = 2
    for one, other in zip(pictures(engine, *requests), expected, strict=True):
        assert distance(one, other) <= 1


def test_no_memory_is_held_for_those_who_need_none():
    engine = new_engine("sd15")
    engine.submit(ask(1, steps=7), lambda event: None, progress=False)
    engine.submit(ask(2, steps=7, deep_cache=1), lambda event: None, progress=False)
    first, second = engine._live
    held = []
    while engine._live:
        engine.step()
        held.append((first.step, first.deep is not None))
        assert second.deep is None
    assert set(held) == {(step, step % 3 > 0 and step < 7) for step in range(1, 8)}
    engine.submit(ask(1, steps=8, stop_at_step=4), lambda event: None, progress=False)
    [stopped] = engine._live
    while engine._live:
        engine.step()
    assert (stopped.step, stopped.deep) == (4, None)


def test_nothing_is_taken_from_a_step_that_no_shallow_one_follows(monkeypatch: pytest.MonkeyPatch):
    engine, taken = new_engine("sd15"), list[bool]()
    plain = engine._denoiser._plain

    def told(inputs: Inputs) -> Outputs:
        taken.append(inputs.taken)
        return plain(inputs)

    monkeypatch.setattr(engine._denoiser, "_plain", told)
    engine.generate([ask(1, steps=7)])
    assert taken == [True, False, False, True, False, False, False]


def test_a_controlnet_that_acts_between_whole_steps_alone_is_told():
    use = {"name": "canny", "image": sketch(), "preprocessor": "canny"}
    controls = (ControlUse(**use, start=0.1, end=0.45), ControlUse(**use, end=0.45), ControlUse(**use, weight=0.0))
    engine = rich()
    [[skipped], [whole]] = engine.generate(
        [ask(1, steps=20, deep_cache=n, controls=controls, sampler="ddim") for n in (10, 1)]
    )
    why = "with deep_cache 10 no step of the whole network lies between its start and its end"
    assert skipped.warnings == (f"controls.0 plays no part: {why}",)
    assert whole.warnings == ()


def test_a_controlnet_that_would_act_behind_the_end_is_told():
    control = ControlUse(name="canny", image=sketch(), preprocessor="canny", start=0.05)
    [[stopped]] = rich().generate([ask(1, steps=20, stop_at_step=2, controls=(control,), sampler="ddim")])
    [warning] = stopped.warnings
    assert warning.startswith("controls.0 plays no part")


@pytest.mark.parametrize("place", ["models.denoiser.Batch.of", "models.batch._deep"])
def test_who_is_content_in_the_midst_of_a_step_changes_nothing_for_others(
    monkeypatch: pytest.MonkeyPatch, place: str, alone: dict[str, np.ndarray]
):
    """`accept` comes from any thread."""
    engine, found = rich(), dict[str, np.ndarray]()
    content = engine.submit(ask(1), lambda event: None, progress=False)
    for name in ("control", "plain"):
        engine.submit(mixture()[name], lambda event, name=name: _keep(found, name, event), progress=False)
    engine.step()
    late = engine.submit(ask(5), lambda event: None, progress=False)  # batches are made anew when it comes or goes
    owner, name = (Batch, "of") if place.endswith("of") else (batch, "_deep")
    made = getattr(owner, name)

    def meanwhile(*given: Any) -> Any:
        if engine._live[0].position == 1:
            engine.accept(content)
        return made(*given)

    monkeypatch.setattr(owner, name, meanwhile)
    engine._denoiser._batch = None
    engine.cancel(late)
    while len(found) < 2:
        engine.step()
    for name, picture in found.items():
        assert distance(picture, alone[name]) <= 1, name


def test_older_pictures_that_skip_nothing_do_not_hold_it_up():
    engine, order = new_engine("sd15"), list[int]()
    for seed, interval in ((1, 1), (2, 3)):
        request = ask(seed, steps=12, deep_cache=interval)
        engine.submit(request, lambda event, seed=seed: order.append(seed), progress=False)
    while len(order) < 2:
        engine.step()
    assert engine.load().forwards == 12 + 8  # four of them together
    assert order == [2, 1]


def test_a_step_that_fails_is_taken_again(monkeypatch: pytest.MonkeyPatch):
    """As where there is no memory: first together, then each half."""
    [expected, other] = pictures(new_engine("sd15"), ask(1), ask(2))
    engine, failed = new_engine("sd15"), list[int]()

    def tight(unet: Any, seen: torch.Tensor, *rest: Any) -> torch.Tensor:
        if len(seen) > 2 and len(failed) < 2:
            failed.append(len(seen))
            raise torch.OutOfMemoryError
        return shallow(unet, seen, *rest)

    monkeypatch.setattr("models.denoiser.shallow", tight)
    monkeypatch.setattr("models.rowwise.LEAST", 10**9)
    found = pictures(engine, ask(1), ask(2))
    assert failed
    assert distance(found[0], expected) <= 1
    assert distance(found[1], other) <= 1


# What it costs


@pytest.mark.parametrize("interval", [1, 2, 3, 10])
def test_the_work_of_many_steps_is_that_of_each(interval: int):
    stage = Stage(forwards=11, each=8.0, begin=0.0, end=0.0, deep_cache=interval)
    for first in range(12):
        for last in range(12):
            each = [SHALLOW if stage.shallow(position) else 1.0 for position in range(first, last)]
            assert stage.costs(first, last) == pytest.approx(8.0 * sum(each))
    assert [stage.shallow(position) for position in range(11)] == [position % interval > 0 for position in range(11)]


def test_what_is_known_before_is_what_the_engine_does():
    engine = new_engine("sd15")
    card = engine.card
    request = ask(1, steps=7, hires=Hires(scale=1.5, steps=4)).resolve(card)
    engine.submit(request, lambda event: None, progress=False)
    [sequence] = engine._live
    assert sequence.work == pytest.approx(work(request))
    assert work(request) < 0.65 * work(replace(request, deep_cache=1))
    first, second = sequence.stages
    done = []
    while engine._live:
        engine.step()
        done.append(sequence.work)
    whole = [position for stage in (first, second) for position in range(stage.forwards) if position % 3 == 0]
    assert len(whole) == 3 + 1
    steps = [one - other for one, other in zip([work(request), *done], done, strict=False)]
    expected = [stage.each * (SHALLOW if n % 3 else 1) for stage in (first, second) for n in range(stage.forwards)]
    expected[first.forwards] += second.begin
    assert steps == pytest.approx(expected)
    assert done[-1] == pytest.approx(second.end)


# What is asked for


def test_a_model_may_have_it_by_default():
    card = ModelCard.read("sd15", "sd", "models/embedded/sd15", {"deep_cache": 4})
    plain = GenerationRequest(model="sd15", prompt="a star")
    assert plain.resolve(card).deep_cache == 4
    assert replace(plain, deep_cache=1).resolve(card).deep_cache == 1
    assert plain.resolve(replace(card, deep_cache=1)).deep_cache == 1


def test_what_a_warm_up_measures_are_whole_steps(monkeypatch: pytest.MonkeyPatch):
    """Else broad ones would be thought to cost a tenth of what they do."""
    card = ModelCard.read("sd15", "sd", "models/embedded/sd15", {"deep_cache": 4})
    engine = Engine(loaded_family("sd15"), card)
    taken = list[bool]()
    step = engine._denoiser.step
    monkeypatch.setattr(
        engine._denoiser, "step", lambda sequences: taken.append(sequences[0].shallow) or step(sequences)
    )
    engine.warm_up(2)
    assert taken[:2] == [False, True]  # a picture is drawn as by default
    assert not any(taken[2:])


def test_what_makes_pictures_larger_draws_whole_steps_alone():
    card = ModelCard.read("x4", "sd_x4", "stabilityai/x4", {"width": 256})
    request = GenerationRequest(model="x4", prompt="", image=Picture(width=64, height=64, data=b"\0" * 12288))
    assert request.resolve(card).deep_cache == 1
    with pytest.raises(InvalidRequest) as refused:
        replace(request, deep_cache=2).resolve(card)
    assert refused.value.field == "deep_cache"
