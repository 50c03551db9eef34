"""Every option of the pipeline, the presets, and how configs are made of them."""

from semformer.config.overrides import field_names, flatten, load_config, parse_overrides, unknown_field
from semformer.config.presets import PRESETS
from semformer.config.schema import (
    DRAWABLE,
    CaaeConfig,
    CamsConfig,
    Config,
    Difficulty,
    EvaluateConfig,
    FinalMap,
    LossName,
    NetworkConfig,
    OptimizerConfig,
    PretrainConfig,
    SegmentorConfig,
    Settings,
    ShapesConfig,
    TrainingConfig,
    file_digest,
)

__all__ = [
    "DRAWABLE",
    "PRESETS",
    "CaaeConfig",
    "CamsConfig",
    "Config",
    "Difficulty",
    "EvaluateConfig",
    "FinalMap",
    "LossName",
    "NetworkConfig",
    "OptimizerConfig",
    "PretrainConfig",
    "SegmentorConfig",
    "Settings",
    "ShapesConfig",
    "TrainingConfig",
    "field_names",
    "file_digest",
    "flatten",
    "load_config",
    "parse_overrides",
    "unknown_field",
]
