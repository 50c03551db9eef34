"""Files of pretrained weights, one for each backbone, in the place of downloads (`--weights`)."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from semformer.config import Config, NetworkConfig, file_digest
from semformer.errors import UserError
from semformer.pipeline import needed_stages

SUFFIXES = (".safetensors", ".pth", ".bin")
"""Of files in a folder; where it has several of one backbone, the first of these is taken."""


class Weights:
    """`files`, by the backbone's name (timm's), and a `folder` for the backbones that are not among them."""

    def __init__(self, given: Sequence[str] = ()):
        """given: "NAME=FILE" for each backbone, or one "DIR" that holds NAME.safetensors, NAME.pth or NAME.bin.

        Raises UserError for what is neither, is given twice, or is not there.
        """
        self.files: dict[str, Path] = {}
        self.folder: Path | None = None
        for item in given:
            name, equals, file = item.partition("=")
            if item and Path(item).is_dir():
                if self.folder:
                    raise UserError(f"--weights {item}: {self.folder} is given already: put all files into one folder")
                self.folder = Path(item).absolute()
            elif not (name and equals and file):
                raise UserError(f"--weights {item}: write NAME=FILE with the name of a backbone, or give a folder")
            elif name in self.files:
                raise UserError(f"--weights {item}: {name} has {self.files[name]} already: one file is enough")
            elif not Path(file).is_file():
                raise UserError(f"--weights {item}: there is no file {file}")
            else:
                self.files[name] = Path(file).absolute()

    def of(self, config: Config) -> Config:
        """The config with the file of each network that starts from pretrained weights.

        Raises UserError where the folder has none for it.
        """
        files = {stage: self._file(stage, network.backbone) for stage, network in _pretrained(config)}
        networks = {
            stage: getattr(config, stage).model_copy(update={"weights": str(file)})
            for stage, file in files.items()
            if file
        }
        return config.model_copy(update=networks)

    def check_used(self, configs: Iterable[Config]) -> None:
        """Raises UserError for a file that none of the configs, as they were before `of`, has a use for."""
        wanted = {network.backbone for config in configs for _, network in _pretrained(config)}
        if (self.files or self.folder) and not wanted:
            raise UserError(
                "--weights: no network starts from pretrained weights: with --set caae.pretrained=true or "
                "--set segmentor.pretrained=true it does"
            )
        for name in self.files.keys() - wanted:
            raise UserError(
                f"--weights {name}={self.files[name]}: no network starts from pretrained weights of {name}; there are "
                f"{', '.join(sorted(wanted))}"
            )

    def digests(self, configs: Iterable[Config]) -> dict[str, str]:
        """Backbone -> sha256 of the file, of those that the configs, as they were before `of`, use."""
        stages = {network.backbone: stage for config in configs for stage, network in _pretrained(config)}
        files = {name: self._file(stage, name) for name, stage in sorted(stages.items())}
        return {name: file_digest(file) for name, file in files.items() if file}

    def _file(self, stage: str, backbone: str) -> Path | None:
        if backbone in self.files or not self.folder:
            return self.files.get(backbone)
        for suffix in SUFFIXES:
            if (file := self.folder / f"{backbone}{suffix}").is_file():
                return file
        there = sorted(path.name for path in self.folder.iterdir() if path.suffix in SUFFIXES)
        raise UserError(
            f"--weights {self.folder}: it has no {' or '.join(f'{backbone}{s}' for s in SUFFIXES)}, from which the "
            f"{stage} is to start; there are {', '.join(there) or 'no such files'}"
        )


def _pretrained(config: Config) -> Iterator[tuple[str, NetworkConfig]]:
    """The networks whose pretrained weights are timm's or the project's own, by stage."""
    for stage in needed_stages(config):
        network = getattr(config, stage.name)
        if isinstance(network, NetworkConfig) and network.pretrained and not (network.weights or network.checkpoint):
            yield stage.name, network
