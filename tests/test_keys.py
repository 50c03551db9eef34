"""Which specs share a key, and what is told of two that differ."""

import hashlib
from pathlib import Path

import pytest

from semformer.keys import StageKey, differences, ends, to_make
from semformer.store import Store
from semformer.store.reasons import reasons
from tests.artifacts import SPEC, build, caae, make_weights, segmentor, visible, why


def test_digest_is_the_sha256_of_canonical_json():
    key = StageKey("caae", {"stage": "caae", "seed": 0, "params": {"b": (1, 2.5), "a": None}})
    text = '{"params":{"a":null,"b":[1,2.5]},"seed":0,"stage":"caae"}'
    assert key.digest == hashlib.sha256(text.encode()).hexdigest()
    assert key.short == key.digest[:12]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"x": 1, "y": {"p": 2, "q": 3}}, {"y": {"q": 3, "p": 2}, "x": 1}),
        ({"x": (1, (2, 3))}, {"x": [1, [2, 3]]}),
        ({"x": 0.1}, {"x": 0.1000000000000000055}),
        ({"x": 1e-3}, {"x": 0.001}),
        ({"x": "é"}, {"x": "\u00e9"}),
    ],
)
def test_equal_values_have_equal_keys(a, b):
    assert StageKey("caae", a) == StageKey("caae", b)
    assert len({StageKey("caae", a), StageKey("caae", b)}) == 1


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"x": 0.1}, {"x": 0.1 + 1e-17 + 1.4e-17}),
        ({"x": 1}, {"x": True}),
        ({"x": "1"}, {"x": 1}),
        ({"x": None}, {}),
        ({"x": [1, 2]}, {"x": [2, 1]}),
        ({"x": {"y": 1}}, {"y": {"x": 1}}),
        ({"x": "a,b"}, {"x": ["a", "b"]}),
    ],
)
def test_different_values_have_different_keys(a, b):
    assert StageKey("caae", a) != StageKey("caae", b)


def test_the_stage_is_part_of_the_key():
    assert StageKey("caae", {"x": 1}) != StageKey("cams", {"x": 1})
    with pytest.raises(ValueError, match="says stage caae"):
        StageKey("cams", SPEC)
    for name in ("tmp", "leases", "../up", "", "A"):
        with pytest.raises(ValueError, match="cannot name a stage"):
            StageKey(name, {})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), Path("x"), {1: 2}, {1, 2}, b"x"])
def test_what_json_cannot_hold_is_refused_by_name(value):
    with pytest.raises((ValueError, TypeError), match="params, odd"):
        caae(odd=value)


def test_a_key_does_not_follow_later_changes_of_its_spec():
    params = {"depth": 8}
    key = StageKey("caae", {"params": params})
    params["depth"] = 4
    assert key.spec["params"]["depth"] == 8
    assert key == StageKey("caae", {"params": {"depth": 8}})


def test_why_names_what_changed_since_the_nearest_artifact(store):
    assert why(store, caae()) == "nothing published for this stage yet"
    build(store, caae(), make_weights)
    build(store, caae(decoder_depth=2, merge="max"), make_weights)
    assert why(store, caae()) == "already published"
    assert why(store, caae(decoder_depth=8.0)) == "caae.decoder_depth 8 -> 8.0"
    assert why(store, caae(decoder_depth=4)) == "caae.decoder_depth 8 -> 4"
    assert why(store, caae(merge="max", decoder_depth=3)) == "caae.decoder_depth 2 -> 3"
    assert why(store, caae(lr=0.2, merge="mean")) == "caae.lr 0.1 -> 0.2, caae.merge sum -> mean"
    assert why(store, caae(extra=[1, 2])) == "caae.extra unset -> [1, 2]"
    assert why(store, StageKey("caae", {**SPEC, "seed": 1})) == "seed 0 -> 1"
    assert why(store, StageKey("caae", {**SPEC, "version": 2})) == "caae code version 1 -> 2"
    assert why(store, StageKey("caae", {**SPEC, "data": {"train": "d1"}})) == "data train changed"
    assert why(store, caae(a=1, b=1, c=1, d=1, e=1, f=1)).endswith("caae.d unset -> 1, and 2 more")
    assert visible(Store(store.root)) != []


def test_why_looks_into_changed_inputs(store):
    build(store, caae(), make_weights)
    build(store, segmentor(caae()), make_weights)
    changed = caae(decoder_depth=4)

    inside = "input caae changed (decoder_depth 8 -> 4)"
    assert why(store, segmentor(changed)) == "input caae changed"  # nothing is known of this input
    told = reasons(store, [changed, segmentor(changed), segmentor(changed, sigma=0.2), caae()])
    assert list(told.values()) == [
        "caae.decoder_depth 8 -> 4",
        inside,
        f"{inside}, segmentor.sigma 0.1 -> 0.2",
        "already published",
    ]

    def cams(source):
        return StageKey("cams", {"stage": "cams", "params": {}, "inputs": {"segmentor": source.digest}})

    build(store, cams(segmentor(caae())), make_weights)
    build(store, changed, make_weights)
    build(store, segmentor(changed), make_weights)
    fresh = Store(store.root)
    assert why(fresh, cams(segmentor(changed))) == f"input segmentor changed ({inside})"


