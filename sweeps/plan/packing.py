"""Whether trials that share a GPU fit into its memory, by the peaks of stages like theirs that were measured on one."""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from semformer.errors import UserError
from semformer.keys import StageKey
from semformer.store import Artifact, Store
from sweeps.plan.price import SAMPLE, spread

CUDA_CONTEXT = 512 * 2**20
"""Bytes of a GPU that CUDA takes in every process, beside what torch reserves."""
DECISIVE: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "caae": {"caae": ("backbone", "image_size", "batch_size", "class_dim", "decoder_depth", "decoder_width")},
    "segmentor": {"segmentor": ("backbone", "image_size", "batch_size"), "caae": ("backbone", "image_size")},
    "cams": {"cams": ("scales",), "segmentor": ("backbone",)},
    "train_cams": {"train_cams": ("scales",), "segmentor": ("backbone",)},
    "affinity_labels": {"affinity_labels": ("crf",)},
    "affinity": {"affinity": ("variant", "backbone", "frozen", "image_size", "batch_size", "radius")},
    "walk": {"walk": ("radius",), "affinity": ("variant", "backbone", "image_size")},
    "pseudo_masks": {"pseudo_masks": ("crf",)},
    "deeplab": {"deeplab": ("backbone", "image_size", "batch_size", "head_width", "frozen_statistics")},
    "segmentation": {"segmentation": ("scales", "crf"), "deeplab": ("backbone", "head_width")},
}
"""By what parameters, of a stage and of its inputs, stages are alike in the memory that they take of a GPU, if their
precision is the same. What is left out takes none: it scores."""


def check_packing(keys: Iterable[StageKey], store: Store, *, gpus_per_trial: float, gpu_bytes: int) -> str:
    """Whether as many trials as share a GPU fit into its memory, as far as it was measured; says on what grounds.

    `keys` are those of the trials' stages. What counts is the largest peak of a published artifact that is like one of
    them. Raises UserError that names the stage, its peak and the share that fits.
    """
    if not 0 < gpus_per_trial < 1:
        return "no GPU is shared"
    trials = math.floor(1 / gpus_per_trial + 1e-9)
    peaks, unknown = _peaks(keys, store)
    if not peaks:
        return f"whether {trials} trials fit into a GPU's memory is unknown: nothing like them was measured on one yet"
    stage, largest = max(peaks.items(), key=lambda item: item[1])
    told = f"{stage} takes up to {largest / 2**30:.1f} GiB"
    if not gpu_bytes:
        return f"{told}; whether {trials} trials fit into a GPU's memory is unknown: there is no GPU yet"
    if largest * trials > gpu_bytes:
        fitting = gpu_bytes // largest
        # rounded up: 0.34 lets two trials onto a GPU, 0.33 three
        hint = f"--gpus-per-trial {math.ceil(100 / fitting) / 100:g} fits" if fitting else "not even one fits"
        raise UserError(
            f"--gpus-per-trial {gpus_per_trial:g}: {trials} trials do not fit into a GPU of "
            f"{gpu_bytes / 2**30:.1f} GiB: {told}; {hint}"
        )
    but = f"; unknown of {', '.join(unknown)}" if unknown else ""
    return f"{trials} trials fit into a GPU of {gpu_bytes / 2**30:.1f} GiB: {told}{but}"


def _peaks(keys: Iterable[StageKey], store: Store) -> tuple[dict[str, int], list[str]]:
    """The largest peak of each stage in bytes, as far as one like it was measured; and the stages of which some were
    not."""
    wanted = {key.digest: key for key in keys}
    specs = {digest: key.spec for digest, key in wanted.items()}
    peaks, unknown = {}, []
    for stage in DECISIVE:
        likes = {_like(key, specs) for key in wanted.values() if key.stage == stage}
        measured = _measured(stage, wanted, store) if likes else {}
        if found := [measured[like] for like in likes if like in measured]:
            peaks[stage] = max(found) + CUDA_CONTEXT
        if len(found) < len(likes):
            unknown.append(stage)
    return peaks, unknown


def _measured(stage: str, wanted: Mapping[str, StageKey], store: Store) -> dict[str, int]:
    """The largest peak of artifacts that are alike, in bytes, by `_like`; of a sample: the `wanted` that are there, and
    the newest."""
    published = store.newest_first(stage)
    own = [digest for digest in published if digest in wanted]
    names = {(stage, digest) for digest in (*spread(own), *published[:SAMPLE])}
    found = [one for one in store.read_with_inputs(names).values() if isinstance(one, Artifact)]
    specs = {artifact.key.digest: artifact.key.spec for artifact in found}
    peaks: dict[str, int] = {}
    for artifact in found:
        memory = artifact.info.get("memory", {})
        if artifact.key.stage == stage and memory.get("device") == "cuda":
            like = _like(artifact.key, specs)
            peaks[like] = max(peaks.get(like, 0), memory["peak_bytes"])
    return peaks


def _like(key: StageKey, specs: Mapping[str, Mapping[str, Any]]) -> str:
    """Equal for stages that are alike. `specs` are those of inputs, by digest."""
    sources = {key.stage: key.spec} | {stage: specs[digest] for stage, digest in key.inputs.items() if digest in specs}
    values = [
        sources[stage]["params"].get(name) if stage in sources else None
        for stage, names in DECISIVE[key.stage].items()
        for name in names
    ]
    return json.dumps([key.spec.get("precision"), *values])
