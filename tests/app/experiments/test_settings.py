"""What the configuration may say of experiments, and what it is refused for."""

from typing import Any

import pytest
from pydantic import ValidationError

from app.experiments.settings import ArmSettings, ExperimentSettings
from app.settings import CatalogueSettings
from models.parts import AdapterUse, Hires
from models.request import GenerationRequest

MODELS = [
    {"name": "sd15", "source": "models/embedded/sd15"},
    {"name": "sdxl", "family": "sdxl", "source": "models/embedded/sdxl"},
]
STEPS: dict[str, Any] = {"arms": {"control": {}, "fast": {"steps": 4}}}


def catalogue(**experiments: Any) -> CatalogueSettings:
    return CatalogueSettings.model_validate({"models": MODELS, "default_model": "sd15", "experiments": experiments})


def refusal(**experiments: Any) -> str:
    with pytest.raises(ValidationError) as refused:
        catalogue(**experiments)
    return str(refused.value)


def test_every_parameter_of_an_arm_can_be_said():
    said: dict[str, Any] = {
        "model": "sdxl", "negative_prompt": "blue", "prompt_syntax": "plain", "width": 64, "height": 64, "steps": 9,
        "guidance_scale": 3.5, "guidance_rescale": 0.5, "sampler": "DPM++ 2M", "schedule": "karras", "clip_skip": 1,
        "deep_cache": 3, "hires": {"scale": 1.5}, "adapters": [{"name": "crescent", "weight": 0.5}],
    }  # fmt: skip
    experiment = catalogue(a={"arms": {"control": {}, "b": said}}).experiments["a"]
    request = experiment.applied(GenerationRequest(model="sd15", prompt="x", seed=7), "b")
    parts = {"hires": Hires(scale=1.5), "adapters": (AdapterUse(name="crescent", weight=0.5),)}
    assert request == GenerationRequest(prompt="x", seed=7, **said | parts)
    assert experiment.decides == set(said)


def test_what_an_arm_leaves_open_is_decided_by_default():
    experiment = ExperimentSettings.model_validate({"force": True, "arms": {"control": {}, "b": {"model": "sdxl"}}})
    asked = GenerationRequest(model="sdxl", prompt="x", steps=9)
    drawn = experiment.completed("sd15").applied(asked, "control")
    assert drawn == GenerationRequest(model="sd15", prompt="x", steps=9)


def test_another_default_model_and_what_a_shadow_decides_make_another_version():
    models = ExperimentSettings.model_validate({"arms": {"control": {}, "b": {"model": "sdxl"}}})
    assert models.completed("sd15").version == models.completed("sd15").completed("sd21").version
    assert models.completed("sd15").version != models.completed("sd21").version
    steps = ExperimentSettings.model_validate({"arms": {"control": {}, "b": {"sampler": "euler"}}})
    assert steps.completed("sd15").version == steps.completed("sd21").version
    shadowed = steps.model_copy(update={"arms": steps.arms | {"s": ArmSettings(steps=10, shadow=True)}})
    assert shadowed.version != steps.version


def test_who_states_one_of_a_pair_has_stated_both():
    assert ExperimentSettings.model_validate({"arms": {"control": {}, "b": {"sampler": "euler"}}}).decides == {
        "sampler",
        "schedule",
    }


