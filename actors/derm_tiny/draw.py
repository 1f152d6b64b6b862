"""Draws derm-tiny's images: every image is a pure function of (seed, index)."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from actors.derm_tiny.sentences import QUESTIONS, any_answer
from actors.derm_tiny.world import CLASSES, POSITIONS, SIZES, TONES, Lesion, answer

SIDE = 64
ANNOTATIONS = ("annotations.csv", "sentences.csv")
_SKIN = np.array([[236, 204, 180], [198, 150, 116], [120, 82, 60]], dtype=np.float32)
_CENTRES = np.array([[20, 20], [44, 20], [32, 32], [20, 44], [44, 44]], dtype=np.float32)
_RADII = np.array([6.5, 10.0, 14.5], dtype=np.float32)
_Y, _X = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)


def sample_lesion(rng: np.random.Generator, label: int | None = None) -> Lesion:
    """Draw a lesion's class (unless given) and its attributes, all independent and uniform."""
    return Lesion(
        label=int(rng.integers(len(CLASSES))) if label is None else label,
        tone=int(rng.integers(len(TONES))),
        position=int(rng.integers(len(POSITIONS))),
        size=int(rng.integers(len(SIZES))),
        hairs=bool(rng.integers(2)),
    )


def draw(lesion: Lesion, rng: np.random.Generator) -> np.ndarray:
    """Draw one lesion as a uint8 array [SIDE, SIDE, 3]."""
    skin = _SKIN[lesion.tone] + rng.normal(0, 4, 3)
    canvas = np.broadcast_to(skin, (SIDE, SIDE, 3)).astype(np.float32).copy()
    canvas += _smooth_noise(rng, 8)[..., None] * 6
    shape = _Blob(lesion, rng)
    _LOOKS[lesion.label](canvas, shape, rng)
    if lesion.hairs:
        _hairs(canvas, rng)
    canvas += rng.normal(0, 3, canvas.shape)
    return canvas.clip(0, 255).astype(np.uint8)


class _Blob:
    """A lesion's outline in polar coordinates around a jittered centre."""

    def __init__(self, lesion: Lesion, rng: np.random.Generator):
        cx, cy = _CENTRES[lesion.position] + rng.uniform(-2.5, 2.5, 2)
        self.cx, self.cy = float(cx), float(cy)
        self.radius = float(_RADII[lesion.size] * rng.uniform(0.92, 1.08))
        self.r = np.hypot(_X - self.cx, _Y - self.cy)
        self.theta = np.arctan2(_Y - self.cy, _X - self.cx)

    def alpha(self, rng: np.random.Generator, wobble: float, softness: float) -> np.ndarray:
        """Return the outline's opacity [SIDE, SIDE] in 0..1, with an uneven rim and a soft edge (pixels)."""
        rim = np.ones_like(self.r)
        for k in range(2, 6):
            rim += wobble / k * rng.normal() * np.cos(k * self.theta + rng.uniform(0, 2 * np.pi))
        return _sigmoid((self.radius * rim - self.r) / softness)

    def points(self, rng: np.random.Generator, count: int, reach: float = 0.85) -> np.ndarray:
        """Return `count` points [count, 2] spread evenly over the disc of `reach` radii."""
        angle = rng.uniform(0, 2 * np.pi, count)
        distance = self.radius * reach * np.sqrt(rng.uniform(0, 1, count))
        return np.stack([self.cx + distance * np.cos(angle), self.cy + distance * np.sin(angle)], axis=1)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x.clip(-30, 30)))


def _paint(canvas: np.ndarray, alpha: np.ndarray, colour) -> None:
    canvas += alpha[..., None] * (np.asarray(colour, dtype=np.float32) - canvas)


def _dots(canvas, points, radius: float, colour, strength: float = 0.9) -> None:
    for x, y in points:
        _paint(canvas, strength * _sigmoid((radius - np.hypot(_X - x, _Y - y)) * 3), colour)


def _line(canvas, x0, y0, x1, y1, width: float, colour, strength: float = 0.8) -> None:
    dx, dy = x1 - x0, y1 - y0
    t = (((_X - x0) * dx + (_Y - y0) * dy) / max(dx * dx + dy * dy, 1e-6)).clip(0, 1)
    distance = np.hypot(_X - x0 - t * dx, _Y - y0 - t * dy)
    _paint(canvas, strength * (distance < width), colour)


