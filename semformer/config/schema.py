"""The options: one strict, frozen class per stage.

Where paper and published code differ, the default of an option is what produced the published numbers.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from semformer.config.settings import (
    Count,
    FolderConfig,
    Fraction,
    Jitter,
    LongSide,
    NetworkConfig,
    OptimizerConfig,
    Positive,
    Range,
    Scales,
    Seed,
    Settings,
    TrainingConfig,
    at_most_one,
    split_commas,
    without,
)

LossName = Literal["CF", "CB", "AS", "AC", "SS"]
FinalMap = Literal["activation", "attention", "both"]
Goal = Literal["cams", "pseudo_masks", "deeplab"]
"""How far a run goes."""


def _canonical_losses(value: Any) -> Any:
    value, order = split_commas(value), get_args(LossName)
    if isinstance(value, list | tuple) and all(name in order for name in value):
        return tuple(name for name in order if name in value)
    return value


Losses = Annotated[tuple[LossName, ...], BeforeValidator(_canonical_losses)]


class Difficulty(Settings):
    """What misleads a map of the embedded data set's scenes, and how much.

    Contrasts are a texture's swing, on a scale where black to white is 1.
    """

    context: Fraction = 0.9
    """Probability that the background is the first object's preferred context."""
    part: Fraction = 0.6
    """Probability that an object's part is seen."""
    body_contrast: Fraction = 0.25
    background_contrast: Fraction = 0.35


class ShapesConfig(Settings):
    """The embedded data set that is made when no `--data` is given."""

    train: Count = 2000
    val: Count = 200
    size: Annotated[int, Field(ge=32)] = 96
    seed: Seed = 0
    difficulty: Difficulty = Difficulty()


class DataConfig(Settings):
    """Which split the networks learn from, and on which the maps are made and measured."""

    train_split: str = "trainaug"
    eval_split: str = "train"
    selection_split: str = "train"
    """On which an epoch is chosen: by the labels of its images (caae.selection), by its masks (segmentor.selection)."""
    mask_split: str = "train"
    """On which pseudo masks are measured: some or all images of `train_split`."""
    test_split: str = "val"
    """On which the segmentation is measured."""
    shapes: ShapesConfig | None = None


class PretrainConfig(TrainingConfig):
    """Classification of other images than the method's, from which its backbones start (`semformer pretrain`)."""

    pretrained: bool = False
    batch_size: Count = 64
    optimizer: OptimizerConfig = OptimizerConfig(
        name="adamw", lr=2e-3, weight_decay=0.05, warmup_steps=300, new_multiplier=1.0, bias_multiplier=1.0
    )
    color_jitter: Jitter = (0.0, 0.0, 0.0, 0.0)
    enlarge: Range = (1.0, 1.0)
    crop_area: Annotated[Range, AfterValidator(at_most_one)] = (0.5, 1.0)
    """Area of the random resized crop, as a fraction of the image."""


class CaaeConfig(NetworkConfig):
    """Class-Aware AutoEncoder (section 3.2)."""

    ARCHITECTURE = (
        *NetworkConfig.ARCHITECTURE,
        *("class_dim", "merge", "reconstruction", "decoder_depth", "decoder_width"),
    )

    backbone: str = "deit_base_distilled_patch16_224"
    image_size: Count = 224
    epochs: Count = 200
    batch_size: Count = 64
    optimizer: OptimizerConfig = OptimizerConfig(lr=0.025)
    class_dim: Count = 256
    """D of Eq. 1."""
    merge: Literal["sum", "mean", "max"] = "sum"
    """How primary tokens become class embeddings (Table 5)."""
    decoder_depth: Count = 8
    decoder_width: Count = 768
    reconstruction: bool = True
    """The decoder and the reconstruction loss of Eq. 4 (Tables 11, 14)."""
    enlarge: Range = (1.0, 3.0)
    crop_area: Annotated[Range, AfterValidator(at_most_one)] = (0.08, 1.0)
    """Area of the random resized crop, as a fraction of the image."""
    selection: Literal["last", "best_ap"] = "best_ap"
    """`best_ap` keeps the epoch that ranks the image-level labels of data.selection_split best (published code)."""

    def key_parameters(self) -> dict[str, Any]:
        parameters = super().key_parameters()
        return parameters if self.reconstruction else without(parameters, "decoder_depth", "decoder_width")


