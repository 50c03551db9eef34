"""Presets, overrides and keys of the configuration."""

import pytest

from semformer.config import PRESETS, field_names, flatten, load_config, parse_overrides
from semformer.errors import UserError


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid(preset):
    assert set(flatten(load_config(preset))) >= {"seed", "segmentor.sigma", "caae.class_dim", "cams.last_blocks"}


def test_paper_preset_has_the_values_of_section_4_1():
    config = load_config("paper")
    assert (config.caae.backbone, config.caae.image_size) == ("deit_base_distilled_patch16_224", 224)
    assert (config.caae.epochs, config.caae.batch_size, config.caae.optimizer.lr) == (200, 64, 0.025)
    assert (config.segmentor.backbone, config.segmentor.image_size) == ("deit_small_patch16_224", 448)
    assert (config.segmentor.epochs, config.segmentor.batch_size, config.segmentor.optimizer.lr) == (20, 8, 0.005)
    assert (config.segmentor.sigma, config.cams.last_blocks, config.caae.class_dim) == (0.075, 4, 256)


def test_text_is_read_as_the_type_of_its_field():
    text = ["seed=7", "segmentor.losses=SS,CF,SS", "segmentor.sigma = 0.05 ", "caae.reconstruction=false"]
    config = load_config("tiny", parse_overrides([*text, "cams.scales=1,2"]))
    assert config.seed == 7
    assert config.segmentor.losses == ("CF", "SS")
    assert config.segmentor.sigma == 0.05
    assert config.caae.reconstruction is False
    assert config.cams.scales == (1.0, 2.0)


def test_what_a_group_does_not_name_stays_the_presets():
    changed, preset = load_config("tiny", {"caae.optimizer": {"lr": 0.1}}), load_config("tiny")
    assert changed.caae.optimizer == preset.caae.optimizer.model_copy(update={"lr": 0.1})


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"segmentor.sigm": 0.1}, r"unknown field 'segmentor.sigm': did you mean segmentor.sigma"),
        ({"sigma": 0.1}, r"did you mean segmentor.sigma"),
        ({"caae.class_dim": 0}, r"caae.class_dim = 0: input should be greater than 0"),
        ({"caae.class_dim": "many"}, r"caae.class_dim = 'many': .*integer"),
        ({"caae.merge": "median"}, r"caae.merge = 'median': input should be 'sum', 'mean' or 'max'"),
        ({"segmentor.losses": "CF,XX"}, r"segmentor.losses = 'XX'"),
        ({"segmentor.losses": [["CF"]]}, r"segmentor.losses = \['CF'\]"),
        ({"segmentor.losses": ""}, r"segmentor.losses is empty"),
        ({"segmentor.sigma": "nan"}, r"segmentor.sigma"),
        ({"evaluate.erosion": 4}, r"evaluate.erosion must be odd"),
        ({"evaluate.thresholds": "0.5,0.1,0.01"}, r"FIRST,LAST,STEP"),
        ({"evaluate.thresholds": "0.5,1.5,0.01"}, r"LAST <= 1"),
        ({"evaluate.fixed_threshold": 25}, r"evaluate.fixed_threshold = 25: input should be less than or equal to 1"),
        ({"evaluate.pictures": 5}, r"evaluate.pictures = 5: input should be less than or equal to 4"),
        ({"segmentor.token_dropout": 1}, r"segmentor.token_dropout = 1: input should be less than 1"),
        ({"segmentor.optimizer": {"speed": 3}}, r"segmentor.optimizer.speed"),
        (
            {"segmentor.optimizer": "5", "segmentor.optimizer.lr": "1"},
            r"segmentor.optimizer is a group .*optimizer.name",
        ),
        ({"data.shapes": {"train": 0}}, r"data.shapes.train = 0: input should be greater than 0"),
        ({"data.shapes.size": 31}, r"data.shapes.size = 31: input should be greater than or equal to 32"),
        ({"caae": "5"}, r"caae is a group of fields, such as caae.backbone"),
        ({"segmentor.sigma": {"a": 1}}, r"segmentor.sigma is one value, not a group"),
        ({"caae.epochs": {"a": 1}}, r"caae.epochs is one value, not a group"),
        ({"caae.enlarge": "0,1"}, r"caae.enlarge = '0': input should be greater than 0"),
        ({"caae.enlarge": "3,1"}, r"caae.enlarge must be FROM,TO with FROM <= TO, not \(3.0, 1.0\)"),
        ({"caae.crop_area": "0.5,1.2"}, r"caae.crop_area must be fractions of at most 1"),
        ({"caae.crop_area": "-1,-1"}, r"caae.crop_area = '-1'"),
        ({"segmentor.long_side": "90,40"}, r"segmentor.long_side must be FROM,TO"),
        ({"segmentor.long_side": "0,40"}, r"segmentor.long_side = '0'"),
        ({"caae.color_jitter": "0,0,0,0.6"}, r"caae.color_jitter = '0.6': .*less than or equal to 0.5"),
        ({"segmentor.color_jitter": "-1,0,0,0"}, r"segmentor.color_jitter = '-1'"),
        ({"cams.scales": "1,0"}, r"cams.scales = '0'"),
        ({"cams.scales": ""}, r"cams.scales"),
        ({"seed": 2**32}, r"seed = 4294967296: input should be less than 4294967296"),
        ({"caae.optimizer.lr": 1e300}, r"caae.optimizer.lr"),
        ({"evaluate.thresholds": "0.1,0.4,5e-324"}, r"evaluate.thresholds must be at most 1000: use a larger step"),
    ],
)
def test_bad_values_name_the_field_and_what_is_wanted(overrides, told):
    with pytest.raises(UserError, match=told):
        load_config("tiny", overrides)


