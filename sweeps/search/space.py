"""What a search varies and what it wants: axes of the paper's ablations as Optuna distributions, and objectives.

An axis is scaled to the preset: its range lies around the config that the search starts from, in the proportions of
the paper's table. So `D` is 32..512 in preset paper (D = 256) and 4..64 in tiny (D = 32).

Every trial has a value on every axis, also on one that another makes idle (sigma without L_AS): such configs have the
same keys, and the second costs nothing.
"""

import argparse
import difflib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import create_trial

from semformer.config import Config, FinalMap, LossName, field_names, flatten, load_config, unknown_field
from semformer.errors import UserError
from semformer.metrics import COSINES
from sweeps.plan import scores

STORAGE = "sqlite:///runs/studies.db"
GPU_HOURS = "gpu_hours"
"""The objective beside the scores."""
OBJECTIVES = tuple(name for name in scores.NAMES if name.rpartition("/")[2] not in (*COSINES, "threshold"))
PROBED = ("miou", "miou_oracle", "miou_fixed", "miou_heldout", "fp", "fn")
"""Scores that can be measured after each epoch, by which poor trials may be stopped."""


@dataclass(frozen=True)
class Axis:
    """A config field, and its values. `fixed`: fields that every trial of a search with this axis sets."""

    field: str
    distribution: BaseDistribution
    fixed: Mapping[str, Any]

    def __str__(self) -> str:
        match self.distribution:
            case CategoricalDistribution(choices=choices):
                values = "|".join(map(str, choices))
            case (
                IntDistribution(low=low, high=high, step=step, log=log)
                | FloatDistribution(low=low, high=high, step=step, log=log)
            ):
                values = f"{low:g}:{high:g}" + (":log" if log else f" by {step:g}" if step else "")
        return f"{self.field} {values}"

    def ends(self) -> tuple[Any, ...]:
        """The first and the last value; all, where there is no order."""
        match self.distribution:
            case CategoricalDistribution(choices=choices):
                return tuple(choices)
            case IntDistribution(low=low, high=high) | FloatDistribution(low=low, high=high):
                return low, high
        return ()

    def value_of(self, suggested: Any) -> Any:
        """What the field is set to: 0.15 instead of 0.15000000000000002, where the values have a step."""
        stepped = isinstance(self.distribution, FloatDistribution) and self.distribution.step is not None
        return round(suggested, 6) if stepped else suggested


def losses(own: Config) -> CategoricalDistribution:
    """The rows of Table 3: L_CF and L_SS always, with any of L_CB, L_AS, L_AC; the longest first."""
    optional = ("CB", "AS", "AC")
    subsets = [c for n in (3, 2, 1, 0) for c in itertools.combinations(optional, n)]
    ordered = (",".join(name for name in get_args(LossName) if name in {"CF", "SS", *chosen}) for chosen in subsets)
    return _choices(*ordered, own_value(own, "segmentor.losses"))


def sigma(own: Config) -> FloatDistribution:
    """A factor of 3 around the preset's value; Table 17 goes from 1/3 to 4/3 of it."""
    return FloatDistribution(own.segmentor.sigma / 3, own.segmentor.sigma * 3, log=True)


def U(own: Config) -> IntDistribution:
    """Every number of last blocks that the backbone has (Table 13)."""
    from semformer.models.vit import backbone_shape  # torch takes seconds to import

    return IntDistribution(1, backbone_shape(own.segmentor.backbone)["depth"])


