"""`semformer`: make or check data, run the pipeline, draw maps, export label maps, import weights."""

import argparse
import errno
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from semformer.config import PRESETS, Config, Goal, LossName, PretrainConfig, ShapesConfig, load_config, parse_overrides
from semformer.errors import UserError, first_line

if TYPE_CHECKING:  # torch takes seconds to import
    import torch

    from semformer.keys import StageKey
    from semformer.pipeline import Data, StageRun
    from semformer.store import Store

STORE = Path("runs/store")
LOSSES = (*get_args(LossName), "recon")
console = Console(stderr=True)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except UserError as error:
        console.print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print("stopped; what had been finished is kept, and the same command goes on from there")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="semformer", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('semformer-sweeps')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run the pipeline for one config", allow_abbrev=False)
    add_config_arguments(run)
    until = "the last stage; its scores follow it (default: cams, the activation maps)"
    run.add_argument("--until", default="cams", choices=get_args(Goal), help=until)
    _add_run_arguments(run)
    run.set_defaults(command=_run)

    predict = commands.add_parser("predict", help="draw the maps for your own images", allow_abbrev=False)
    predict.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    add_config_arguments(predict)
    key = "a trained network by its key, or its trial's, as MLflow tells it (default: that of --preset, --set, --data)"
    predict.add_argument("--network", metavar="KEY", help=key)
    predict.add_argument("--classes", help="names of the classes in the images (default: those the network sees)")
    predict.add_argument(
        "--out", type=Path, default=Path("runs/predictions"), help="for the pictures (default: %(default)s)"
    )
    predict.add_argument("--device", default="auto", help="as for run")
    predict.set_defaults(command=_predict)

    export = commands.add_parser(
        "export-test",
        help="write the label maps of test images as PASCAL VOC's server takes them",
        description="Segments a split, by the network of `semformer run --until deeplab` with the same options, and "
        "writes its label maps as PNGs and as the archive that PASCAL VOC's test server takes, once it has checked "
        "them. The split needs a list and images, but neither masks nor annotations.",
        allow_abbrev=False,
    )
    add_config_arguments(export)
    export.add_argument("--split", default="test", metavar="NAME", help="whose images (default: %(default)s)")
    kind = "single or multi (scales), single_crf or multi_crf (default: multi_crf; multi where there is no CRF)"
    export.add_argument("--kind", metavar="KIND", help=kind)
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    _add_run_arguments(export)
    export.set_defaults(command=_export_test)

    importer = commands.add_parser(
        "import-checkpoint",
        help="turn weights under the published names into an artifact",
        allow_abbrev=False,
    )
    importer.add_argument("file", type=Path, metavar="FILE", help=".safetensors or .pth, of a whole network")
    importer.add_argument(
        "--kind", required=True, choices=("caae", "segmentor", "deeplab"), help="which network it is of"
    )
    add_config_arguments(importer)
    importer.set_defaults(command=_import_checkpoint)

    pretrain = commands.add_parser(
        "pretrain", help="train a backbone to tell other shapes apart, for the embedded data set", allow_abbrev=False
    )
    pretrain.add_argument("backbone", metavar="BACKBONE", help="a plain ViT, by its name in timm")
    pretrain.add_argument("--out", type=Path, required=True, metavar="FILE", help="for its weights (.safetensors)")
    pretrain.add_argument("--images", type=_count(1), default=20_000, help="to learn from (%(default)s)")
    pretrain.add_argument("--epochs", type=_count(1), default=30, help="(%(default)s)")
    pretrain.add_argument("--image-size", type=_count(32), default=64, help="side in pixels (%(default)s)")
    pretrain.add_argument("--seed", type=_count(0, 2**32 - 1), default=0)
    pretrain.add_argument("--device", default="auto", help="as for run")
    pretrain.add_argument("--threads", type=_count(1, 1024), default=1, help="as for run")
    add_store_argument(pretrain)
    pretrain.set_defaults(command=_pretrain)

    data = commands.add_parser("data", help="make or check a data set").add_subparsers(required=True, metavar="COMMAND")
    shapes = data.add_parser("make-shapes", help="write the embedded data set in VOC layout", allow_abbrev=False)
    shapes.add_argument("folder", type=Path, metavar="DIR")
    shapes.add_argument("--train", type=_count(1), default=2000, help="images to learn from")
    shapes.add_argument("--val", type=_count(1), default=200, help="images to measure on")
    shapes.add_argument("--size", type=_count(32), default=64, help="side in pixels")
    shapes.add_argument("--seed", type=_count(0), default=0)
    shapes.set_defaults(command=_make_shapes)
    check = data.add_parser("check", help="count a VOC devkit's images and read every file", allow_abbrev=False)
    check.add_argument("folder", type=Path, metavar="DIR")
    check.set_defaults(command=_check_data)
    pack = data.add_parser("pack", help="decode a devkit's images and masks beforehand, once", allow_abbrev=False)
    pack.add_argument("folder", type=Path, metavar="DIR")
    of = "whose splits: trainaug and train of paper (default), train and val of the others"
    pack.add_argument("--preset", default="paper", choices=tuple(PRESETS), help=of)
    add_store_argument(pack)
    pack.set_defaults(command=_pack_data)
    return parser