class SegmentorConfig(NetworkConfig):
    """Segmentation network (section 3.3)."""

    backbone: str = "deit_small_patch16_224"
    image_size: Count = 448
    epochs: Count = 20
    batch_size: Count = 8
    optimizer: OptimizerConfig = OptimizerConfig(lr=0.005)
    losses: Losses = get_args(LossName)
    sigma: Annotated[float, Field(ge=0)] = 0.075
    """Scale of the activation suppression loss (Eq. 9, Table 17)."""
    pair_reduction: Literal["batch", "image"] = "batch"
    """Eq. 7, 8: means over the batch's pairs with constants and 1/2 (published code) or per image (paper)."""
    suppress: Literal["objects", "all"] = "objects"
    """Eq. 9: suppress the object channels and raise the background (published code) or all K channels (paper)."""
    complement: Literal["present", "all"] = "present"
    """Eq. 10: the maximum runs over the image's other present classes (published code) or over all K (paper)."""
    token_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Probability with which a whole patch token is dropped before the activation layer."""
    long_side: LongSide = (224, 896)
    """Range of the random resize, in pixels of the longer side."""
    selection: Literal["last", "best_miou"] = "last"
    """`best_miou` keeps the epoch with the best map on the *pixel masks* of data.selection_split (published code)."""

    @model_validator(mode="after")
    def _some_map_loss(self) -> "SegmentorConfig":
        if not self.losses:
            raise ValueError("losses is empty: name at least one of CF, CB, AS, AC, SS")
        return self

    def key_parameters(self) -> dict[str, Any]:
        unused = set()
        if "AS" not in self.losses:
            unused |= {"sigma", "suppress"}
        if "AC" not in self.losses:
            unused |= {"complement"}
        if not {"CF", "CB"} & set(self.losses):
            unused |= {"pair_reduction"}
        return without(super().key_parameters(), *unused)


DRAWABLE = 4
"""So many images of a split have maps of every kind, to be drawn."""


class CamsConfig(FolderConfig):
    """Multi-scale activation maps (Eq. 5, 6; Tables 4, 12, 13, 16). A folder has ID.npy: see `cams.foreign_maps`."""

    scales: Scales = (0.5, 1.0, 1.5, 2.0)
    flip: bool = True
    final_map: FinalMap = "both"
    """activation map M, class-relative attention A', or their product."""
    last_blocks: Count = 4
    """U of Eq. 6."""


MOST_THRESHOLDS = 1000


class EvaluateConfig(Settings):
    """Scores of the maps against pixel masks."""

    thresholds: Annotated[tuple[float, float, float], BeforeValidator(split_commas)] = (0.10, 0.40, 0.01)
    """First, last (included) and step of the background thresholds."""
    rule: Literal["oracle", "fixed", "heldout"] = "oracle"
    """Which threshold the reported scores use: the best on the masks, `fixed_threshold`, or for each half of the images
    (every second one) the best of the other half. All are stored."""
    fixed_threshold: Fraction = 0.25
    erosion: Annotated[int, Field(ge=0)] = 7
    """Side of the square that erodes each predicted region (published evaluation); 0 is none."""
    pictures: Annotated[int, Field(ge=0, le=DRAWABLE)] = DRAWABLE
    """How many images of the split are drawn in the layout of Figure 4."""

    @model_validator(mode="after")
    def _sound(self) -> "EvaluateConfig":
        first, last, step = self.thresholds
        if not (0 <= first <= last <= 1 and step > 0):
            raise ValueError(f"thresholds must be FIRST,LAST,STEP with 0 <= FIRST <= LAST <= 1, not {self.thresholds}")
        if (last - first) / step > MOST_THRESHOLDS:
            raise ValueError(f"thresholds must be at most {MOST_THRESHOLDS}: use a larger step than {step}")
        if self.erosion and self.erosion % 2 == 0:
            raise ValueError(f"erosion must be odd (or 0 for none), not {self.erosion}")
        return self

    def threshold_values(self) -> tuple[float, ...]:
        """All thresholds tried, ascending, without the rounding noise of repeated addition."""
        first, last, step = self.thresholds
        return tuple(round(first + i * step, 6) for i in range(int((last - first) / step + 1e-6) + 1))

    def scored_thresholds(self) -> tuple[float, ...]:
        """Those tried, and the fixed one."""
        return tuple(sorted({*self.threshold_values(), self.fixed_threshold}))


class CrfConfig(Settings):
    """Dense CRF: standard deviations (pixels, grey values) and weights of its two Gaussians."""

    iterations: Annotated[int, Field(ge=0)]
    """0 is none."""
    gt_prob: Annotated[float, Field(gt=0, lt=1)] = 0.7
    """How sure a hard label is to begin with."""
    gaussian_sxy: Positive = 3.0
    gaussian_compat: Annotated[float, Field(ge=0)] = 3.0
    bilateral_sxy: Positive = 50.0
    bilateral_srgb: Positive = 5.0
    bilateral_compat: Annotated[float, Field(ge=0)] = 10.0

    def key_parameters(self) -> dict[str, Any]:
        return super().key_parameters() if self.iterations else {"iterations": 0}