def test_why_compares_with_the_artifact_whose_inputs_are_nearest(store):
    near, far = caae(decoder_depth=8), caae(decoder_depth=2, merge="max", lr=0.5)
    for source in (near, far):
        build(store, source, make_weights)
        build(store, segmentor(source), make_weights)
    wanted = caae(decoder_depth=4)
    told = reasons(store, [wanted, segmentor(wanted)])
    assert told[segmentor(wanted)] == "input caae changed (decoder_depth 8 -> 4)"


def test_why_of_many_asks_the_store_for_none_of_them(either, monkeypatch):
    build(either, caae(), make_weights)
    requests, real = [], either.storage.retry
    monkeypatch.setattr(either.storage, "retry", lambda call: requests.append(call) or real(call))
    told = reasons(either, [caae(lr=n) for n in range(100)])
    assert {why.partition(" 0.1 -> ")[0] for why in told.values()} == {"caae.lr"}
    assert len(requests) < 10


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ({"params": {"a": 1}}, {"params": {}}, "net.a 1 -> unset"),
        ({"params": {}}, {"params": {"a": 1}}, "net.a unset -> 1"),
        ({"params": {"a": 1}}, {"params": {"a": 1.0}}, "net.a 1 -> 1.0"),
        (
            {"inputs": {}, "params": {"a": 1}},
            {"inputs": {"x": "0"}, "params": {"a": 2}},
            "input x changed, net.a 1 -> 2",
        ),
        ({"data": {"images.of": 1}}, {"data": {"images.of": 2}}, "data images.of changed"),
        ({"version": 1, "seed": 0}, {"version": 2, "seed": 1}, "seed 0 -> 1, net code version 1 -> 2"),
        ({"seed": "x" * 40}, {"seed": "y" * 41}, f"seed {'x' * 40} -> {'y' * 37}..."),
    ],
)
def test_what_differs_is_told_in_words(old, new, told):
    assert differences("net", old, new, lambda digest: None, prefix="net.") == told


@pytest.mark.parametrize(("n", "more"), [(3, ""), (4, ""), (5, ", and 1 more"), (7, ", and 3 more")])
def test_four_differences_are_told_and_how_many_more_there_are(n, more):
    specs = [{"params": dict.fromkeys("abcdefg"[:n], value)} for value in (0, 1)]
    four = ", ".join(f"{name} 0 -> 1" for name in "abcd"[:n])
    assert differences("net", *specs, lambda digest: None) == four + more


def test_differences_of_an_input_are_told_inside_it_under_its_own_name():
    specs = {"0": {"version": 1}, "1": {"version": 2}}
    told = differences("net", {"inputs": {"caae": "0"}}, {"inputs": {"caae": "1"}}, specs.get)
    assert told == "input caae changed (caae code version 1 -> 2)"


@pytest.fixture
def branches() -> dict[str, StageKey]:
    """a -> b -> c, and b -> d -> e, e needs a as well."""
    inputs = {"a": "", "b": "a", "c": "b", "d": "b", "e": "ad"}
    keys: dict[str, StageKey] = {}
    for name, needed in inputs.items():
        keys[name] = StageKey(name, {"stage": name, "inputs": {one: keys[one].digest for one in needed}})
    return keys


def test_the_ends_are_what_nothing_else_needs(branches):
    assert ends(branches) == ["c", "e"]
    assert ends({name: branches[name] for name in "ab"}) == ["b"]
    assert ends({}) == []
    unknown = {name: StageKey(name, {"stage": name}) for name in "xyz"}
    assert ends(unknown) == ["z"], "one that tells no inputs may need all before it"


@pytest.mark.parametrize(
    ("there", "made"),
    [
        ("", "abcde"),
        ("ce", ""),
        ("c", "abde"),
        ("cd", "ae"),
        ("cad", "e"),
        ("e", "abc"),
        ("eb", "c"),
        ("abd", "ce"),
    ],
)
def test_what_must_be_made_is_resolved_from_the_ends(branches, there, made):
    asked = []
    found = to_make(branches, lambda key: asked.append(key.stage) or key.stage in there)
    assert [key.stage for key in found] == list(made)
    assert len(asked) == len(set(asked))
    if there == "ce":
        assert sorted(asked) == ["c", "e"], "what nothing missing needs is not looked for"