def _count(least: int, most: int = 2**31):
    def count(text: str) -> int:
        if not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least} and {most}")
        return int(text)

    return count


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """--json, --device and --threads, of what makes stages and tells which."""
    parser.add_argument("--json", action="store_true", help="end with one JSON object on standard output")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    parser.add_argument(
        "--threads",
        type=_count(1, 1024),
        default=1,
        metavar="N",
        help="on a CPU; another number rounds differently (default: 1)",
    )


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """--preset, --set, --weights, --data and --store, as every command has them."""
    preset = "micro: toy networks, in seconds; tiny (default): small ones that learn; paper: the paper's, on --data"
    parser.add_argument("--preset", default="tiny", choices=tuple(PRESETS), help=preset)
    field = "change a field of the config, such as segmentor.sigma=0.05"
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help=field)
    parser.add_argument("--weights", metavar="FILE", help="backbone weights of the segmentation network (timm's names)")
    parser.add_argument("--caae-weights", metavar="FILE", help="backbone weights of the CAAE's encoder")
    parser.add_argument("--data", type=Path, metavar="DIR", help="a VOC devkit (default: the embedded shapes)")
    add_store_argument(parser)


def add_store_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--store", default=STORE, metavar="DIR", help="of artifacts: a folder, or s3://BUCKET/PREFIX (%(default)s)"
    )


def read_config(options: argparse.Namespace, **fields: str) -> Config:
    """The config that `add_config_arguments` describes; `fields` as options of their own set them, like --weights."""
    files = {"segmentor.weights": options.weights, "caae.weights": options.caae_weights}
    overrides = {name: path for name, path in files.items() if path} | fields
    return load_config(options.preset, overrides | parse_overrides(options.set))


def _run(options: argparse.Namespace) -> int:
    config = read_config(options)
    import torch

    from semformer import pipeline
    from semformer.store import open_store

    device = _device(options.device)
    torch.set_num_threads(options.threads)
    with _Display() as display:
        data = pipeline.open_data(config, options.data, progress=display.data)
        store = open_store(options.store)
        until = pipeline.ends(config, options.until)
        keys = list(pipeline.stage_keys(config, data, until).values())
        _keep(store, "run", keys, {"preset": options.preset})
        used = {stage.group for stage in pipeline.needed_stages(config, until)}
        for field in parse_overrides(options.set):
            if field.partition(".")[0] in {stage.group for stage in pipeline.STAGES} - used:
                _tell(f"--set {field} changes nothing of a run --until {options.until} with these settings")
        runs = _make(config, data, store, device, until, display)
    evaluated = [run.artifact for run in runs if "metrics" in run.artifact.info]
    metrics = pipeline.scores(evaluated)
    for name, value in metrics.items():
        console.print(f"{name:32} {value:8.2f}", highlight=False)
    for one in evaluated:
        for name in sorted(name for name in one.files if name.startswith("pictures/")):
            _tell(f"picture {one.file(name)}")
    if config.deeplab.supervised and not config.deeplab.checkpoint and options.until == "deeplab":
        _tell(f"the segmentation has learnt from the pixel masks of {config.data.train_split}: an upper bound")
    if chain := _chain(metrics, config.data.mask_split, config.data.test_split):
        _tell(f"mIoU: {chain}")
    if options.json:
        print(json.dumps({"metrics": metrics, "stages": _stages(runs)}))
    return 0


