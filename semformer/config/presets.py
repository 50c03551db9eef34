"""The named presets: complete recipes, as differences from the defaults, which are the paper's.

| preset | data                  | what for                                 | time                  |
|--------|-----------------------|------------------------------------------|-----------------------|
| micro  | 24 shapes images      | does the wiring hold?                    | seconds, 1 CPU core   |
| tiny   | shapes data set       | does the method learn?                   | minutes, 2 CPU cores  |
| paper  | VOC 2012 (`--data`)   | the numbers of the paper (section 4.1)   | GPU days              |
"""

from typing import Any

_ALIKE = {"new_multiplier": 1.0, "bias_multiplier": 1.0}  # one learning rate for all parameters

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "tiny": {
        "precision": "float32",
        "data.train_split": "train",
        "data.eval_split": "val",
        "data.shapes": {"train": 2000, "val": 200, "size": 64},
        "caae.backbone": "vit_shapes_patch8_64",
        "caae.image_size": 64,
        "caae.epochs": 10,
        "caae.batch_size": 16,
        "caae.class_dim": 32,
        "caae.decoder_depth": 2,
        "caae.decoder_width": 64,
        "caae.color_jitter": (0.0, 0.0, 0.0, 0.0),
        "caae.enlarge": (1.0, 1.0),
        "caae.crop_area": (0.5, 1.0),
        "caae.selection": "last",
        "caae.optimizer": {"name": "adamw", "lr": 2e-3, "weight_decay": 0.05, "warmup_steps": 100} | _ALIKE,
        "segmentor.backbone": "vit_shapes_patch8_64",
        "segmentor.image_size": 64,
        "segmentor.epochs": 4,
        "segmentor.batch_size": 8,
        "segmentor.color_jitter": (0.0, 0.0, 0.0, 0.0),
        "segmentor.long_side": (54, 80),
        "segmentor.optimizer": {"name": "adamw", "lr": 3e-4, "weight_decay": 0.05, "warmup_steps": 50},
        "cams.scales": (1.0, 1.5, 2.0),
        "evaluate.thresholds": (0.01, 0.99, 0.01),
        "evaluate.erosion": 0,
    },
}
PRESETS["micro"] = PRESETS["tiny"] | {
    "data.shapes": {"train": 16, "val": 8, "size": 48},
    "caae.pretrained": False,
    "caae.image_size": 32,
    "caae.epochs": 2,
    "caae.batch_size": 8,
    "caae.class_dim": 8,
    "caae.decoder_depth": 4,
    "caae.decoder_width": 24,
    "caae.backbone": "vit_wiring_patch8_32",
    "caae.optimizer.warmup_steps": 0,
    "segmentor.pretrained": False,
    "segmentor.backbone": "vit_wiring_patch8_48",
    "segmentor.image_size": 48,
    "segmentor.epochs": 2,
    "segmentor.batch_size": 8,
    "segmentor.optimizer": {"name": "adamw", "lr": 2e-3, "weight_decay": 0.05} | _ALIKE,
    "segmentor.long_side": (40, 60),
    "cams.scales": (0.5, 1.0),
    "evaluate.pictures": 2,
}
