"""The engine's promises: joining and leaving take one step, bounds hold, failures are typed and stay with their own."""

import io
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from models.admission import Bounds
from models.batch import Batch
from models.card import ModelCard
from models.engine import Engine, host
from models.errors import Cancelled, GenerationFailed, InvalidRequest, NotFound, Overloaded
from models.events import Failed, Finished, Progress
from models.parts import AdapterUse
from models.preparation import Preparation
from models.registered import Adapters
from models.request import GenerationRequest
from tests.models.conftest import loaded_family, new_engine, sketch


def ask(**fields) -> GenerationRequest:
    fields = {"model": "sd15", "prompt": "a red circle", "steps": 4, "seed": 1, "sampler": "euler"} | fields
    return GenerationRequest(**fields)


def step_until(engine: Engine, done) -> None:
    deadline = time.monotonic() + 60
    while not done():
        engine.step()
        assert time.monotonic() < deadline


class Faulty:
    """A real family whose network fails as told."""

    def __init__(self, predict):
        self._family = loaded_family("sd15")
        self._predict = predict

    def __getattr__(self, name):
        return getattr(self._family, name)

    def predict(self, latents, timesteps, rows, residuals=None):
        return self._predict(self._family, latents, timesteps, rows)


def faulty_engine(predict, **options) -> Engine:
    return Engine(Faulty(predict), ModelCard.read("sd15", "sd", "models/embedded/sd15"), **options)


def test_a_newcomer_joins_the_next_forward_and_a_leaver_is_gone_from_it(engine):
    first, second = [], []
    leaver = engine.submit(ask(steps=20), first.append)
    for _ in range(3):
        engine.step()
    engine.submit(ask(steps=3, seed=2), second.append)
    engine.step()
    engine.cancel(leaver)
    step_until(engine, lambda: isinstance(second[-1], Finished))
    assert [(p.forward, p.rows) for p in first] == [(1, 2), (2, 2), (3, 2), (4, 4)]
    assert [(p.forward, p.rows) for p in second if isinstance(p, Progress)] == [(4, 4), (5, 2), (6, 2)]
    assert engine.load().running == 0


def test_progress_counts_every_forward_and_previews_come_as_asked(engine):
    events = []
    engine.submit(ask(steps=6, preview_every=3), events.append)
    step_until(engine, lambda: isinstance(events[-1] if events else None, Finished))
    progress = [event for event in events if isinstance(event, Progress)]
    assert [p.step for p in progress] == [1, 2, 3, 4, 5, 6]
    assert [p.preview is not None for p in progress] == [False, False, True, False, False, True]
    preview = Image.open(io.BytesIO(progress[-1].preview))
    assert preview.format == "JPEG"
    assert max(preview.size) <= 256


def test_the_last_preview_looks_like_the_picture(engine):
    events = []
    engine.submit(ask(steps=10, preview_every=10, prompt="a red circle on a blue background"), events.append)
    step_until(engine, lambda: isinstance(events[-1] if events else None, Finished))
    size = (16, 16)
    preview = next(e.preview for e in events if isinstance(e, Progress) and e.preview)
    small = [
        np.asarray(Image.open(io.BytesIO(d)).resize(size, Image.BOX)).astype(float) for d in (preview, events[-1].data)
    ]
    assert np.abs(small[0] - small[1]).mean() < 40


def test_without_progress_only_the_pictures_are_told(engine):
    events = []
    engine.submit(ask(samples=2), events.append, progress=False)
    step_until(engine, lambda: len(events) == 2)
    assert {event.index for event in events if isinstance(event, Finished)} == {0, 1}


def test_guided_and_unguided_rows_share_a_forward(engine):
    guided, plain = [], []
    engine.submit(ask(), guided.append)
    engine.submit(ask(guidance_scale=1.0), plain.append)
    engine.step()
    assert (guided[0].rows, plain[0].rows) == (3, 3)


def bounded(max_waiting: int) -> Engine:
    engine = new_engine("sd15")
    engine._bounds = Bounds(max_waiting=max_waiting)
    return engine


def test_the_queue_is_bounded_and_says_when_to_come_back():
    engine = bounded(3)
    engine.submit(ask(samples=3), lambda event: None)
    with pytest.raises(Overloaded) as refused:
        engine.submit(ask(), lambda event: None)
    assert refused.value.retry_after_s >= 1


def test_a_full_queue_refuses_before_anything_is_prepared():
    engine = bounded(1)
    unprepared = ask(adapters=(AdapterUse(name="nobody"),))
    with pytest.raises(NotFound):
        engine.submit(unprepared, lambda event: None)
    engine.submit(ask(), lambda event: None)  # what could not be prepared has left its place
    with pytest.raises(Overloaded):
        engine.submit(unprepared, lambda event: None)