def _make(
    config: Config,
    data: "Data",
    store: "Store",
    device: "torch.device",
    until: str | Sequence[str],
    display: "_Display",
) -> "list[StageRun]":
    """`pipeline.run`, of which everything is shown."""
    from semformer import pipeline

    runs = []
    for run in pipeline.run(
        config, data, store, device=device, progress=display.stage, waiting=display.waiting, until=until
    ):
        runs.append(run)
        display.done(run)
    return runs


def _stages(runs: "Sequence[StageRun]") -> list[dict[str, Any]]:
    """What --json tells of them."""
    return [{"stage": r.stage, "key": r.key, "found": r.found, "seconds": round(r.seconds, 3)} for r in runs]


LINKS = (
    ("maps", "cam/{masks}/miou"),
    ("random walk", "walk/{masks}/miou"),
    ("pseudo masks", "pseudo/{masks}/miou"),
    ("segmentation", "seg/{test}/miou"),
    ("with CRF", "seg/{test}/miou_crf"),
)


def _chain(metrics: Mapping[str, float], masks: str, test: str) -> str:
    """From the maps to the segmentation, as far as it was made: "maps 63.7 -> ..."."""
    names = {told: name.format(masks=masks, test=test) for told, name in LINKS}
    links = [f"{told} {metrics[name]:.1f}" for told, name in names.items() if name in metrics]
    splits = [f"maps and masks of {masks}"] * (names["pseudo masks"] in metrics)
    splits += [f"segmentation of {test}"] * (names["segmentation"] in metrics)
    return f"{' -> '.join(links)} ({', '.join(splits)})" if len(links) > 1 else ""


def _predict(options: argparse.Namespace) -> int:
    config = read_config(options)
    from semformer import predict
    from semformer.store import open_store

    store = open_store(options.store)
    if options.network:
        network = predict.network_by_key(options.network, config, store)
    else:
        network = predict.network_of(config, options.data, store)
    drawn = predict.draw_maps(network, options.images, options.classes, options.out, _device(options.device))
    for one in drawn:
        told = f"{one.image}: {', '.join(one.classes) or 'no object class'} -> {one.picture}"
        told += f" ({one.note})" if one.note else ""
        _tell(told)
    return 0


def _export_test(options: argparse.Namespace) -> int:
    config = read_config(options, **{"data.test_split": options.split})
    import torch

    from semformer import pipeline, submission
    from semformer.stages.shards import label_maps_in
    from semformer.store import open_store

    kind, name = submission.kind_of(config, options.kind), config.data.test_split
    device = _device(options.device)
    torch.set_num_threads(options.threads)
    with _Display() as display:
        data = pipeline.open_data(config, options.data, progress=display.data, unlabelled=[name])
        store = open_store(options.store)
        keys = pipeline.stage_keys(config, data, "segmentation")
        submission.check_trained(config, keys, store)
        submission.make_room(options.out)
        _keep(store, "export", list(keys.values()), {"preset": options.preset})
        runs = _make(config, data, store, device, "segmentation", display)
        label_maps = label_maps_in(runs[-1].artifact)
        folder, archive = submission.write(label_maps, kind, data[name], options.out, display.stage)
    _tell(f"{len(data[name])} label maps ({kind}) of {name}, one for each image, checked: {folder}")
    _tell(f"for the server: {archive}")
    if options.json:
        told = {"split": name, "kind": kind, "images": len(data[name]), "folder": str(folder), "archive": str(archive)}
        print(json.dumps({**told, "stages": _stages(runs)}))
    return 0