def _smooth_noise(rng: np.random.Generator, cells: int) -> np.ndarray:
    coarse = Image.fromarray(rng.normal(0, 1, (cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def _hairs(canvas, rng) -> None:
    for _ in range(4):
        x, y = rng.uniform(0, SIDE, 2)
        angle = rng.uniform(0, np.pi)
        dx, dy = 26 * np.cos(angle), 26 * np.sin(angle)
        _line(canvas, x - dx, y - dy, x + dx, y + dy, 0.8, (38, 26, 20), 0.85)


def _rosacea(canvas, blob, rng) -> None:
    _paint(canvas, 0.55 * blob.alpha(rng, 0.15, 2.2), (214, 84, 84))
    _dots(canvas, blob.points(rng, int(blob.radius)), 1.1, (168, 22, 30))


def _actinic(canvas, blob, rng) -> None:
    _paint(canvas, 0.6 * blob.alpha(rng, 0.25, 1.0), (206, 140, 128))
    _dots(canvas, blob.points(rng, int(1.1 * blob.radius), 0.7), 1.3, (240, 214, 110))


def _basal(canvas, blob, rng) -> None:
    _paint(canvas, 0.75 * blob.alpha(rng, 0.05, 0.8), (238, 206, 208))
    rim = np.exp(-(((blob.r - 0.85 * blob.radius) / 1.3) ** 2))
    _paint(canvas, 0.8 * rim, (255, 240, 240))
    _dots(canvas, [(blob.cx, blob.cy)], 0.35 * blob.radius, (92, 32, 36))


def _dermatitis(canvas, blob, rng) -> None:
    _paint(canvas, 0.6 * blob.alpha(rng, 0.3, 3.4), (222, 98, 78))
    angle = rng.uniform(0, np.pi)
    dx, dy = np.cos(angle) * blob.radius, np.sin(angle) * blob.radius
    for offset in (-0.45, 0.0, 0.45):
        x, y = blob.cx - offset * dy, blob.cy + offset * dx
        _line(canvas, x - 0.8 * dx, y - 0.8 * dy, x + 0.8 * dx, y + 0.8 * dy, 0.7, (140, 24, 20))


def _melanoma(canvas, blob, rng) -> None:
    _paint(canvas, 0.95 * blob.alpha(rng, 0.5, 0.6), (44, 30, 30))
    _dots(canvas, blob.points(rng, 3, 0.6), 0.28 * blob.radius, (112, 62, 34))
    _dots(canvas, blob.points(rng, 2, 0.6), 0.22 * blob.radius, (70, 84, 120))


def _psoriasis(canvas, blob, rng) -> None:
    _paint(canvas, 0.85 * blob.alpha(rng, 0.12, 0.5), (190, 52, 56))
    _dots(canvas, blob.points(rng, int(0.9 * blob.radius), 0.75), 1.9, (232, 230, 232), 0.8)


def _lichen(canvas, blob, rng) -> None:
    for x, y in blob.points(rng, max(5, int(0.8 * blob.radius)), 0.9):
        square = np.maximum(np.abs(_X - x), np.abs(_Y - y)) < 0.24 * blob.radius
        _paint(canvas, 0.85 * square, (128, 62, 142))
        _dots(canvas, [(x, y)], 0.5, (226, 210, 232), 0.7)


def _seborrheic(canvas, blob, rng) -> None:
    _paint(canvas, 0.9 * blob.alpha(rng, 0.08, 0.5), (132, 88, 50))
    _dots(canvas, blob.points(rng, int(1.2 * blob.radius), 0.8), 0.8, (48, 26, 14))


_LOOKS = (_rosacea, _actinic, _basal, _dermatitis, _melanoma, _psoriasis, _lichen, _seborrheic)


def write_tree(root: Path, per_class: int, seed: int) -> int:
    """Write a DermNet-like tree: a folder per class, PNG files, and two tables (path, question_id, answer).

    annotations.csv describes the lesion, as derm-tiny is asked; sentences.csv answers derm-smol's questions. Every
    eighth lesion is photographed twice (files -a and -b of one number), as real collections do.
    Returns the number of images written; the same arguments always give the same pixels and answers.
    """
    descriptions, sentence_rows = [], []
    for label, kind in enumerate(CLASSES):
        folder = root / kind.folder
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            rng = np.random.default_rng([seed, label, number])
            lesion = sample_lesion(rng, label)
            for shot in "ab" if number % 8 == 0 else "a":
                path = folder / f"{kind.folder.lower().replace(' ', '-')}-{number:03d}-{shot}.png"
                Image.fromarray(draw(lesion, rng)).save(path)
                name, wording = path.relative_to(root).as_posix(), np.random.default_rng([seed, label, number, 1])
                descriptions.append((name, "describe", answer(lesion, "describe")))
                sentence_rows += [(name, q, any_answer(lesion, q, wording)) for q in QUESTIONS]
    for file, rows in zip(ANNOTATIONS, (descriptions, sentence_rows), strict=True):
        with open(root / file, "w", newline="") as stream:
            csv.writer(stream).writerows([("path", "question_id", "answer"), *rows])
    return len(descriptions)
