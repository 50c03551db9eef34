"""Runs of the pipeline in preset micro, and what they have made."""

import torch
from safetensors.torch import load_file

from semformer import pipeline
from semformer.stages.shards import label_maps_in

CPU = torch.device("cpu")


def run(config, folder, store, progress=lambda report: None, **options):
    data = pipeline.open_data(config, folder)
    runs = pipeline.run(config, data, store, device=CPU, progress=progress, **options)
    return {stage_run.stage: stage_run for stage_run in runs}


def weights(stage_run):
    """Of all files: the CAAE's decoder is apart from what later stages need."""
    names = [name for name in stage_run.artifact.files if name.endswith(".safetensors")]
    return {key: value for name in names for key, value in load_file(stage_run.artifact.file(name)).items()}


def label_maps(stage_run):
    return label_maps_in(stage_run.artifact)


def damage(store, stage_run, name):
    """Change the last byte of a file of an artifact."""
    path = store.root / stage_run.stage / stage_run.key / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