def _tell(text: str) -> None:
    """A line with names of files, in which nothing is markup."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _keep(store: "Store", kind: str, keys: "Sequence[StageKey]", about: dict[str, Any]) -> None:
    """`gc` leaves these stages: who asks for them wants them, before they are made, and if it is interrupted."""
    name, wanted = f"{kind}-{keys[-1].digest[:12]}", {key.digest for key in keys}
    there = store.roots.kept(name)
    if not there or not wanted <= there.digests:  # what comes before the last stage may be measured in another way
        store.roots.keep(name, wanted | (there.digests if there else set()), about)


def _pretrain(options: argparse.Namespace) -> int:
    import torch

    from semformer.data.shapes import cached_shapes
    from semformer.data.voc import open_devkit
    from semformer.models.vit import check_tiles
    from semformer.pretrain import WEIGHTS, pretrain, pretrain_key
    from semformer.store import open_store

    check_tiles(options.backbone, options.image_size, "--image-size")
    config = PretrainConfig(backbone=options.backbone, image_size=options.image_size, epochs=options.epochs)
    device = _device(options.device)
    _put(Path(os.devnull), options.out, keep=False)  # before it takes minutes
    torch.set_num_threads(options.threads)
    with _Display() as display:
        shapes = ShapesConfig(train=options.images, val=2000, size=options.image_size)
        devkit, store = open_devkit(cached_shapes(shapes, "pretraining", display.data)), open_store(options.store)
        _keep(store, "pretrain", [pretrain_key(config, devkit.split("train"), options.seed)], {})
        artifact, found = pretrain(
            config,
            devkit,
            store,
            seed=options.seed,
            device=device,
            progress=display.stage,
            waiting=display.waiting,
        )
    _put(artifact.file(WEIGHTS), options.out)
    made = f"{'found' if found else 'made'}, {artifact.info['accuracy']:.1f} % right on new images"
    _tell(f"{options.backbone} {artifact.key.short} ({made}): {options.out}")
    use = f"--weights {options.out} --set segmentor.backbone={options.backbone}, or --caae-weights and caae.backbone, "
    use += f"in a sweep with --weights {options.backbone}={options.out}"
    _tell(f"use it with {use}")
    return 0


def _put(source: Path, out: Path, *, keep: bool = True) -> None:
    """Copies a file to --out, in one step for who reads it meanwhile; with `keep` false, only finds out whether it can.

    Raises UserError where that cannot be written, and for a name of which nobody would read weights.
    """
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: name a file that ends with .safetensors")
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        try:
            shutil.copyfile(source, partial)
            if keep:
                partial.replace(out)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        where = f" (they are in {source})" if keep else ""
        raise UserError(f"the weights cannot be written to --out {out}: {error.strerror}{where}") from error


def _import_checkpoint(options: argparse.Namespace) -> int:
    config = load_config(
        options.preset, {f"{options.kind}.checkpoint": str(options.file)} | parse_overrides(options.set)
    )
    from semformer import pipeline
    from semformer.store import open_store

    data, store = pipeline.open_classes(config, options.data), open_store(options.store)
    _keep(store, "import", list(pipeline.stage_keys(config, data, options.kind).values()), {"file": str(options.file)})
    with _Display() as display:
        *_, run = pipeline.run(
            config,
            data,
            store,
            device=_device("cpu"),
            progress=display.stage,
            until=options.kind,
        )
    _tell(f"{options.kind} {run.key} {'was there' if run.found else 'imported'}: {run.artifact.path}")
    _tell(f"use it with --set {options.kind}.checkpoint={options.file}")
    return 0


def _make_shapes(options: argparse.Namespace) -> int:
    from semformer.data.shapes import make_shapes

    with _Display() as display:
        folder = make_shapes(
            options.folder,
            train=options.train,
            val=options.val,
            size=options.size,
            seed=options.seed,
            progress=display.data,
        )
    _tell(f"shapes data set in {folder}: use it with --data {folder}")
    return 0


def _check_data(options: argparse.Namespace) -> int:
    from semformer.data.check import check_devkit

    with _Display() as display:
        findings = check_devkit(options.folder, progress=display.data)
    for line in findings.lines:
        _tell(line)
    for problem in findings.problems:
        console.print(f"[red]problem:[/] {escape(problem)}", highlight=False, soft_wrap=True)
    return 1 if findings.problems else 0


def _pack_data(options: argparse.Namespace) -> int:
    from semformer import pipeline
    from semformer.store import open_store

    config = load_config(options.preset)
    data, store = pipeline.open_data(config, options.folder), open_store(options.store)
    with _Display() as display:
        for name, kind, artifact, found in pipeline.find_or_pack(config, data, store, display.stage, display.waiting):
            size = sum(file["size"] for file in artifact.files.values()) / 2**20
            done = "were there" if found else "packed"
            _keep(store, "pack", [artifact.key], {"data": str(options.folder)})
            _tell(f"{name}: {len(data[name])} {kind} {done}, {size:.1f} MiB in {artifact.path}")
    return 0


def _device(name: str):
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used: {first_line(error)[:200]}") from error
    return device


class _Display:
    """One live line per stage in a terminal; elsewhere a printed line per epoch, and every `EVERY` seconds."""

    EVERY = 30.0

    def __init__(self):
        self.live, self.printed = console.is_terminal, time.monotonic()
        columns = (
            TextColumn("{task.description:10}"),
            BarColumn(20),
            TextColumn("{task.fields[told]}"),
            TimeElapsedColumn(),
        )
        self.bars = Bars(*columns, console=console, disable=not self.live)
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "_Display":
        self.bars.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.bars.stop()

    def _update(self, name: str, done: int, total: int, told: str) -> None:
        if name not in self.tasks:
            self.tasks[name] = self.bars.add_task(name, total=total, told="")
        self.bars.update(self.tasks[name], completed=done, total=total, told=told)

    def data(self, done: int, total: int) -> None:
        self._update("data", done, total, f"{done}/{total} images")
        self._print(f"data: {done}/{total} images", at_once=done == total)

    def stage(self, report) -> None:
        names = [name for name in LOSSES if name in report.values] or ["total"] * ("total" in report.values)
        losses = " ".join(f"{name} {report.values[name]:.3f}" for name in names)
        epoch = f"epoch {report.epoch}/{report.epochs}" if report.epochs else f"{report.done}/{report.total}"
        rate = report.images_per_second
        speed = f"{rate:.{0 if rate >= 10 else 1}f} img/s, {report.seconds_left:.0f} s left"
        told = " ".join(filter(None, (epoch, losses, speed, report.note)))
        self._update(report.stage, report.done, report.total, told)
        self._print(f"{report.stage}: {told}", at_once=report.end_of_epoch)

    def waiting(self, key, holder) -> None:
        told = f"waiting: {holder} makes it"
        self._print(f"{key.stage}: {told}", at_once=key.stage not in self.tasks)
        self._update(key.stage, 0, 1, told)

    def done(self, run) -> None:
        told = "found in the store" if run.found else f"made in {run.seconds:.1f} s"
        self._update(run.stage, 1, 1, f"{told} ({run.key[:12]})")
        self._print(f"{run.stage}: {told} ({run.key[:12]})")

    def _print(self, told: str, *, at_once: bool = True) -> None:
        """Where there is no terminal; what need not be told at once, when nothing was for a while."""
        if not self.live and (at_once or time.monotonic() > self.printed + self.EVERY):
            console.print(told, highlight=False, soft_wrap=True)
            self.printed = time.monotonic()


if __name__ == "__main__":
    sys.exit(main())