@pytest.mark.parametrize(
    ("experiment", "words"),
    [
        (STEPS | {"unti": "user"}, "unti"),
        (STEPS | {"unit": "ip"}, "'key', 'user' or 'session'"),
        (STEPS | {"share": 0}, "experiments.a.share"),
        (STEPS | {"share": 1.1}, "experiments.a.share"),
        (STEPS | {"header": "x-plan"}, "experiments.a.header"),
        (STEPS | {"control": "none"}, "control must be an arm that is drawn, one of control, fast, not 'none'"),
        ({"arms": {"control": {}}}, "at least 2 items"),
        ({"arms": {"control": {}, "b": {"weight": 0}}}, "experiments.a.arms.b.weight"),
        ({"arms": {"control": {}, "b": {"weight": -1}}}, "experiments.a.arms.b.weight"),
        ({"arms": {"control": {}, "b": {"shadow": True, "weight": 2}}}, "at most 1, not 2"),
        ({"arms": {"control": {"shadow": True}, "b": {}}}, "control must be an arm that is drawn"),
        ({"arms": {"control": {}, "b": {"stpes": 4}}}, "experiments.a.arms.b.stpes"),
        ({"arms": {"control": {}, "b": {"steps": 151}}}, "experiments.a.arms.b.steps: must be between 1 and 150"),
        ({"arms": {"control": {}, "b": {"width": 100}}}, "experiments.a.arms.b.width: must be a multiple of 8"),
        ({"arms": {"control": {}, "b": {"sampler": "eular"}}}, "experiments.a.arms.b.sampler: unknown sampler"),
        ({"arms": {"control": {}, "b": {"sampler": "euler_a", "schedule": "karras"}}}, "experiments.a.arms.b.schedule"),
        ({"arms": {"control": {}, "b": {"hires": {"scael": 2}}}}, "scael"),
        ({"arms": {"control": {}, "b": {"model": "sd21"}}}, "experiments.a.arms.b.model: there is no model 'sd21'"),
        (STEPS | {"guard": {}}, "max_error_rate or max_p95_s must be said"),
        (STEPS | {"guard": {"max_error_rate": 0.1, "window": 20, "least": 21}}, "least must be at most window"),
        (STEPS | {"guard": {"max_p95_s": 0}}, "experiments.a.guard.max_p95_s"),
    ],
)
def test_a_mistake_is_refused_and_named(experiment: dict[str, Any], words: str):
    assert words in refusal(a=experiment)


def test_experiments_in_each_others_way_are_refused():
    guidance = {"arms": {"control": {}, "b": {"guidance_scale": 4.0}}}
    assert "experiments.b: lets in requests that a lets in too" in refusal(a=STEPS, b=guidance)
    assert "decides what a decides too: steps" in refusal(a=STEPS, b=STEPS | {"layer": "other"})
    assert catalogue(a=STEPS, b=guidance | {"layer": "other"})
    assert catalogue(a=STEPS, b=STEPS | {"enabled": False})
    model, ink = (
        {"arms": {"control": {}, "b": one}} for one in ({"model": "sdxl"}, {"adapters": [{"name": "crescent"}]})
    )
    assert "experiments.b: and a let in the same requests" in refusal(a=model, b=ink | {"layer": "other"})
    assert catalogue(a=model | {"keys": ["ada"]}, b=ink | {"keys": ["bob"]})
    other = guidance | {"layer": "other"}
    assert "experiments.b.salt: is that of a" in refusal(a=STEPS | {"salt": "2026"}, b=other | {"salt": "2026"})
    assert "experiments.b.salt: is that of a" in refusal(a=STEPS, b=other | {"salt": "a"})
    assert catalogue(a=STEPS | {"salt": "2026"}, b=other | {"salt": "2027"})
    assert catalogue(a=STEPS | {"keys": ["ada"]}, b=STEPS | {"keys": ["bob"]})
    assert "lets in" in refusal(a=STEPS | {"keys": ["ada", "bob"]}, b=STEPS | {"keys": ["bob"]})
    assert catalogue(a=STEPS | {"header": "X-Plan=free"}, b=STEPS | {"header": "x-plan=paid"})
    assert "lets in" in refusal(a=STEPS | {"header": "X-Plan=free"}, b=STEPS | {"header": "X-Team=b"})


def test_the_version_is_that_of_the_rules_of_assignment():
    def version(**changes: Any) -> str:
        return ExperimentSettings.model_validate(STEPS | changes).version

    assert version() == version(share=0.5) == version(keys=["ada"]) == version(guard={"max_p95_s": 1})
    others = [
        version(salt="x"),
        version(unit="session"),
        version(arms={"control": {"weight": 2}, "fast": {"steps": 4}}),
        version(arms={"control": {}, "fast": {"steps": 5}}),
    ]
    assert len({version(), *others}) == 5
    assert version(arms=STEPS["arms"] | {"beside": {"shadow": True, "steps": 50}}) == version()
