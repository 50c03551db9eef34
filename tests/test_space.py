"""What a search varies: axes scaled to the preset, axes of the user's own, objectives."""

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from semformer import pipeline
from semformer.config import load_config
from semformer.errors import UserError
from sweeps.search.space import AXES, own_value, read_axes, read_objectives


@pytest.mark.parametrize(
    ("axis", "values"),
    [
        ("losses", ["CF,SS", "CF,CB,SS", "CF,AS,SS", "CF,AC,SS", "CF,CB,AS,SS", "CF,CB,AC,SS", "CF,CB,AS,AC,SS"]),
        ("merge", ["sum", "mean", "max"]),
        ("decoder_depth", [2, 4, 8, 10]),
        ("D", [32, 128, 256, 512]),
        ("decoder_width", [384, 576, 768, 1152]),
        ("U", [1, 2, 3, 4, 5, 6, 7]),
        ("final_map", ["activation", "attention", "both"]),
        ("sigma", [0.025, 0.05, 0.075, 0.1]),
    ],
)
def test_in_preset_paper_an_axis_holds_the_values_of_the_papers_table(axis, values):
    _, axes = read_axes([axis], "paper", {})
    for value in values:
        optuna.create_trial(value=0, params={axis: value}, distributions={axis: axes[axis].distribution})


@pytest.mark.parametrize("preset", ["micro", "tiny", "paper"])
def test_both_ends_of_every_axis_make_a_sound_config_in_every_preset(preset):
    start, axes = read_axes(tuple(AXES), preset, {})
    for name, axis in axes.items():
        ends = getattr(axis.distribution, "choices", None) or (axis.distribution.low, axis.distribution.high)
        assert len(set(ends)) > 1
        for value in (*ends, own_value(start, axis.field)):
            config = load_config(preset, {axis.field: value})
            pipeline.check(config)
            assert own_value(config, axis.field) == value, name


def test_any_field_can_be_an_axis_with_values_of_its_type():
    axes = ["segmentor.token_dropout=0:0.8", "sigma=0.05:0.4:log", "caae.decoder_depth=1:3", "caae.reconstruction=1|0"]
    _, read = read_axes(axes, "tiny", {})
    assert {name: axis.distribution for name, axis in read.items()} == {
        "segmentor.token_dropout": FloatDistribution(0.0, 0.8),
        "sigma": FloatDistribution(0.05, 0.4, log=True),
        "caae.decoder_depth": IntDistribution(1, 3),
        "caae.reconstruction": CategoricalDistribution((True, False)),
    }


def test_the_ranges_move_with_the_config_that_the_search_starts_from():
    _, axes = read_axes(["D"], "tiny", {"caae.class_dim": "80"})
    assert axes["D"].distribution.choices == (10, 20, 40, 80, 160)


@pytest.mark.parametrize(
    ("axes", "told"),
    [
        (["sgma"], "did you mean sigma?"),
        (["segmentor.sigm"], "did you mean segmentor.sigma"),
        (["sigma", "segmentor.sigma=0.1:0.3"], "are the same field, segmentor.sigma"),
        (["segmentor.token_dropout"], "say which values"),
        (["U=1:2.5"], "valid integer"),
        (["U=1:9:lag"], "write LOW:HIGH"),
        (["sigma=0.3:0.1"], "low <= high"),
        (["sigma=0:1:log"], "low > 0"),
        (["sigma=1:2"], "starts from segmentor.sigma = 0.075"),
        (["merge=sum|men"], "caae.merge = 'men'"),
        (["merge=1:2"], "caae.merge = '1'"),
        (["precision=float32:bfloat16"], "holds no number"),
        (["seed=0:9"], "cannot be compared"),
        ([], "names no axis"),
    ],
)
def test_axes_that_make_no_sense_are_refused(axes, told):
    with pytest.raises(UserError, match=told):
        read_axes(axes, "tiny", {})


def test_objectives_have_the_direction_of_their_nature():
    config = load_config("tiny")
    names = ["cam/val/miou", "cam/val/fp", "gpu_hours"]
    assert list(read_objectives(names, config).values()) == ["maximize", "minimize", "minimize"]
    assert list(read_objectives([], config)) == ["cam/val/miou"]
    for wrong in (["miou"], ["cam/test/miou"], ["gpu_hours", "gpu_hours"]):
        with pytest.raises(UserError, match="objectives"):
            read_objectives(wrong, config)