class Slow(Preparation):
    """Takes as long as it is told to."""

    def __init__(self):
        family = loaded_family("sd15")
        super().__init__(family, Adapters(family))
        self.begun, self.goes_on = threading.Event(), threading.Event()

    def sequences(self, *arguments):
        self.begun.set()
        assert self.goes_on.wait(30)
        return super().sequences(*arguments)


def test_what_is_being_prepared_counts_as_waiting_and_can_be_cancelled():
    engine, slow, events = bounded(2), Slow(), []
    engine._preparation = slow
    with ThreadPoolExecutor(1) as caller:
        submitting = caller.submit(engine.submit, ask(samples=2), events.append, id="it")
        assert slow.begun.wait(30)
        assert engine.load().waiting == 2
        with pytest.raises(Overloaded, match="2 pictures wait already"):
            engine.submit(ask(), events.append)
        engine.cancel("it")
        assert engine.load().waiting == 0
        slow.goes_on.set()
        assert submitting.result() == "it"
    assert not engine.step()
    assert (engine.load().forwards, events) == (0, [])


def test_time_counts_from_submission_and_not_from_the_end_of_preparation():
    engine, slow, late, patient = new_engine("sd15"), Slow(), [], []
    engine._preparation = slow
    threading.Timer(0.5, slow.goes_on.set).start()
    engine.submit(ask(deadline_s=0.4, steps=1), late.append, progress=False)
    engine.submit(ask(steps=1), patient.append, progress=False)
    step_until(engine, lambda: late and patient)
    assert late[0].error.reason == "deadline"
    slow.goes_on.clear()
    threading.Timer(0.5, slow.goes_on.set).start()
    [[finished]] = engine.generate([ask(steps=1)])
    assert finished.timings.queued_s >= 0.4


def test_the_earliest_deadline_goes_first():
    engine = new_engine("sd15")
    order = []
    shape = (4, 16, 16)
    engine.batcher.set_cap(shape, 2)
    for name, deadline_s in (("patient", None), ("soon", 30.0), ("later", 50.0)):
        engine.submit(ask(deadline_s=deadline_s, steps=2), lambda e, n=name: order.append(n), progress=False)
    step_until(engine, lambda: len(order) == 3)
    assert order == ["soon", "later", "patient"]


def test_interactive_work_goes_before_batch_work():
    engine = new_engine("sd15")
    order = []
    engine.batcher.set_cap((4, 16, 16), 2)
    for priority in ("batch", "interactive"):
        engine.submit(ask(priority=priority, steps=2), lambda e, n=priority: order.append(n), progress=False)
    step_until(engine, lambda: len(order) == 2)
    assert order == ["interactive", "batch"]


def test_a_missed_deadline_is_a_typed_failure(engine):
    events = []
    engine.submit(ask(steps=100, deadline_s=0.2), events.append, progress=False)
    step_until(engine, lambda: events)
    assert isinstance(events[0], Failed)
    assert events[0].error.reason == "deadline"
    assert engine.load().running == 0


def test_nan_latents_are_a_typed_failure_and_not_a_black_picture():
    def broken(family, latents, timesteps, rows):
        return torch.full_like(latents, float("nan"))

    with pytest.raises(GenerationFailed) as failed:
        faulty_engine(broken).generate([ask()])
    assert failed.value.reason == "nan_latents"
    assert not failed.value.retryable


def test_out_of_memory_halves_the_batch_until_it_fits():
    sizes = []

    def tight(family, latents, timesteps, rows):
        if len(latents) > 4:
            raise torch.OutOfMemoryError("no room")
        sizes.append(len(latents))
        return family.predict(latents, timesteps, rows)

    requests = [ask(seed=seed, guidance_scale=3.0) for seed in range(5)]
    pictures = faulty_engine(tight).generate(requests)
    expected = new_engine("sd15").generate(requests)
    for [ours], [theirs] in zip(pictures, expected, strict=True):
        ours, theirs = (np.asarray(Image.open(io.BytesIO(f.data))).astype(int) for f in (ours, theirs))
        assert np.abs(ours - theirs).max() <= 1
    assert max(sizes) == 4


def test_a_step_that_is_repeated_after_its_noise_was_drawn_draws_the_same_noise(monkeypatch: pytest.MonkeyPatch):
    """There is no room for more than one picture at the end of a step, when the step's noise is drawn already."""
    requests = [ask(seed=seed, sampler="euler_a") for seed in range(3)]
    expected = new_engine("sd15").generate(requests)
    advance, refusals = Batch.advance, []

    def tight(batch: Batch, moved: torch.Tensor, clean: torch.Tensor) -> None:
        if len(batch.sequences) > 1:
            refusals.append(len(batch.sequences))
            raise torch.OutOfMemoryError("no room")
        advance(batch, moved, clean)

    monkeypatch.setattr(Batch, "advance", tight)
    pictures = new_engine("sd15").generate(requests)
    assert refusals
    for [ours], [theirs] in zip(pictures, expected, strict=True):
        ours, theirs = (np.asarray(Image.open(io.BytesIO(f.data))).astype(int) for f in (ours, theirs))
        assert np.abs(ours - theirs).max() <= 1


