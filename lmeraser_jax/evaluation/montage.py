"""A picture of the largest clusters and their prompts."""

from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from lmeraser_jax.storage.rows import Manifest
from lmeraser_jax.training.slices import place_prompt
from lmeraser_jax.unlearning.artifacts import load_slice
from lmeraser_jax.unlearning.run import Run

CLUSTERS, MEMBERS = 8, 10  # rows, and images in each row, at most
SIDE, LABEL, HEADER, GAP = 64, 128, 24, 4  # pixels: of a tile, the column of names, the row of headings, between tiles


def save_montage(run: Run, path: Path) -> None:
    """Draws the largest published clusters as PNG, a row each: some members, the prompt, a member with the prompt."""
    manifest = run.catalog.manifest()
    assert manifest is not None
    records, images = run.catalog.live("train"), run.images
    largest = [key for key, _ in Counter(records.clusters).most_common(CLUSTERS)]
    pitch = SIDE + GAP
    canvas = Image.new("RGB", (LABEL + (MEMBERS + 2) * pitch + GAP, len(largest) * pitch + HEADER), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((GAP, 6), "cluster", fill="black")
    for column, heading in ((0, "members"), (MEMBERS, "prompt"), (MEMBERS + 1, "on image")):
        draw.text((LABEL + column * pitch, 6), heading, fill="black")
    for place, key in enumerate(largest):
        top = HEADER + place * pitch
        inside = [i for i, cluster in enumerate(records.clusters) if cluster == key]
        draw.text((GAP, top + 16), f"{key[:12]}\n{len(inside)} members", fill="black")
        shown = np.linspace(0, len(inside) - 1, min(MEMBERS, len(inside))).astype(int)  # evenly spread by id
        tiles = [images[records.rows[inside[i]]] / 255.0 for i in shown]
        prompt = _prompt(run, manifest, key)
        prompted = _resized(tiles[0], prompt.shape[0]) + prompt * run.image_spec.std
        visible = prompt / (2 * max(np.abs(prompt).max(), 1e-6)) + 0.5
        for column, tile in [*enumerate(tiles), (MEMBERS, visible), (MEMBERS + 1, prompted)]:
            canvas.paste(_tile(tile), (LABEL + column * pitch, top))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


def _prompt(run: Run, manifest: Manifest, key: str) -> np.ndarray:
    """A cluster's prompt as an image [S, S, C], in normalised pixels; zeros where prompts are not tuned."""
    architecture, width = run.backbone.config, run.config.tuning.active_prompt_width
    border = load_slice(run, manifest.entries[key]).prompt  # empty for the width 0
    return np.asarray(place_prompt(border, architecture.image_size, width, architecture.channels))


def _resized(image: np.ndarray, side: int) -> np.ndarray:
    """Nearest-neighbour copy [side, side, c] of an image [h, w, c]."""
    rows, columns = (np.arange(side) * length // side for length in image.shape[:2])
    return image[rows][:, columns]


def _tile(image: np.ndarray) -> Image.Image:
    """An image [h, w, 1 or 3] with values in [0, 1] as a square of `SIDE` pixels."""
    pixels = np.round(np.clip(_resized(image, SIDE), 0, 1) * 255).astype(np.uint8)
    return Image.fromarray(np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels)