class AffinityLabelsConfig(Settings):
    """What AffinityNet learns from: maps at two background thresholds, each through the CRF.

    A pixel has the object that the map at `foreground_threshold` names, is background where neither map names one, and
    else ignored. (IRN: 0.30 and 0.05.)
    """

    foreground_threshold: Fraction = 0.11
    background_threshold: Fraction = 0.15
    crf: CrfConfig = CrfConfig(iterations=10)


class AllDecayed(OptimizerConfig):
    """All parameters at one rate, biases decayed as well."""

    new_multiplier: Positive = 1.0
    bias_multiplier: Positive = 1.0

    @property
    def decays_biases(self) -> bool:
        return True


class AffinityConfig(TrainingConfig):
    """AffinityNet."""

    variant: Literal["edge", "feature"] = "edge"
    """Edges between pixels (as published), or likeness of features (the original of CVPR 2018, with resnet38)."""
    backbone: str = "resnet50"
    frozen: bool = True
    """Whether the backbone stays as it is."""
    image_size: Count = 512
    epochs: Count = 3
    batch_size: Count = 32
    optimizer: AllDecayed = AllDecayed(lr=0.1, weight_decay=1e-4, momentum=1e-4)
    long_side: LongSide = (320, 640)
    """Range of the random resize, in pixels of the longer side."""
    radius: Annotated[int, Field(ge=2)] = 10
    """Pairs of pixels nearer than that are compared, in pixels of the edge or feature map."""


class WalkConfig(Settings):
    """Random walk of the maps along the affinities."""

    radius: Annotated[int, Field(ge=2)] = 5
    """As `affinity.radius`."""
    beta: Positive = 10.0
    """Power of an affinity."""
    log2_steps: Annotated[int, Field(ge=0, le=16)] = 8
    """2^so many steps."""


class PseudoMasksConfig(FolderConfig):
    """Label maps, made of the maps that have walked, of which the segmentation learns. A folder has them as ID.png."""

    threshold: Fraction = 0.25
    """What is below is background."""
    crf: CrfConfig = CrfConfig(iterations=1)
    skip_failing: bool = False
    """Whether an image of which no mask can be made is ignored; else that is an error."""


class DeeplabConfig(NetworkConfig):
    """DeepLabV1."""

    ARCHITECTURE = (*NetworkConfig.ARCHITECTURE, "head_width", "head_dilation")

    backbone: str = "resnet38"
    image_size: Count = 321
    epochs: Count = 30
    batch_size: Count = 4
    optimizer: OptimizerConfig = OptimizerConfig(lr=7e-4, momentum=0.9, weight_decay=1e-5, bias_multiplier=1.0)
    long_side: LongSide = (250, 750)
    """Range of the random resize, in pixels of the longer side."""
    head_width: Count = 512
    head_dilation: Count = 12
    frozen_statistics: bool = True
    """Whether the backbone's BatchNorms stay as they are."""
    supervised: bool = False
    """Learn from the *pixel masks* of data.train_split instead of pseudo masks."""

    @property
    def replaces_inputs(self) -> bool:
        return super().replaces_inputs or self.supervised


class SegmentationConfig(Settings):
    """The label maps of the segmentation network: the highest softmax over several scales."""

    scales: Scales = (0.5, 0.75, 1.0, 1.25, 1.5)
    flip: bool = False
    crf: CrfConfig = CrfConfig(iterations=10, bilateral_sxy=80.0, bilateral_srgb=13.0)


class Config(Settings):
    """The whole pipeline. `load_config` (in `config.overrides`) is the one way to make one."""

    seed: Seed = 0
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Of matrix products under autocast, weights stay float32. It changes results, so it is part of every key."""
    data: DataConfig = DataConfig()
    caae: CaaeConfig = CaaeConfig()
    segmentor: SegmentorConfig = SegmentorConfig()
    cams: CamsConfig = CamsConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    affinity_labels: AffinityLabelsConfig = AffinityLabelsConfig()
    affinity: AffinityConfig = AffinityConfig()
    walk: WalkConfig = WalkConfig()
    pseudo_masks: PseudoMasksConfig = PseudoMasksConfig()
    deeplab: DeeplabConfig = DeeplabConfig()
    segmentation: SegmentationConfig = SegmentationConfig()