def test_out_of_memory_with_one_picture_fails_that_request_alone():
    def tight(family, latents, timesteps, rows):
        if latents.shape[-1] > 16:
            raise torch.OutOfMemoryError("no room")
        return family.predict(latents, timesteps, rows)

    engine, large, small = faulty_engine(tight), [], []
    engine.submit(ask(width=256, height=256), large.append, progress=False)
    engine.submit(ask(), small.append, progress=False)
    step_until(engine, lambda: large and small)
    assert large[0].error.reason == "out_of_memory"
    assert large[0].error.retryable
    assert isinstance(small[0], Finished)
    assert engine.healthy() is None


def test_a_fault_fails_its_own_and_repeated_faults_make_the_engine_unhealthy():
    def broken(family, latents, timesteps, rows):
        raise RuntimeError("the device is lost")

    engine, events = faulty_engine(broken), []
    for seed in range(3):
        engine.submit(ask(seed=seed), events.append)
    step_until(engine, lambda: len(events) == 3)
    assert {event.error.reason for event in events} == {"engine_fault"}
    assert "failed" in engine.healthy()


def test_one_requests_fault_leaves_its_neighbours_alone():
    def poisoned(family, latents, timesteps, rows):
        if (timesteps == 999).any():
            raise RuntimeError("poison")
        return family.predict(latents, timesteps, rows)

    engine, bad, good = faulty_engine(poisoned), [], []
    engine.submit(ask(schedule="sgm_uniform"), bad.append, progress=False)
    engine.submit(ask(schedule="default"), good.append, progress=False)
    step_until(engine, lambda: bad and good)
    assert bad[0].error.reason == "engine_fault"
    assert isinstance(good[0], Finished)


def test_a_running_engine_serves_from_its_own_thread_and_closes():
    engine = host(lambda: new_engine("sd15"))
    pictures = engine.generate([ask(seed=seed) for seed in range(3)])
    assert [p.seed for [p] in pictures] == [0, 1, 2]
    assert engine.healthy() is None
    events = []
    engine.submit(ask(steps=150), events.append, progress=False)
    engine.close()
    assert isinstance(events[0].error, Cancelled)
    with pytest.raises(Overloaded):
        engine.submit(ask(), events.append)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads where Linux lists them")
def test_who_submits_keeps_no_openmp_workers_that_would_slow_the_engine_down(engine):
    caller = ThreadPoolExecutor(1)
    caller.submit(time.time).result()
    before = set(os.listdir("/proc/self/task"))
    for sampler in ("dpmpp_2m", "euler_a", "unipc"):  # each a tape to compile
        request = ask(sampler=sampler, steps=17, image=sketch(), denoise_strength=0.5)
        caller.submit(engine.submit, request, lambda event: None).result()
    deadline = time.monotonic() + 5  # workers that were sent away are gone a moment later
    while set(os.listdir("/proc/self/task")) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(os.listdir("/proc/self/task")) - before


def test_closing_with_a_drain_finishes_what_was_begun():
    engine = host(lambda: new_engine("sd15"))
    events = []
    engine.submit(ask(steps=4), events.append, progress=False)
    engine.close(drain_s=60)
    assert isinstance(events[0], Finished)


def test_warm_up_measures_a_cap():
    engine = new_engine("sd15")
    engine.warm_up()
    assert engine.batcher.cap((4, 16, 16)) in (1, 2, 4, 8, 16, 24, 32, 48, 64)


def test_a_truncated_prompt_is_told(engine):
    [[finished]] = engine.generate([ask(prompt="a red circle " * 500)])
    assert any("left out" in warning for warning in finished.warnings)


def test_a_negative_prompt_that_plays_no_part_is_told(engine):
    prompts = {"prompt": "a red circle", "negative_prompt": "a ring"}
    asked = [
        ask(**prompts, guidance_scale=1.0),
        ask(**prompts),
        ask(**prompts | {"prompt": "a AND b"}, guidance_scale=1.0),
    ]
    warnings = [finished.warnings for [finished] in engine.generate(asked)]
    assert warnings == [("negative_prompt plays no part at guidance_scale 1, only above 1",), (), ()]


def test_refusals_name_the_field(engine):
    for fields, field in (
        ({"width": 100}, "width"),
        ({"width": 8192, "height": 8192}, "width"),
        ({"steps": 0}, "steps"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"sampler": "magic"}, "sampler"),
        ({"sampler": "ddim", "schedule": "karras"}, "schedule"),
        ({"prompt": "  "}, "prompt"),
        ({"sampler": "lcm", "steps": 90}, "steps"),
        ({"denoise_strength": 0.5}, "denoise_strength"),
    ):
        with pytest.raises(InvalidRequest) as refused:
            engine.submit(ask(**fields), lambda event: None)
        assert refused.value.field == field
    with pytest.raises(NotFound):
        engine.submit(ask(model="other"), lambda event: None)
