"""Reader of a PASCAL VOC 2012 devkit, and of any data set laid out like one.

Layout (the folder named VOC2012):

    JPEGImages/<id>.jpg             the images
    Annotations/<id>.xml            image-level labels: the names of the objects
    SegmentationClass/<id>.png      pixel masks: class indices, 255 = ignore
    SegmentationClassAug/<id>.png   SBD's pixel masks, for the split trainaug
    ImageSets/Segmentation/*.txt    the splits, one image id a line
    classes.txt                     optional: object class names, one a line, instead of VOC's twenty

K counts the classes with the background, which is class 0 and present in every image.
"""

import difflib
import hashlib
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from semformer.errors import UserError
from semformer.machine import Note

BACKGROUND = "background"
IGNORE = 255
"""Label of the pixels that no score counts."""
VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person"),
    *("pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
VOC_COUNTS = {"train": 1464, "val": 1449, "trainaug": 10582}

HOW_TO_GET_DATA = (
    "Give the folder that holds VOC2012/ (with JPEGImages, Annotations, SegmentationClass and "
    "ImageSets/Segmentation), or make the embedded data set with `semformer data make-shapes DIR`."
)


def voc_palette() -> list[int]:
    """VOC's colour map, 256 * 3 values: R G B of index 0, R G B of index 1, and so on."""
    palette = np.zeros((256, 3), dtype=np.uint8)
    index = np.arange(256)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= (((index >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return palette.ravel().tolist()


def open_devkit(root: str | Path) -> "Devkit":
    """Find VOC2012 at, in, or under `VOCdevkit` in `root`, and read its class names.

    Raises UserError if there is no such folder, if it lacks one of the folders it must have, or if
    classes.txt is empty, too long, repeats a name or names the background.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UserError(f"The data folder {root} does not exist. {HOW_TO_GET_DATA}")
    candidates = (root / "VOC2012", root / "VOCdevkit" / "VOC2012", root)
    folder = next((c for c in candidates if (c / "JPEGImages").is_dir()), None)
    if folder is None:
        raise UserError(f"The data folder {root} is no VOC devkit: it has no JPEGImages. {HOW_TO_GET_DATA}")
    for part in ("Annotations", "ImageSets/Segmentation"):
        if not (folder / part).is_dir():
            raise UserError(f"The data folder {folder} has no {part}. {HOW_TO_GET_DATA}")
    return Devkit(folder, (BACKGROUND, *_read_class_names(folder / "classes.txt")))


@dataclass(frozen=True)
class Devkit:
    """An opened devkit: its VOC2012 folder and its K class names, "background" first."""

    folder: Path
    classes: tuple[str, ...]

    @cached_property
    def name(self) -> str:
        """ "VOC 2012" by its classes, else the name of the folder that holds VOC2012."""
        return "VOC 2012" if self.classes[1:] == VOC_CLASSES else self.folder.resolve().parent.name

    @property
    def split_names(self) -> tuple[str, ...]:
        """The names of the split files there are, sorted."""
        return tuple(sorted(p.stem for p in (self.folder / "ImageSets" / "Segmentation").glob("*.txt")))

    def split(self, name: str, *, labelled: bool = True) -> "Split":
        """Read a split's ids and labels.

        Raises UserError for an unknown or empty split, for a missing image or a missing or unusable annotation, and
        where no image has an object. Masks are looked at only when they are asked for. A split that need not be
        `labelled`, as VOC's test images are not, has no object in any image where an annotation is missing or unusable.
        """
        ids = self.ids(name)
        images = {p.name for p in (self.folder / "JPEGImages").iterdir()}
        absent = next((i for i in ids if f"{i}.jpg" not in images), None)
        if absent is not None:
            raise UserError(
                f"The image {self.folder / 'JPEGImages' / absent}.jpg, listed in split {name!r}, is missing."
            )
        try:
            labels = self._labels(ids)
        except UserError:
            if labelled:
                raise
            labels = np.eye(1, len(self.classes), dtype=np.float32).repeat(len(ids), axis=0)
        if labelled and not labels[:, 1:].any():
            raise UserError(f"No annotation of split {name!r} in {self.folder / 'Annotations'} names an object.")
        return Split(name=name, folder=self.folder, classes=self.classes, ids=ids, labels=labels)

    def _labels(self, ids: Sequence[str]) -> np.ndarray:
        """Those of `Split`. The annotations are read once per machine, and again when one has changed."""
        paths, note = [self.folder / "Annotations" / f"{i}.xml" for i in ids], None
        with suppress(OSError, ValueError):  # where a file is not there, reading it tells
            note = Note(paths, about="\n".join(("labels", *self.classes)))
            if known := note.read():
                rows = bytes.fromhex(known)
                return np.frombuffer(rows, np.uint8).reshape(len(ids), len(self.classes)).astype(np.float32)
        labels = np.stack([read_labels(path, self.classes) for path in paths])
        if note:
            note.write(labels.astype(np.uint8).tobytes().hex())
        return labels

    def ids(self, name: str) -> tuple[str, ...]:
        """The image ids of a split, in the file's order.

        `trainaug` without a file of its own is train + the ids that have an SBD mask
        (SegmentationClassAug) - val, sorted: 10,582 images for VOC 2012 (the paper prints 10,528).
        Raises UserError as `split` does, apart from images and annotations.
        """
        path = self.folder / "ImageSets" / "Segmentation" / f"{name}.txt"
        aug_folder = self.folder / "SegmentationClassAug"
        if path.is_file():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            ids = tuple(line.strip() for line in lines if line.strip())
        elif name == "trainaug":
            if not aug_folder.is_dir():
                raise UserError(
                    f"There is neither {path} nor {aug_folder}. Split 'trainaug' needs SBD's masks: "
                    f"put them, as PNGs of class indices, into {aug_folder}."
                )
            augmented = {p.stem for p in aug_folder.glob("*.png")}
            ids = tuple(sorted((augmented | set(self.ids("train"))) - set(self.ids("val"))))
        else:
            available = ", ".join(self.split_names) or "none"
            raise UserError(f"There is no split {name!r}: {path} is missing. Available: {available}.")
        if not ids:
            raise UserError(f"Split {name!r} is empty: {path} lists no image.")
        if len(set(ids)) < len(ids):
            twice = next(i for n, i in enumerate(ids) if i in ids[:n])
            raise UserError(f"{path} lists the image {twice!r} twice.")
        return ids

    def mask_path(self, image_id: str, split: str) -> Path:
        """SegmentationClass/<id>.png; for trainaug, SBD's mask of an image that VOC gives none."""
        path = self.folder / "SegmentationClass" / f"{image_id}.png"
        if split == "trainaug" and not path.is_file():
            return self.folder / "SegmentationClassAug" / f"{image_id}.png"
        return path


@dataclass(frozen=True, eq=False)
class Split:
    """A split in memory: ids and labels; images and masks are read when asked for (`pack.Packed` has them decoded).

    labels: (n, K) float32, 1 where the image has an object of the class; labels[:, 0] == 1. Objects that
    VOC marks as "difficult" count as present.
    """

    name: str
    folder: Path
    classes: tuple[str, ...]
    ids: tuple[str, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def batches(self, size: int) -> Iterator[range]:
        """The indices of all images, in turn, `size` at a time."""
        for first in range(0, len(self), size):
            yield range(len(self))[first : first + size]

    def objects(self, i: int) -> np.ndarray:
        """Present object classes of image i: 1..K-1, ascending."""
        return 1 + np.flatnonzero(self.labels[i, 1:])

    def image_path(self, i: int) -> Path:
        return self.folder / "JPEGImages" / f"{self.ids[i]}.jpg"

    def mask_path(self, i: int) -> Path:
        return Devkit(self.folder, self.classes).mask_path(self.ids[i], self.name)

    def pixels(self, i: int) -> np.ndarray:
        """Image i, decoded: (H, W, 3) uint8, RGB. Raises UserError if the file is missing, damaged or cut short."""
        return np.array(read_image(self.image_path(i)))

    def mask(self, i: int) -> np.ndarray:
        """Pixel mask i: (H, W) uint8, class indices, 255 = ignore.

        Raises UserError if the file is missing or damaged, if its size is not the image's, or if it holds
        a value that is neither a class index nor 255.
        """
        return read_mask(self.mask_path(i), self.image_path(i), len(self.classes))

    @cached_property
    def digest(self) -> str:
        """sha256 over class names, ids, labels and the image files' bytes: what a result may depend on.

        The files are read once per machine, and again when one has changed (by its times, size and inode).
        """
        return self._digest([self.image_path(i) for i in range(len(self))])

    @cached_property
    def mask_digest(self) -> str:
        """The same over the mask files' bytes. Only stages that read pixel masks depend on it."""
        return self._digest([self.mask_path(i) for i in range(len(self))])

    def digest_of(self, hashes: Iterable[bytes]) -> str:
        """What `digest` and `mask_digest` are of the sha256 of each file."""
        digest = hashlib.sha256("\n".join((*self.classes, "", *self.ids, "")).encode())
        digest.update(self.labels.astype(np.uint8).tobytes())
        for one in hashes:
            digest.update(one)
        return digest.hexdigest()

    def _digest(self, paths: Sequence[Path]) -> str:
        try:
            note = Note(paths, about=self.digest_of([]))  # the names, ids and labels, without files
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read: {error.strerror}.") from error
        digest = note.read()
        if digest is None:
            digest = self.digest_of(hashlib.sha256(read_bytes(path)).digest() for path in paths)
            note.write(digest)
        return digest


def read_bytes(path: Path) -> bytes:
    """Raises UserError where that is impossible."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error


def read_labels(path: Path, classes: tuple[str, ...]) -> np.ndarray:
    """Image-level labels of an annotation: (K,) float32, background 1, "difficult" objects included.

    Raises UserError for a missing file, malformed XML, what is no annotation, or a name that is not in `classes`.
    """
    try:
        root = ET.parse(path).getroot()
    except FileNotFoundError:
        raise UserError(f"The annotation {path} is missing.") from None
    except (ET.ParseError, ValueError, LookupError, OSError) as error:
        raise UserError(f"The annotation {path} is not readable as XML: {error}.") from error
    if root.tag != "annotation":
        raise UserError(f"The annotation {path} is XML of another kind: its root is <{root.tag}>, not <annotation>.")
    names = {(element.findtext("name") or "").strip() for element in root.iterfind("object")}
    labels = np.zeros(len(classes), dtype=np.float32)
    labels[0] = 1
    for name in sorted(names):
        if name not in classes[1:]:
            nearest = difflib.get_close_matches(name, classes[1:], n=1, cutoff=0.0)[0]
            raise UserError(
                f"The annotation {path} names the class {name!r}, which is not in the list. "
                f"The nearest valid one is {nearest!r}."
            )
        labels[classes.index(name)] = 1
    return labels


def read_image(path: str | Path, content: bytes | None = None) -> Image.Image:
    """Any image file, decoded, upright (EXIF), RGB. Raises UserError if it is missing, damaged or cut short.

    `content`: the file's bytes, where they have been read already.
    """
    with open_image("image", path, content) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16"):  # which Pillow would clip
            upright = Image.fromarray((np.array(upright) / 257).round().astype(np.uint8))
        elif upright.mode in ("I", "F"):
            raise UserError(
                f"The image {path} has 32 bits a pixel (mode {upright.mode}); save it with 8 bits a channel."
            )
        return upright.convert("RGB")


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of an image, upright, from its header. Raises UserError as `read_image` does."""
    with open_image("image", path) as image:
        width, height = image.size
        turned = image.getexif().get(ExifTags.Base.Orientation) in range(5, 9)
        return (height, width) if turned else (width, height)


def read_mask(path: Path, image_path: Path, num_classes: int) -> np.ndarray:
    """A mask PNG (palette or grey): (H, W) uint8. Raises UserError as `Split.mask` does."""
    with open_image("mask", path) as image:
        if image.mode not in ("P", "L"):
            raise UserError(
                f"The mask {path} has colour mode {image.mode}; it must hold class indices (palette or 8-bit grey PNG)."
            )
        mask = np.array(image)
    height, width = mask.shape
    size = image_size(image_path)
    if (width, height) != size:
        raise UserError(
            f"The mask {path} is {width}x{height} pixels, its image {image_path.name} is {size[0]}x{size[1]}."
        )
    counts = np.bincount(mask.ravel(), minlength=256)
    wrong = np.flatnonzero(counts[num_classes:IGNORE])
    if wrong.size:
        raise UserError(
            f"The mask {path} holds the value {num_classes + wrong[0]}; allowed are the class indices "
            f"0 to {num_classes - 1}, and {IGNORE} for pixels to ignore."
        )
    return mask


@contextmanager
def open_image(what: str, path: str | Path, content: bytes | None = None) -> Iterator[Image.Image]:
    """A file as Pillow opens it. Raises UserError if it is missing, or shows to be damaged by what is done with it."""
    try:
        with Image.open(path if content is None else BytesIO(content)) as image:
            yield image
    except FileNotFoundError:
        raise UserError(f"The {what} {path} is missing.") from None
    except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError) as error:
        raise UserError(f"The {what} {path} is damaged or no image: {error}.") from error


def _read_class_names(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        return VOC_CLASSES
    names = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if not names:
        raise UserError(f"{path} names no class; it must hold one object class name a line.")
    if BACKGROUND in names:
        raise UserError(f"{path} names {BACKGROUND!r}, which is added by itself: remove that line.")
    if len(names) >= IGNORE:
        raise UserError(f"{path} names {len(names)} classes; at most {IGNORE - 1} fit into a mask.")
    twice = next((name for n, name in enumerate(names) if name in names[:n]), None)
    if twice is not None:
        raise UserError(f"{path} names the class {twice!r} twice.")
    return tuple(names)
