"""Data for the demo: generated scenes, or a folder of images and labels.

Both sources offer the same: `names` and `shares` of the classes, `ignore_index`, `training(rng)`, one random training
sample of a fixed size, and `validation()`, the samples to measure on. They need numpy, pillow and tqdm, which are in
the extra `demo`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, UnidentifiedImageError
from tqdm import tqdm

Pixels = npt.NDArray[np.uint8]
Texture = npt.NDArray[np.float32]
Box = tuple[float, float, float, float]
Colour = tuple[float, float, float]

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


class DataError(Exception):
    """The data cannot be used; the message says what was expected and what was found."""


class Sample(NamedTuple):
    """An image (H, W, 3) and its labels (H, W): a class index at each pixel, or the ignored index."""

    image: Pixels
    labels: Pixels


class Source(Protocol):
    """What the demo asks of its data."""

    names: tuple[str, ...]
    ignore_index: int
    description: str
    note: str  # what may not be as meant, or ""
    shares: tuple[float, ...]  # of the classes in the labelled pixels

    def training(self, rng: np.random.Generator) -> Sample: ...

    def validation(self) -> Iterator[Sample]: ...


class Scenes:
    """Generated street scenes with both failure cases of the paper.

    Thin parts on large bodies: an animal's legs and antennae, a tree's trunk, a lamp's post. Large objects whose parts
    look like another class: a bus whose lower half is a car's sheet metal, a tower whose glass mirrors the sky. Their
    outlines are ignored, as in Pascal VOC, but outside the object only, so that thin parts keep their pixels.

    Args:
        seed: of the scenes.
        ignore_index: label of the outlines, not one of the classes.
    """

    note = ""
    names: tuple[str, ...] = ("sky", "ground", "tower", "tree", "lamp", "animal", "car", "bus")
    height, width = 128, 160
    training_count, validation_count = 400, 64

    def __init__(self, seed: int = 0, ignore_index: int = 255) -> None:
        if not len(self.names) <= ignore_index <= 255:
            raise DataError(
                f"--ignore-index {ignore_index}: the generated scenes have classes 0 to {len(self.names) - 1}; "
                f"expected a number from {len(self.names)} to 255"
            )
        self.ignore_index = ignore_index
        self.description = (
            f"generated scenes of {self.width} x {self.height} pixels: "
            f"{self.training_count} for training, {self.validation_count} for validation"
        )
        self._seed = seed
        some = np.concatenate([self._scene(0, i).labels.ravel() for i in range(self.training_count // 4)])
        counts = np.bincount(some, minlength=256)[: len(self.names)]
        self.shares = tuple((counts / counts.sum()).tolist())

    def training(self, rng: np.random.Generator) -> Sample:
        sample = self._scene(0, int(rng.integers(self.training_count)))
        return _flipped(sample) if rng.random() < 0.5 else sample

    def validation(self) -> Iterator[Sample]:
        return (self._scene(1, i) for i in range(self.validation_count))

    @functools.cached_property
    def _scene(self) -> Callable[[int, int], Sample]:
        """Scene i of split 0 or 1, painted once."""

        @functools.cache
        def scene(split: int, i: int) -> Sample:
            rng = np.random.default_rng((self._seed, split, i))
            return _Painter(rng, self.height, self.width, self.ignore_index).scene()

        return scene


class Folder:
    """Images and labels in `root`/train|val/images|labels, an image and its label of one stem.

    Labels are 8-bit PNGs with one class index a pixel. Everything is reduced to a size that trains in minutes, and
    decoded when it is first needed.

    Args:
        root: the folder.
        ignore_index: label that is not a class.

    Raises:
        DataError: the folder is not like this.
    """

    side = 192  # the shorter side of an image
    crop = (128, 160)  # height and width of a training sample
    scales = (0.75, 1.5)  # of the image, when such a sample is cut out of it
    validation_count = 128

    def __init__(self, root: Path, ignore_index: int = 255) -> None:
        self.ignore_index = ignore_index
        self._train, val = _pairs(root, "train"), _pairs(root, "val")
        self._val = val[:: math.ceil(len(val) / self.validation_count)]
        found = np.zeros(256, np.int64)
        for image, label in tqdm(self._train + self._val, desc="reading the labels", unit="file", leave=False):
            found += _label_counts(image, label, ignore_index)
        counts = found.copy()
        counts[ignore_index] = 0
        present = np.flatnonzero(counts)
        if len(present) < 2:
            raise DataError(
                f"--data {root}: expected labels of two classes or more besides --ignore-index {ignore_index}, found "
                f"{'only ' + str(present[0]) if len(present) else 'none'}"
            )
        classes = int(present[-1]) + 1
        self.shares = tuple((counts[:classes] / counts.sum()).tolist())
        self.names = tuple(f"class {i}" for i in range(classes))
        void = found[ignore_index] / found.sum()
        occur = f" ({len(present)} of them occur)" if len(present) < classes else ""
        self.description = (
            f"{root}: {len(self._train)} images for training, {len(self._val)} of {len(val)} for validation, reduced "
            f"to {self.side} pixels along the shorter side; labels {_ranges(np.flatnonzero(found))}: {classes} classes "
            f"are trained{occur}, void is label {ignore_index}, {100 * void:.1f} % of the pixels"
        )
        # No file says which label is void; but where one is, some pixels have it.
        self.note = (
            ""
            if void
            else f"no pixel has label {ignore_index}, so every label is trained as a class. If one of them is void, "
            f"often the last or the first, name it: --ignore-index {present[-1]}, say"
        )
        self._load = functools.lru_cache(maxsize=1000)(self._decode)

    def training(self, rng: np.random.Generator) -> Sample:
        image, labels = self._load(*self._train[rng.integers(len(self._train))])
        height, width = self.crop
        scale = max(rng.uniform(*self.scales), height / image.height, width / image.width)
        left = rng.uniform(0, image.width - width / scale)
        top = rng.uniform(0, image.height - height / scale)
        box = (left, top, min(left + width / scale, image.width), min(top + height / scale, image.height))
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box), np.float32)
        pixels = (pixels * np.float32(rng.uniform(0.75, 1.25))).clip(0, 255)
        sample = Sample(
            pixels.astype(np.uint8), np.asarray(labels.resize((width, height), Image.Resampling.NEAREST, box))
        )
        return _flipped(sample) if rng.random() < 0.5 else sample

    def validation(self) -> Iterator[Sample]:
        return self._whole(self._val)

    def all_training(self) -> Iterator[Sample]:
        """Every training sample once, in the order of their names and as a whole: neither cut nor flipped."""
        return self._whole(self._train)

    def _whole(self, pairs: Sequence[tuple[Path, Path]]) -> Iterator[Sample]:
        for pair in pairs:
            image, labels = self._decode(*pair)
            yield Sample(np.asarray(image), np.asarray(labels))

    def _decode(self, image_path: Path, label_path: Path) -> tuple[Image.Image, Image.Image]:
        with _opened(image_path) as image, _opened(label_path) as labels:
            scale = min(1.0, self.side / min(image.size))
            size = (round(image.width * scale), round(image.height * scale))
            image.draft("RGB", size)  # a JPEG decodes directly to about this size
            try:
                pixels = image.convert("RGB")
            except OSError as error:
                raise DataError(f"{image_path}: cannot be decoded: {error}") from error
            return (
                pixels.resize(size, Image.Resampling.BILINEAR),
                labels.resize(size, Image.Resampling.NEAREST),
            )


def _pairs(root: Path, split: str) -> list[tuple[Path, Path]]:
    """The (image, label) paths of a split, sorted."""
    expected = "expected the folders train/images, train/labels, val/images and val/labels"
    if not root.is_dir():
        raise DataError(f"--data {root}: {expected}, found {'a file' if root.exists() else 'no such folder'}")
    images, labels = root / split / "images", root / split / "labels"
    for folder in (images, labels):
        if not folder.is_dir():
            nearest = next(parent for parent in folder.parents if parent.is_dir())
            raise DataError(f"--data {root}: {expected}; {folder} is missing, {nearest} holds {_listing(nearest)}")
    found = sorted(path for path in images.iterdir() if path.suffix.lower() in _IMAGE_SUFFIXES)
    if not found:
        raise DataError(f"{images}: expected images ({', '.join(_IMAGE_SUFFIXES)}), found {_listing(images)}")
    pairs = [(path, labels / f"{path.stem}.png") for path in found]
    lonely = [image for image, label in pairs if not label.is_file()]
    if lonely:
        raise DataError(
            f"{len(lonely)} of {len(found)} images in {images} have no label, the first is {lonely[0].name}: expected "
            f"{labels / lonely[0].stem}.png; {labels} holds {_listing(labels)}"
        )
    return pairs


def _label_counts(image_path: Path, label_path: Path, ignore_index: int) -> npt.NDArray[np.int64]:
    """How many pixels of each value 0 to 255 a label file holds."""
    with _opened(image_path) as image, _opened(label_path) as labels:
        if labels.mode not in ("L", "P"):
            kind = {"RGB": "a colour image", "RGBA": "a colour image"}.get(labels.mode, "another kind of image")
            raise DataError(
                f"{label_path}: expected one 8-bit class index a pixel (a grey or palette PNG, mode L or P), found "
                f"{kind}, mode {labels.mode}"
            )
        if labels.size != image.size:
            raise DataError(
                f"{label_path}: expected the image's size {image.width} x {image.height}, found "
                f"{labels.width} x {labels.height}"
            )
        try:
            counts = np.array(labels.histogram(), np.int64)
        except OSError as error:
            raise DataError(f"{label_path}: cannot be decoded: {error}") from error
    if counts[255] and ignore_index != 255:
        raise DataError(
            f"{label_path}: found label 255, which usually means void, but --ignore-index is {ignore_index}; expected "
            f"class indices up to 254. Give void pixels one number, and pass that as --ignore-index"
        )
    return counts


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{path}: expected an image, found: {error}") from error


def _ranges(numbers: npt.NDArray[np.int64]) -> str:
    """Sorted numbers in short: "0-3, 7"."""
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _listing(folder: Path) -> str:
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    return ", ".join(names[:5]) + f" and {len(names) - 5} more" * (len(names) > 5) or "nothing"


def _flipped(sample: Sample) -> Sample:
    return Sample(sample.image[:, ::-1], sample.labels[:, ::-1])


class _Painter:
    """Paints one scene, from the back to the front."""

    def __init__(self, rng: np.random.Generator, height: int, width: int, ignore_index: int) -> None:
        self.rng, self.height, self.width, self.ignore_index = rng, height, width, ignore_index
        self.sky = self._clouds()
        self.image = self.sky.copy()
        self.labels: Pixels = np.full((height, width), Scenes.names.index("sky"), np.uint8)

    def scene(self) -> Sample:
        rng, h = self.rng, self.height
        horizon = rng.uniform(0.42, 0.58) * h
        ground = self._noisy(self._colour((95, 85, 70), (135, 130, 120)), cells=6, amount=28)
        self._put("ground", ground, lambda draw: draw.rectangle((0, horizon, self.width, h), fill=1))
        for _ in range(rng.integers(1, 3)):
            self._tower(horizon + rng.uniform(0.01, 0.06) * h)
        things: list[Callable[[float], None]] = [self._animal, self._car, self._bus, self._tree, self._lamp]
        chosen = [things[i] for i in rng.choice(5, size=rng.integers(3, 6), p=(0.22, 0.25, 0.18, 0.17, 0.18))]
        feet = np.sort(rng.uniform(horizon + 0.14 * h, 0.97 * h, size=len(chosen)))
        for thing, foot in zip(chosen, feet, strict=True):
            thing(float(foot))
        grain = 7 * rng.standard_normal((h, self.width, 3), np.float32)
        pixels = self.image * np.float32(rng.uniform(0.8, 1.15)) + grain
        return Sample(pixels.clip(0, 255).astype(np.uint8), self.labels)

    # Things. `foot` is the height at which they stand on the ground; sizes are fractions of the scene's height.

    def _tower(self, foot: float) -> None:
        w, h = self._size(0.22, 0.45), self._size(0.40, 0.70)
        x = self._place(w)
        top = foot - h
        wall = self._noisy(self._colour((120, 70, 60), (190, 130, 110)), cells=16, amount=30)
        self._put("tower", wall, lambda draw: draw.rectangle((x, top, x + w, foot), fill=1))
        glass = foot - h * self.rng.uniform(0.35, 0.5)  # above it the tower mirrors the sky, within a thin frame
        mirrored = np.roll(self.sky, self.width // 3, axis=1)
        self._put("tower", mirrored, lambda draw: draw.rectangle((x + 2, top + 2, x + w - 2, glass), fill=1))

    def _tree(self, foot: float) -> None:
        h, r = self._size(0.40, 0.62), self._size(0.12, 0.18)
        x = self._place(2 * r) + r
        bark = self._noisy((92, 66, 44), cells=20, amount=25)
        trunk = max(2, round(0.024 * self.height))
        self._put("tree", bark, lambda draw: draw.line((x, foot, x, foot - h + r), fill=1, width=trunk))
        leaves = self._noisy(self._colour((35, 80, 25), (80, 135, 60)), cells=24, amount=60)
        blobs = self.rng.uniform(-0.45 * r, 0.45 * r, size=(5, 2))

        def crown(draw: ImageDraw.ImageDraw) -> None:
            for dx, dy in blobs:
                draw.ellipse(_around(x + dx, foot - h + r + dy, 0.75 * r, 0.75 * r), fill=1)

        self._put("tree", leaves, crown)

    def _lamp(self, foot: float) -> None:
        h, arm = self._size(0.45, 0.68), self._size(0.08, 0.16) * self.rng.choice((-1, 1))
        x = self._place(0.2 * self.height)
        metal = self._noisy(self._colour((50, 52, 58), (95, 97, 104)), cells=10, amount=15)
        width = max(2, round(0.024 * self.height))

        def post(draw: ImageDraw.ImageDraw) -> None:
            draw.line((x, foot, x, foot - h, x + arm, foot - h), fill=1, width=width)
            draw.ellipse(_around(x + arm, foot - h + 1, 0.035 * self.height, 0.022 * self.height), fill=1)

        self._put("lamp", metal, post)

    def _animal(self, foot: float) -> None:
        a, b, legs = self._size(0.15, 0.25), self._size(0.09, 0.13), self._size(0.15, 0.22)
        side = self.rng.choice((-1, 1))
        x, y = self._place(2 * a) + a, foot - legs - 0.6 * b
        width = max(2, round(0.024 * self.height))
        fur = self._spotted(self._colour((170, 130, 90), (235, 205, 170)), (70, 45, 35))
        bends = self.rng.uniform(-0.10, 0.10, size=4) * self.height
        head = (x + side * 1.15 * a, y - 0.7 * b)

        def body(draw: ImageDraw.ImageDraw) -> None:
            for place, bend in zip((-0.75, -0.4, 0.4, 0.75), bends, strict=True):
                draw.line((x + place * a, y, x + place * a + bend / 2, foot), fill=1, width=width)
            draw.ellipse(_around(x, y, a, b), fill=1)
            draw.ellipse(_around(*head, 0.4 * a, 0.55 * b), fill=1)
            for lean in (0.1, 0.7):
                tip = (head[0] + side * lean * a, head[1] - 1.5 * b)
                draw.line((*head, *tip), fill=1, width=width)

        self._put("animal", fur, body)

    def _car(self, foot: float) -> None:
        w, h = self._size(0.32, 0.42), self._size(0.085, 0.115)
        x, paint = self._place(w), self._sheet_metal(foot - h, foot)
        top = foot - 1.8 * h

        def shell(draw: ImageDraw.ImageDraw) -> None:
            draw.rounded_rectangle((x, foot - h, x + w, foot), 3, fill=1)
            draw.polygon(
                [(x + 0.15 * w, foot - h), (x + 0.3 * w, top), (x + 0.7 * w, top), (x + 0.88 * w, foot - h)], fill=1
            )

        self._put("car", paint, shell)
        self._put("car", self._glass(), lambda d: d.rectangle((x + 0.32 * w, top + 2, x + 0.68 * w, foot - h), fill=1))
        self._wheels("car", x, w, foot)

    def _bus(self, foot: float) -> None:
        w, h = self._size(0.60, 0.85), self._size(0.30, 0.40)
        x = self._place(w)
        middle = foot - 0.5 * h
        roof = self._noisy(self._colour((200, 170, 40), (245, 215, 100)), cells=8, amount=15)
        self._put("bus", roof, lambda draw: draw.rounded_rectangle((x, foot - h, x + w, foot), 4, fill=1))
        panes = int(self.rng.integers(4, 7))

        def windows(draw: ImageDraw.ImageDraw) -> None:
            for i in range(panes):
                left = x + w * (i + 0.15) / panes
                draw.rectangle((left, foot - 0.88 * h, left + 0.7 * w / panes, middle - 0.04 * h), fill=1)

        self._put("bus", self._glass(), windows)
        below = self._sheet_metal(middle, foot)  # as a car's: only what is above it tells that this is a bus
        self._put("bus", below, lambda draw: draw.rectangle((x, middle, x + w, foot), fill=1))
        self._wheels("bus", x, w, foot)

    def _wheels(self, name: str, x: float, w: float, foot: float) -> None:
        radius = 0.035 * self.height
        rubber = self._noisy((38, 38, 40), cells=8, amount=10)

        def wheels(draw: ImageDraw.ImageDraw) -> None:
            for place in (0.2, 0.8):
                draw.ellipse(_around(x + place * w, foot, radius, radius), fill=1)

        self._put(name, rubber, wheels)

    # Textures, (H, W, 3), from 0 to 255.

    def _clouds(self) -> Texture:
        below, above = self._colour((170, 195, 215), (220, 230, 240)), self._colour((90, 140, 190), (140, 185, 230))
        ramp = np.linspace(0, 1, self.height, dtype=np.float32)[:, None, None]
        texture: Texture = above + (below - above) * ramp + 70 * self._waves(5).clip(0, 1)
        return texture

    def _noisy(self, colour: npt.ArrayLike, cells: int, amount: float) -> Texture:
        texture: Texture = np.asarray(colour, np.float32) + np.float32(amount) * self._waves(cells)
        return texture

    def _spotted(self, colour: npt.ArrayLike, spots: npt.ArrayLike) -> Texture:
        return np.where(self._waves(16) > 0.25, np.asarray(spots, np.float32), np.asarray(colour, np.float32))

    def _sheet_metal(self, top: float, foot: float) -> Texture:
        paints = np.array([(170, 40, 40), (40, 70, 150), (215, 215, 220), (40, 110, 80)], np.float32)
        paint = self.rng.choice(paints) + self._colour((-20, -20, -20), (20, 20, 20))
        rows = (np.arange(self.height, dtype=np.float32) - top) / (foot - top)
        shine = 45 * np.exp(-(((rows - 0.3) / 0.12) ** 2)) - 40 * rows.clip(0, 1)
        return np.broadcast_to(paint + shine[:, None, None], (self.height, self.width, 3)).astype(np.float32)

    def _glass(self) -> Texture:
        return self._noisy((60, 80, 95), cells=4, amount=25)

    def _colour(self, least: Colour, most: Colour) -> Texture:
        return self.rng.uniform(least, most).astype(np.float32)

    def _waves(self, cells: int) -> Texture:
        """Smooth noise in about [-1, 1], (H, W, 1)."""
        noise = Image.fromarray(self.rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
        return np.asarray(noise.resize((self.width, self.height), Image.Resampling.BICUBIC))[:, :, None]

    # Placement.

    def _size(self, least: float, most: float) -> float:
        return float(self.rng.uniform(least, most)) * self.height

    def _place(self, extent: float) -> float:
        """The left edge of a thing that may leave the scene by a quarter on either side."""
        return float(self.rng.uniform(-0.25 * extent, self.width - 0.75 * extent))

    def _put(self, name: str, texture: Texture, shape: Callable[[ImageDraw.ImageDraw], object]) -> None:
        drawn = Image.new("1", (self.width, self.height))
        shape(ImageDraw.Draw(drawn))
        inside = np.asarray(drawn)
        grown = inside.copy()
        grown[1:] |= inside[:-1]
        grown[:-1] |= inside[1:]
        tall = grown.copy()
        grown[:, 1:] |= tall[:, :-1]
        grown[:, :-1] |= tall[:, 1:]
        index = Scenes.names.index(name)
        # The outline is ignored, except where the thing borders on a part of itself.
        self.labels[grown & ~inside & (self.labels != index)] = self.ignore_index
        self.labels[inside] = index
        np.copyto(self.image, texture, where=inside[:, :, None])


def _around(x: float, y: float, a: float, b: float) -> Box:
    return x - a, y - b, x + a, y + b