def decoder_depth(own: Config) -> IntDistribution:
    """From 1/4 to 5/4 of the preset's (Table 7)."""
    depth = own.caae.decoder_depth
    return IntDistribution(max(1, depth // 4), max(depth + 1, depth * 5 // 4))


def decoder_width(own: Config) -> IntDistribution:
    """1/2, 3/4, 1, 5/4 and 3/2 of the preset's (Table 10), in multiples of the heads."""
    from semformer.models.vit import backbone_shape

    heads, width = backbone_shape(own.caae.backbone)["num_heads"], own.caae.decoder_width
    step = heads * max(1, width // (4 * heads))
    return IntDistribution(max(heads, width - 2 * step), width + 2 * step, step=step)


def D(own: Config) -> CategoricalDistribution:
    """1/8, 1/4, 1/2, 1 and 2 times the preset's (Table 8)."""
    scaled = (own.caae.class_dim * eighths // 8 for eighths in (1, 2, 4, 8, 16))
    return _choices(*(value for value in scaled if value), own.caae.class_dim)


def merge(own: Config) -> CategoricalDistribution:
    return CategoricalDistribution(("sum", "mean", "max"))


def final_map(own: Config) -> CategoricalDistribution:
    return CategoricalDistribution(get_args(FinalMap))


def thresholds(own: Config) -> FloatDistribution:
    """The background threshold, one of those that the preset tries: fixed beforehand, not chosen on the masks."""
    first, last, step = own.evaluate.thresholds
    return FloatDistribution(first, last, step=step)


def erosion(own: Config) -> CategoricalDistribution:
    return _choices(0, 3, 5, 7, 9, own.evaluate.erosion)


def caae_lr(own: Config) -> CategoricalDistribution:
    """1/4, 1/2, 1, 2 and 4 times the preset's. Like all axes of the CAAE a list of values: one network serves many
    trials."""
    return CategoricalDistribution(tuple(own.caae.optimizer.lr * factor for factor in (0.25, 0.5, 1, 2, 4)))


def segmentor_lr(own: Config) -> FloatDistribution:
    """A factor of 4 around the preset's."""
    return FloatDistribution(own.segmentor.optimizer.lr / 4, own.segmentor.optimizer.lr * 4, log=True)


def beta(own: Config) -> FloatDistribution:
    """A factor of 4 around the preset's."""
    return FloatDistribution(own.walk.beta / 4, own.walk.beta * 4, log=True)


def steps(own: Config) -> IntDistribution:
    """From 1/16 of the preset's number of steps to 4 times."""
    return IntDistribution(max(0, own.walk.log2_steps - 4), min(16, own.walk.log2_steps + 2))


def radius(own: Config) -> IntDistribution:
    """Up to twice the preset's."""
    return IntDistribution(2, 2 * own.walk.radius)


def mask_threshold(own: Config) -> FloatDistribution:
    """What is background in pseudo masks: up to 0.2 around the preset's."""
    middle = own.pseudo_masks.threshold
    return FloatDistribution(max(0.0, middle - 0.2), min(1.0, middle + 0.2))


def mask_crf(own: Config) -> CategoricalDistribution:
    """None, the preset's iterations, 1, 5 and 10."""
    return _choices(own.pseudo_masks.crf.iterations, 0, 1, 5, 10)


def seg_lr(own: Config) -> FloatDistribution:
    """A factor of 4 around the preset's."""
    return FloatDistribution(own.deeplab.optimizer.lr / 4, own.deeplab.optimizer.lr * 4, log=True)


def seg_crf(own: Config) -> CategoricalDistribution:
    """The preset's iterations, 1, 5 and 10: without any there are no scores with the CRF."""
    return _choices(own.segmentation.crf.iterations, 1, 5, 10)


AXES: dict[str, tuple[str, Callable[[Config], BaseDistribution]]] = {
    "losses": ("segmentor.losses", losses),
    "sigma": ("segmentor.sigma", sigma),
    "U": ("cams.last_blocks", U),
    "decoder_depth": ("caae.decoder_depth", decoder_depth),
    "decoder_width": ("caae.decoder_width", decoder_width),
    "D": ("caae.class_dim", D),
    "merge": ("caae.merge", merge),
    "caae_lr": ("caae.optimizer.lr", caae_lr),
    "segmentor_lr": ("segmentor.optimizer.lr", segmentor_lr),
    "final_map": ("cams.final_map", final_map),
    "thresholds": ("evaluate.fixed_threshold", thresholds),
    "erosion": ("evaluate.erosion", erosion),
    "beta": ("walk.beta", beta),
    "steps": ("walk.log2_steps", steps),
    "radius": ("walk.radius", radius),
    "mask_threshold": ("pseudo_masks.threshold", mask_threshold),
    "mask_crf": ("pseudo_masks.crf.iterations", mask_crf),
    "seg_lr": ("deeplab.optimizer.lr", seg_lr),
    "seg_crf": ("segmentation.crf.iterations", seg_crf),
}
DEFAULT_AXES = (
    *("losses", "sigma", "U", "decoder_depth", "decoder_width", "D", "merge"),
    *("caae_lr", "segmentor_lr"),
)
FIXED = {"evaluate.fixed_threshold": {"evaluate.rule": "fixed"}}
"""By field: without it, the field would change no score."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `make_search`; --preset, --set, --data and --store are those of every sweep."""

    def names(text: str) -> tuple[str, ...]:
        return tuple(part.strip() for part in text.split(",") if part.strip())

    parser.add_argument("--trials", type=int, default=30, metavar="N", help="in total; default: %(default)s")
    parser.add_argument(
        "--axes",
        type=names,
        default=DEFAULT_AXES,
        metavar="AXIS,AXIS...",
        help=f"of {', '.join(AXES)} (default: the first {len(DEFAULT_AXES)}), or any field; with values of your own as "
        "AXIS=LOW:HIGH, AXIS=LOW:HIGH:log or AXIS=A|B|C",
    )
    parser.add_argument(
        "--objectives",
        type=names,
        default=(),
        metavar="NAME,NAME...",
        help="cam/SPLIT/miou (default) or any other score, such as pseudo/SPLIT/miou or seg/SPLIT/miou_crf, gpu_hours; "
        "several give a Pareto front",
    )
    parser.add_argument("--storage", default=STORAGE, metavar="URL", help="of the Optuna study (default: %(default)s)")
    parser.add_argument("--study", metavar="NAME", help="default: search-PRESET; an existing one goes on")
    sampler = "of Optuna: NAME or NAME:OPTION=VALUE,OPTION=VALUE (default: tpe, for several objectives nsgaii)"
    parser.add_argument("--sampler", metavar="NAME[:OPTIONS]", help=sampler)
    parser.add_argument("--sampler-seed", type=int, default=0, metavar="N", help="default: %(default)s")
    scheduler = (
        "what stops poor trials early, by their maps after each segmentation epoch: asha of Ray "
        "Tune, or a pruner of Optuna (hyperband, percentile ...), with options as a sampler's"
    )
    parser.add_argument("--scheduler", metavar="NAME[:OPTIONS]", help=scheduler)


def read_axes(axes: Sequence[str], preset: str, overrides: Mapping[str, Any]) -> tuple[Config, dict[str, Axis]]:
    """The config that the search starts from, the preset's own with `overrides`, and the axes by their names.

    axes: names of AXES, or config fields; "NAME=LOW:HIGH", "NAME=LOW:HIGH:log" (whole numbers for a field that holds
    one) or "NAME=A|B|C". Raises UserError for an unknown name, for values that do not fit the field, and for a range
    that the starting config is outside of.
    """
    if not axes:
        raise UserError(f"--axes names no axis: there are {', '.join(AXES)}")
    own = load_config(preset, overrides)
    chosen: dict[str, Axis] = {}
    for item in axes:
        name, _, values = item.partition("=")
        field, scaled = AXES.get(name, (name, None))
        _check_field(name, field)
        if clash := next((other for other, axis in chosen.items() if axis.field == field), None):
            raise UserError(f"--axes: {clash} and {name} are the same field, {field}")
        if values:
            distribution = _read_values(item, values, field, preset, overrides)
        elif scaled:
            distribution = _scaled(name, scaled, own)
        else:
            raise UserError(f"--axes {name}: say which values, as {name}=LOW:HIGH or {name}=A|B|C")
        _check_start(item, field, distribution, own_value(own, field))
        chosen[name] = Axis(field, distribution, FIXED.get(field, {}))
    fixed = {name: value for axis in chosen.values() for name, value in axis.fixed.items()}
    return load_config(preset, {**overrides, **fixed}), chosen


def read_objectives(names: Sequence[str], own: Config) -> dict[str, Literal["maximize", "minimize"]]:
    """Directions by name; without names, the mIoU of the maps. Raises UserError for an unknown name, or one twice.

    gpu_hours are those of all stages of a config, as measured when each was made: found or not, a config has its price.
    """
    known = _objectives(own)
    for name in names:
        if name not in (*known, GPU_HOURS):
            raise UserError(f"--objectives: {name!r} is none of {', '.join((*known, GPU_HOURS))}")
        if names.count(name) > 1:
            raise UserError(f"--objectives: {name} twice")
    low = {GPU_HOURS, *(recorded for recorded in known if scores.is_low(recorded))}
    return {name: "minimize" if name in low else "maximize" for name in names or [*known][:1]}


def scores_of(objectives: Iterable[str], own: Config) -> tuple[str, ...]:
    """The scores among them as tables name them: "seg/val/miou" -> "seg/miou"."""
    known = _objectives(own)
    return tuple(known[name] for name in objectives if name in known)


def _objectives(own: Config) -> dict[str, str]:
    """The scores that can be searched for: as runs record them -> as tables name them."""
    known: dict[str, str] = {}
    for name in OBJECTIVES:
        known.setdefault(scores.recorded(name, own), name)
    return known


def own_value(config: Config, field: str) -> Any:
    """The value of a field, as Optuna can hold it: lists as text with commas, which `load_config` reads."""
    value = flatten(config).get(field)
    return ",".join(map(str, value)) if isinstance(value, list) else value


def _choices(*values: Any) -> CategoricalDistribution:
    return CategoricalDistribution(tuple(dict.fromkeys(values)))


def _check_field(name: str, field: str) -> None:
    if field not in field_names():
        near = [] if "." in name else difflib.get_close_matches(name, AXES, n=1)
        hint = f"did you mean {near[0]}? There are {', '.join(AXES)}" if near else unknown_field(name)
        raise UserError(f"--axes: no axis is named {name!r}: {hint}")
    if field == "seed" or field.startswith("data."):
        raise UserError(f"--axes {name}: scores of different seeds or data cannot be compared; use --set {name}=...")


def _scaled(name: str, distribution: Callable[[Config], BaseDistribution], own: Config) -> BaseDistribution:
    try:
        return distribution(own)
    except ValueError as error:
        raise UserError(f"--axes {name}: no range fits the config ({error}); give one as {name}=LOW:HIGH") from error


def _read_values(item: str, text: str, field: str, preset: str, overrides: Mapping[str, Any]) -> BaseDistribution:
    def read(value: str) -> Any:
        return own_value(load_config(preset, {**overrides, field: value}, source=f"--axes {item}"), field)

    if "|" in text:
        return _choices(*(read(part.strip()) for part in text.split("|")))
    low, _, rest = text.partition(":")
    high, _, scale = rest.partition(":")
    if not high or scale not in ("", "log"):
        raise UserError(f"--axes {item}: write LOW:HIGH, LOW:HIGH:log or A|B|C")
    low, high = read(low), read(high)
    if isinstance(low, bool) or not isinstance(low, int | float):
        raise UserError(f"--axes {item}: the field holds no number: write A|B|C")
    distribution: Any = IntDistribution if isinstance(low, int) else FloatDistribution
    try:
        return distribution(low, high, log=bool(scale))
    except ValueError as error:
        raise UserError(f"--axes {item}: {error}") from error


def _check_start(item: str, field: str, distribution: BaseDistribution, value: Any) -> None:
    try:
        create_trial(value=0, params={field: value}, distributions={field: distribution})
    except ValueError:
        raise UserError(
            f"--axes {item}: the search starts from {field} = {value}, which is none of these values: include it, or "
            f"start elsewhere with --set {field}=..."
        ) from None
