"""What the groups of options are made of: kinds of values, and what several groups have in common."""

import hashlib
import os
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from semformer.errors import UserError
from semformer.machine import Note


def split_commas(value: Any) -> Any:
    """`CF,CB` from a command line and `[CF, CB]` from YAML mean the same."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]
Scales = Annotated[tuple[Positive, ...], BeforeValidator(split_commas), Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def _ascending(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError(f"must be FROM,TO with FROM <= TO, not {value}")
    return value


def at_most_one(value: tuple[float, float]) -> tuple[float, float]:
    if value[1] > 1:
        raise ValueError(f"must be fractions of at most 1, not {value}")
    return value


Jitter = Annotated[
    tuple[Fraction, Fraction, Fraction, Annotated[float, Field(ge=0, le=0.5)]], BeforeValidator(split_commas)
]
LongSide = Annotated[tuple[Count, Count], BeforeValidator(split_commas), AfterValidator(_ascending)]
Range = Annotated[tuple[Positive, Positive], BeforeValidator(split_commas), AfterValidator(_ascending)]


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @property
    def files(self) -> tuple[str, ...]:
        """The paths of the files, or folders of files, that the stage reads beside the data."""
        return ()

    @property
    def replaces_inputs(self) -> bool:
        """Whether what the stage makes comes from files, or from masks, and not from the stages before it."""
        return False

    def key_parameters(self) -> dict[str, Any]:
        """The resolved parameters that can change the stage's result, as JSON values."""
        parts = ((name, getattr(self, name)) for name in type(self).model_fields)
        inner = {name: part.key_parameters() for name, part in parts if isinstance(part, Settings)}
        return self.model_dump(mode="json") | inner


class OptimizerConfig(Settings):
    """Poly schedule lr * (1 - step / steps)^power; multipliers of the learning rate per parameter kind.

    Pretrained weights 1, pretrained biases `bias_multiplier`, new weights `new_multiplier`, new biases both. As in the
    published code, every parameter whose name does not contain "weight" counts as a bias, tokens and positions as well,
    and has no weight decay. Momentum 5e-4 is what the published runs had (a slip in an argument's position).
    """

    name: Literal["sgd", "adamw"] = "sgd"
    lr: Annotated[float, Field(gt=0, le=1e12)]
    momentum: Annotated[float, Field(ge=0, lt=1)] = 5e-4
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    power: Annotated[float, Field(ge=0)] = 0.9
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    new_multiplier: Positive = 10.0
    bias_multiplier: Positive = 2.0

    @property
    def decays_biases(self) -> bool:
        return False

    def key_parameters(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude={"momentum"} if self.name == "adamw" else None)


OWN_WEIGHTS = Path(__file__).parents[1] / "models" / "weights"
"""Pretrained weights of the small backbones, as `semformer pretrain` made them."""


class TrainingConfig(Settings):
    """What all trainings have in common."""

    backbone: str
    pretrained: bool = True
    weights: str = ""
    """A file with backbone weights (timm's names; .safetensors or .pth) instead of those that timm has."""
    image_size: Count
    epochs: Count
    batch_size: Count
    optimizer: OptimizerConfig
    color_jitter: Jitter = (0.3, 0.3, 0.3, 0.1)
    """Largest change of brightness, contrast and saturation (factors 1 -+ x) and of the hue (a shift, in circles)."""
    compile: bool = False
    """Train with torch.compile: faster where steps are long, after a minute or two; rounds differently."""

    @property
    def weights_file(self) -> str:
        """The file that the backbone starts from: `weights`, or the project's own. "": there is none."""
        own = OWN_WEIGHTS / f"{self.backbone}.safetensors"
        return self.weights or (str(own) if self.pretrained and own.exists() else "")

    @property
    def starts_pretrained(self) -> bool:
        """Whether the backbone starts from weights, timm's or a file's."""
        return self.pretrained or bool(self.weights_file)

    def without_weights(self) -> Self:
        """Of the same network, for which nothing is downloaded or read: its own weights are to be loaded."""
        return self.model_copy(update={"pretrained": False, "weights": ""})

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.weights_file,)))

    def key_parameters(self) -> dict[str, Any]:
        """As for every stage; a file counts by its content, not its path."""
        parameters = super().key_parameters()
        parameters["weights"] = file_digest(self.weights_file) if self.weights_file else ""
        parameters["pretrained"] = self.starts_pretrained
        return parameters


class NetworkConfig(TrainingConfig):
    """What networks have in common that can be imported: all but AffinityNet."""

    ARCHITECTURE: ClassVar[tuple[str, ...]] = ("backbone", "image_size")

    checkpoint: str = ""
    """A file with this whole network's weights under the published names: imported instead of trained."""

    @property
    def files(self) -> tuple[str, ...]:
        return (*super().files, *filter(None, (self.checkpoint,)))

    @property
    def replaces_inputs(self) -> bool:
        return bool(self.checkpoint)

    def key_parameters(self) -> dict[str, Any]:
        """An import depends on no training option."""
        if self.checkpoint:
            architecture = self.model_dump(mode="json", include=set(self.ARCHITECTURE))
            return architecture | {"checkpoint": file_digest(self.checkpoint)}
        return super().key_parameters()


class FolderConfig(Settings):
    """What a folder of files can take the place of."""

    folder: str = ""
    """A folder with a file an image, such as another method has made, instead of what the stages before it make."""

    @property
    def files(self) -> tuple[str, ...]:
        return (self.folder,) if self.folder else ()

    @property
    def replaces_inputs(self) -> bool:
        return bool(self.folder)

    def key_parameters(self) -> dict[str, Any]:
        """A folder counts by its contents, and then nothing else does. Raises UserError for a file."""
        if os.path.isfile(self.folder):
            raise UserError(f"{self.folder} is a file: give the folder that has one for each image")
        return {"folder": file_digest(self.folder)} if self.folder else without(super().key_parameters(), "folder")


def without(parameters: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if name not in names}


def file_digest(path: str | Path) -> str:
    """sha256 of a file's bytes, or of the names and bytes of a folder's files, read again only when one has changed.

    Raises UserError when it cannot be read, and for a folder without files.
    """
    try:
        if os.path.isdir(path):
            return _folder_digest(Path(path))
        there = os.stat(path)
        return _digest(os.path.abspath(path), there.st_ino, there.st_size, there.st_mtime_ns, there.st_ctime_ns)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _folder_digest(folder: Path) -> str:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if not files:
        raise UserError(f"{folder} is a folder without files")
    note = Note(files, about="folder")
    digest = note.read()
    if not digest:
        contents = "".join(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n" for file in files)
        digest = hashlib.sha256(contents.encode()).hexdigest()
        note.write(digest)
    return digest


@lru_cache(maxsize=1000)
def _digest(path: str, *version: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
