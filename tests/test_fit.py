"""Whether several trials fit into a GPU's memory: judged by stages like theirs, as far as these were measured."""

import pytest

from semformer import pipeline
from semformer.config import load_config
from semformer.errors import UserError
from semformer.keys import StageKey
from sweeps.plan.packing import check_packing
from tests.artifacts import publish

GIB = 2**30


@pytest.fixture(scope="module")
def keys_of():
    """keys_of("tiny", **{"caae.epochs": 3}): the keys of a config's stages, by name."""
    data = pipeline.open_data(load_config("micro"), None)
    return lambda preset="micro", **changes: pipeline.stage_keys(load_config(preset, changes), data)


@pytest.fixture
def measure(store):
    """measure(keys, caae=9.5): publish stages that took so many GiB."""

    def measure(keys, device="cuda", **gib):
        for stage, key in keys.items():
            memory = {"device": device, "name": "a GPU", "peak_bytes": int(gib.get(stage, 0) * GIB)}
            publish(store, key, seconds=1.0, **({"memory": memory} if stage in gib else {}))

    return measure


@pytest.fixture(scope="module")
def all_keys_of():
    """As `keys_of`, of the whole pipeline."""
    data = pipeline.open_data(load_config("micro"), None)

    def all_keys_of(**changes):
        config = load_config("micro", changes)
        return pipeline.stage_keys(config, data, pipeline.ends(config, "deeplab"))

    return all_keys_of


def checked(keys, store, share=0.25) -> str:
    return check_packing(keys.values(), store, gpus_per_trial=share, gpu_bytes=40 * GIB)


def test_packing_that_fits_says_on_what_grounds(keys_of, store, measure):
    measure(keys_of(), caae=9.5, segmentor=3.0, cams=1.0)
    assert checked(keys_of(), store) == "4 trials fit into a GPU of 40.0 GiB: caae takes up to 10.0 GiB"


@pytest.mark.parametrize(("gib", "hint"), [(19.5, "--gpus-per-trial 0.5 fits"), (12.5, "0.34 fits"), (50, "not even")])
def test_packing_that_does_not_fit_is_refused_with_one_that_does(keys_of, store, measure, gib, hint):
    measure(keys_of(), segmentor=gib)
    with pytest.raises(UserError, match=rf"4 trials do not fit .* segmentor takes up to .*{hint}"):
        checked(keys_of(), store)


def test_on_a_cluster_that_has_no_gpu_yet_nothing_is_refused(keys_of, store, measure):
    measure(keys_of(), caae=9.5)
    told = check_packing(keys_of().values(), store, gpus_per_trial=0.25, gpu_bytes=0)
    assert told == "caae takes up to 10.0 GiB; whether 4 trials fit into a GPU's memory is unknown: there is no GPU yet"


def test_what_a_larger_network_took_says_nothing(keys_of, store, measure):
    measure(keys_of("tiny"), caae=30, segmentor=30, cams=30)
    assert "unknown" in checked(keys_of(), store)
    measure(keys_of(), caae=1, segmentor=1, cams=1)
    assert "takes up to 1.5 GiB" in checked(keys_of(), store)


@pytest.mark.parametrize(
    "changes",
    [
        {"caae.epochs": 7, "segmentor.epochs": 7},
        {"caae.optimizer.lr": 0.1, "caae.merge": "max"},
        {"segmentor.sigma": 0.5, "segmentor.losses": "CF,SS"},
        {"cams.final_map": "attention", "seed": 3},
    ],
)
def test_stages_that_differ_in_what_takes_no_memory_are_alike(keys_of, store, measure, changes):
    measure(keys_of(**changes), caae=30, segmentor=3, cams=3)
    with pytest.raises(UserError, match="caae takes up to 30"):
        checked(keys_of(), store)


