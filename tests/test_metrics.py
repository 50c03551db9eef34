"""Scores at all thresholds against the obvious loop (tests/test_golden.py has the golden numbers)."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from semformer.data.voc import IGNORE
from semformer.errors import UserError
from semformer.metrics import ThresholdCurve, confusion, label_ap, label_map_metrics, scores


def obvious_prediction(maps, classes, threshold):
    """The definition: arg-max over a constant background channel and the maps."""
    background = np.full((1, *maps.shape[1:]), threshold, dtype=maps.dtype)
    return np.array([0, *classes])[np.concatenate([background, maps]).argmax(axis=0)]


def obvious_erosion(prediction, side):
    """Pixel by pixel: a label stays where the window, as far as it lies in the image, holds no other."""
    eroded, r = np.zeros_like(prediction), side // 2
    for y, x in np.ndindex(*prediction.shape):
        window = prediction[max(y - r, 0) : y + r + 1, max(x - r, 0) : x + r + 1]
        if (window == prediction[y, x]).all():
            eroded[y, x] = prediction[y, x]
    return eroded


def obvious_confusion(images, n_classes, thresholds, erosion=0):
    confusion = np.zeros((len(thresholds), n_classes, n_classes), dtype=np.int64)
    for k, threshold in enumerate(thresholds):
        for maps, classes, truth in images:
            prediction = obvious_prediction(maps, classes, threshold)
            if erosion:
                prediction = obvious_erosion(prediction, erosion)
            counted = truth != 255
            np.add.at(confusion[k], (truth[counted], prediction[counted]), 1)
    return confusion


def random_image(rng, n_classes, dtype=np.float32, size=None, blocks=1):
    """Maps half made of tenths, which tie with thresholds and with each other; a mask with 255."""
    height, width = size or rng.integers(1, 24, size=2)
    n_objects = rng.integers(0, n_classes)
    classes = rng.permutation(np.arange(1, n_classes))[:n_objects]
    maps = rng.integers(0, 11, size=(n_objects, height, width)) / 10
    maps = np.where(rng.random(maps.shape) < 0.5, maps, rng.random(maps.shape)).astype(dtype)
    maps = maps.repeat(blocks, axis=1).repeat(blocks, axis=2)
    truth = rng.choice([0, *range(n_classes), IGNORE], size=maps.shape[1:]).astype(np.uint8)
    return maps, classes, truth


def curve_of(images, n_classes, thresholds, erosion=0):
    curve = ThresholdCurve(n_classes, thresholds, erosion=erosion)
    for image in images:
        curve.add(*image)
    return curve


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("seed", range(20))
def test_equals_the_obvious_loop(seed, dtype):
    rng = np.random.default_rng(seed)
    n_classes = int(rng.integers(2, 8))
    thresholds = [n / 20 for n in range(21)]
    images = [random_image(rng, n_classes, dtype) for _ in range(6)]
    expected = obvious_confusion(images, n_classes, thresholds)
    np.testing.assert_array_equal(curve_of(images, n_classes, thresholds).confusion(), expected)


@pytest.mark.parametrize("erosion", [1, 3, 7])
@pytest.mark.parametrize("seed", range(4))
def test_erosion_equals_the_obvious_loop(seed, erosion):
    rng = np.random.default_rng(seed)
    n_classes, thresholds = 3, [-0.5, 0.0, 0.1, 0.3, 0.35, 0.9]
    images = [random_image(rng, n_classes, size=(3, 4), blocks=7) for _ in range(3)]
    images += [random_image(rng, n_classes, size=(2, 5))]
    expected = obvious_confusion(images, n_classes, thresholds, erosion)
    assert erosion == 1 or (expected != obvious_confusion(images, n_classes, thresholds)).any()
    np.testing.assert_array_equal(curve_of(images, n_classes, thresholds, erosion).confusion(), expected)


def test_value_at_the_threshold_is_background_whichever_way_it_was_rounded():
    thresholds = [n / 100 for n in range(100)]
    rounded_up = [float(np.float32(t)) > t for t in thresholds]
    assert 0 < sum(rounded_up) < 100
    for k, t in enumerate(thresholds):
        maps = np.full((1, 2, 2), t, dtype=np.float32)
        confusion = curve_of([(maps, [1], np.ones((2, 2), np.uint8))], 2, thresholds).confusion()
        assert confusion[:, 1, 1].tolist() == [4] * k + [0] * (100 - k)


def test_as_many_classes_as_labels_can_name():
    rng = np.random.default_rng(0)
    maps, truth = rng.random((254, 3, 4), dtype=np.float32), np.arange(12, dtype=np.uint8).reshape(3, 4)
    images, thresholds = [(maps, range(254, 0, -1), truth)], [n / 20 for n in range(21)]
    expected = obvious_confusion(images, 255, thresholds)
    np.testing.assert_array_equal(curve_of(images, 255, thresholds).confusion(), expected)


def test_equal_channels_go_to_the_first_given():
    maps, truth = np.full((2, 1, 3), 0.5, dtype=np.float32), np.zeros((1, 3), np.uint8)
    assert curve_of([(maps, [3, 1], truth)], 4, [0.2]).confusion()[0, 0].tolist() == [0, 0, 0, 3]


def test_image_without_objects_is_background_even_below_negative_thresholds():
    image = np.zeros((0, 2, 3), np.float32), [], np.array([[0, 0, 1], [2, 255, 0]], np.uint8)
    expected = [[3, 0, 0], [1, 0, 0], [1, 0, 0]]
    assert curve_of([image], 3, [-5.0, 0.5]).confusion().tolist() == [expected, expected]


def test_ignored_pixels_still_take_part_in_erosion():
    maps = np.ones((1, 3, 3), dtype=np.float32)
    maps[0, 0, 0] = 0
    truth = np.ones((3, 3), np.uint8)
    truth[0, 0] = IGNORE
    assert curve_of([(maps, [1], truth)], 2, [0.5], erosion=3).confusion()[0].tolist() == [[0, 0], [3, 5]]


def test_scores_by_hand():
    confusion = np.array([[2, 1, 0, 0], [1, 2, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    result = scores(confusion)  # unions 4, 5, 1 and, for the class that does not occur, 0
    np.testing.assert_allclose(result.iou, [50, 40, 0, 0])
    np.testing.assert_allclose(result.miou, 90 / 4)
    np.testing.assert_allclose(result.fp, (25 + 20 + 100 + 0) / 4)
    np.testing.assert_allclose(result.fn, (25 + 40 + 0 + 0) / 4)


def test_perfect_masks_score_100():
    result = scores(np.diag([1, 2, 3]))
    assert (result.miou, result.fp, result.fn) == (100, 0, 0)


def test_scores_of_a_curve_are_those_of_each_threshold():
    rng = np.random.default_rng(0)
    images, thresholds = [random_image(rng, 5) for _ in range(4)], [0.1, 0.25, 0.4]
    found = curve_of(images, 5, thresholds).scores()
    for k, counts in enumerate(obvious_confusion(images, 5, thresholds)):
        assert found.miou[k] == scores(counts).miou
        np.testing.assert_array_equal(found.iou[k], scores(counts).iou)


MAPS, TRUTH = np.zeros((2, 3, 4), np.float32), np.zeros((3, 4), np.uint8)
NAN_AT_ONE_PIXEL = np.where(np.arange(12).reshape(3, 4) == 7, np.nan, MAPS[1])


@pytest.mark.parametrize(
    ("maps", "classes", "truth", "message"),
    [
        (MAPS, [1, 2], TRUTH[:, :3], r"cat: the mask is \(3, 3\) but the prediction is \(3, 4\)"),
        (MAPS, [1, 2], TRUTH.astype(np.int64), "cat: the mask must be uint8"),
        (MAPS, [1, 2], TRUTH + np.uint8(5), r"cat: the mask has labels outside 0\.\.4"),
        (MAPS, [1], TRUTH, "cat: 2 activation maps need as many classes"),
        (MAPS, [1, 1], TRUTH, r"cat: classes must be distinct and within 1\.\.4"),
        (MAPS, [0, 1], TRUTH, r"cat: classes must be distinct and within 1\.\.4"),
        (MAPS, [1, 5], TRUTH, r"cat: classes must be distinct and within 1\.\.4"),
        (MAPS[0], [1, 2, 3], TRUTH, r"cat: activation maps must be floats \(C, H, W\)"),
        (MAPS.astype(np.uint8), [1, 2], TRUTH, r"cat: activation maps must be floats \(C, H, W\)"),
        (MAPS * np.float32("nan"), [1, 2], TRUTH, "cat: the activation maps contain NaN"),
        (np.stack([MAPS[0], NAN_AT_ONE_PIXEL]), [1, 2], TRUTH, "cat: the activation maps contain NaN"),
    ],
)
def test_bad_image_is_named_and_not_counted(maps, classes, truth, message):
    curve = ThresholdCurve(5, [0.5])
    with pytest.raises(UserError, match=message):
        curve.add(maps, classes, truth, name="cat")
    assert not curve.confusion().any()


def test_nothing_to_score_raises():
    with pytest.raises(UserError, match="nothing to score"):
        ThresholdCurve(5, [0.5]).scores()
    with pytest.raises(UserError, match="nothing to score"):
        curve_of([(MAPS, [1, 2], np.full((3, 4), IGNORE, np.uint8))], 5, [0.5]).scores()


def test_ap_of_labels_is_that_of_scikit_learn_at_the_best_threshold():
    rng = np.random.default_rng(0)
    labels = (rng.random((50, 21)) < 0.1).astype(np.float32)
    labels[:, 0] = 1
    similarities = np.clip(0.4 * labels + 0.6 * rng.random((50, 21)), -1, 1)
    ap = [
        np.mean([average_precision_score(y, s > t / 100) for y, s in zip(labels, similarities, strict=True)])
        for t in range(1, 100)
    ]
    assert label_ap(similarities, labels) == pytest.approx(100 * max(ap))
    assert max(ap) > ap[0] + 0.05
    assert max(ap) > ap[-1] + 0.05


@pytest.mark.parametrize(
    ("similarities", "best"),
    [
        ((0.015, 0.005), 100),  # the first threshold, 0.01, is between them
        ((0.995, 0.985), 100),  # the last, 0.99
        ((0.005, 0.0), 50),  # none
        ((0.01, 0.0), 50),  # none: what equals a threshold does not exceed it
        ((0.4, 0.4), 50),
    ],
)
def test_thresholds_of_the_ap_of_labels(similarities, best):
    assert label_ap(np.array([similarities]), np.array([[1, 0]])) == best


def test_confusion_counts_pixels():
    truth = np.array([[0, 1, 2, IGNORE], [1, 1, 0, 2]], dtype=np.uint8)
    predicted = np.array([[0, 1, 1, 1], [2, IGNORE, 1, 2]], dtype=np.uint8)
    expected = np.zeros((3, 3), dtype=int)
    for t, p in ((0, 0), (1, 1), (2, 1), (1, 2), (1, 0), (0, 1), (2, 2)):
        expected[t, p] += 1
    np.testing.assert_array_equal(confusion(truth, predicted, 3), expected)
    told = label_map_metrics(expected)
    assert told["precision"] == pytest.approx(100 * np.mean([1 / 2, 1 / 3, 1 / 2]))
    assert told["recall"] == pytest.approx(100 * np.mean([1 / 2, 1 / 3, 1 / 2]))
    assert told["miou"] == pytest.approx(100 * np.mean([1 / 3, 1 / 5, 1 / 3]))