def test_assignment_without_a_value_is_refused():
    with pytest.raises(UserError, match="FIELD=VALUE"):
        parse_overrides(["segmentor.sigma"])


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(UserError, match="micro"):
        load_config("huge")


@pytest.mark.parametrize(
    ("thresholds", "tried"),
    [
        ("0.1,0.36,0.1", (0.1, 0.2, 0.3)),
        ("0.1,0.3,0.1", (0.1, 0.2, 0.3)),
        ("0.1,0.1,1", (0.1,)),
        ("0.1,0.4,0.01", tuple(round(0.01 * n, 2) for n in range(10, 41))),
    ],
)
def test_thresholds_end_with_the_last_or_before_it(thresholds, tried):
    assert load_config("micro", {"evaluate.thresholds": thresholds}).evaluate.threshold_values() == tried


def test_field_names_that_others_rely_on():
    promised = (
        "seed caae.backbone caae.merge caae.decoder_depth caae.decoder_width caae.class_dim caae.reconstruction "
        "segmentor.losses segmentor.sigma cams.last_blocks cams.final_map"
    )
    assert set(promised.split()) <= set(field_names())


def key_of(stage: str, **changes) -> dict:
    return getattr(
        load_config("tiny", {name.replace("__", "."): v for name, v in changes.items()}), stage
    ).key_parameters()


def test_key_ignores_what_cannot_change_the_result():
    without_as = {"segmentor__losses": "CF,CB"}
    assert key_of("segmentor", **without_as, segmentor__sigma=0.1) == key_of("segmentor", **without_as)
    assert key_of("segmentor", segmentor__sigma=0.1) != key_of("segmentor")
    no_decoder = {"caae__reconstruction": False}
    assert key_of("caae", **no_decoder, caae__decoder_depth=4) == key_of("caae", **no_decoder)
    assert key_of("caae", caae__decoder_depth=4) != key_of("caae")
    assert key_of("segmentor", segmentor__losses="SS,AC,AS,CB,CF") == key_of("segmentor")
    sgd = {"caae__optimizer": {"name": "sgd"}}
    assert key_of("caae", caae__optimizer={"momentum": 0.5}) == key_of("caae"), "AdamW has none"
    assert key_of("caae", **sgd) != key_of("caae", **sgd, caae__optimizer__momentum=0.5)


def test_weights_files_count_by_content(tmp_path):
    first, second = tmp_path / "a.pth", tmp_path / "b.pth"
    first.write_bytes(b"weights")
    second.write_bytes(b"weights")
    assert key_of("caae", caae__weights=str(first)) == key_of("caae", caae__weights=str(second))
    second.write_bytes(b"others")
    assert key_of("caae", caae__weights=str(first)) != key_of("caae", caae__weights=str(second))
    with pytest.raises(UserError, match=r"nowhere\.pth"):
        key_of("caae", caae__weights="nowhere.pth")