@pytest.mark.parametrize(
    ("changes", "unknown"),
    [
        ({"caae.batch_size": 4}, "caae"),
        ({"caae.decoder_depth": 2}, "caae"),
        ({"caae.class_dim": 4}, "caae"),
        ({"caae.image_size": 64}, "caae, segmentor"),
        ({"segmentor.batch_size": 4}, "segmentor"),
        ({"segmentor.backbone": "vit_wiring_patch8_32", "cams.last_blocks": 2}, "segmentor, cams"),
        ({"cams.scales": "0.5,2.0"}, "cams"),
    ],
)
def test_what_was_measured_of_no_stage_alike_is_told(keys_of, store, measure, changes, unknown):
    measure(keys_of(), caae=1, segmentor=1, cams=1)
    assert checked(keys_of(**changes), store).endswith(f"takes up to 1.5 GiB; unknown of {unknown}")
    assert "unknown: nothing" in checked(keys_of(precision="bfloat16"), store)


SCORING = {"evaluate", "evaluate_masks", "evaluate_seg"}


def test_all_stages_of_the_whole_pipeline_are_measured(all_keys_of, store, measure):
    networks = [stage.name for stage in pipeline.STAGES if stage.name not in SCORING]
    assert "unknown: nothing" in checked(all_keys_of(), store)
    for number, stage in enumerate(networks):
        measure({stage: all_keys_of()[stage]}, **{stage: number})
        told = f"{stage} takes up to {number + 0.5:.1f} GiB"
        unknown = f"; unknown of {', '.join(networks[number + 1 :])}" if stage != networks[-1] else ""
        assert check_packing(all_keys_of().values(), store, gpus_per_trial=0.5, gpu_bytes=40 * GIB).endswith(
            told + unknown
        )


@pytest.mark.parametrize(
    ("changes", "unknown"),
    [
        ({"affinity.epochs": 7, "deeplab.optimizer.lr": 0.1, "walk.beta": 3, "seed": 3, "segmentation.flip": True}, ""),
        ({"cams.scales": "0.5,2.0"}, "cams, train_cams"),
        ({"affinity_labels.crf.bilateral_sxy": 3}, "affinity_labels"),
        ({"affinity.radius": 3}, "affinity"),
        ({"affinity.image_size": 64}, "affinity, walk"),
        ({"affinity.frozen": True}, "affinity"),
        ({"walk.radius": 3}, "walk"),
        ({"pseudo_masks.crf.iterations": 0}, "pseudo_masks"),
        ({"deeplab.head_width": 8}, "deeplab, segmentation"),
        ({"deeplab.batch_size": 4}, "deeplab"),
        ({"segmentation.scales": "2.0"}, "segmentation"),
    ],
)
def test_what_takes_other_memory_in_the_whole_pipeline_is_unknown(all_keys_of, store, measure, changes, unknown):
    measure(all_keys_of(), **dict.fromkeys(all_keys_of().keys() - SCORING, 1))
    told = checked(all_keys_of(**changes), store)
    assert told.partition("; unknown of ")[2] == unknown


def test_the_largest_of_several_that_are_alike_counts(keys_of, store, measure):
    for seed, gib in enumerate((3, 5, 4)):
        measure(keys_of(seed=seed), segmentor=gib)
    assert "segmentor takes up to 5.5 GiB" in checked(keys_of(seed=9), store)


def test_packing_is_judged_by_what_was_measured_on_a_gpu(keys_of, store, measure):
    measure(keys_of(), device="cpu", caae=500, segmentor=500)
    assert "unknown" in checked(keys_of(), store, share=0.5)
    for share in (0, 1, 2):
        assert checked(keys_of(), store, share=share) == "no GPU is shared"


def test_what_was_measured_long_ago_is_found_where_it_is_asked_for(keys_of, store, measure, monkeypatch):
    monkeypatch.setattr("sweeps.plan.packing.SAMPLE", 2)
    measure(keys_of(), caae=30)
    for seed in range(1, 4):
        spec = keys_of(seed=seed)["caae"].spec
        publish(store, StageKey("caae", {**spec, "params": {**spec["params"], "batch_size": 2}}), seconds=1.0)
    assert "unknown" in checked(keys_of(seed=1), store)
    with pytest.raises(UserError, match="caae takes up to 30"):
        checked(keys_of(), store)
