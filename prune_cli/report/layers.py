"""What was removed from each layer of a network, as HTML: bars, and the skeletons of its filters."""

import base64
import io
from collections.abc import Callable, Sequence
from html import escape

import numpy as np

from prune_cli.pictures import skeleton_picture, unpacked
from prune_cli.record import LayerChange

STYLE = """
.bars { display: flex; gap: 3px } .bars div { flex: 1 1 0; min-width: 6px; max-width: 46px }
.bars p { display: flex; align-items: flex-end; height: 80px; margin: 0; background: #eceef4 }
.bars i { flex: 1; background: var(--accent) } .bars i.parameters, .key.parameters { background: var(--gone) }
.bars span { display: block; writing-mode: vertical-rl; margin: 5px auto 0; font-size: 9px; line-height: 1;
             color: var(--quiet); white-space: nowrap }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin: 0 4px 0 12px;
       background: var(--accent) }
.skeletons { display: flex; flex-wrap: wrap; gap: 10px; align-items: flex-end } figure { margin: 0; text-align: center }
figcaption { font-size: 10px; line-height: 1.4; color: var(--quiet) }
.skeletons img { image-rendering: pixelated; display: block; margin: 0 auto 2px }
"""
PIXELS = 4  # of a position of the kernel in a picture
TILES = {"stripe": ("filter", "stripe"), "group": ("input channel", "group")}  # what a skeleton's tile is, by unit


def layers(changes: Sequence[LayerChange], unit: str | None, of: str) -> str:
    """Bars for all layers and, of units that have a place in the kernel, which of them are kept; `of`
    tells the reader which run it is."""
    return _bars(changes, of) + _positions(changes) + _skeletons(changes, unit, of)


def _bars(changes: Sequence[LayerChange], of: str) -> str:
    """One pair of bars for each layer: how much of its parameters and MACs is gone."""
    drawn = []
    for layer in changes:
        if not layer.parameters[0]:
            continue
        gone = {"parameters": _gone(*layer.parameters), "MACs": _gone(*layer.macs)}
        told = ", ".join(f"{fraction:.0%} of the {what} removed" for what, fraction in gone.items())
        bars = "".join(f'<i class="{what}" style="height:{100 * max(0.0, f):.0f}%"></i>' for what, f in gone.items())
        drawn.append(f'<div title="{escape(f"{layer.name}: {told}")}"><p>{bars}</p><span>{_short(layer)}</span></div>')
    keys = "".join(f'<span class="key {what}"></span>{what}' for what in ("parameters", "MACs"))
    return f'<h3>Removed from each layer{of}{keys}</h3><div class="bars">{"".join(drawn)}</div>' if drawn else ""


def _gone(before: int, after: int) -> float:
    return 1 - after / before if before else 0.0


def _positions(changes: Sequence[LayerChange]) -> str:
    """The fraction of a layer that is kept at each position of the kernel: black none, white all."""
    def draw(layer: LayerChange) -> str:
        picture = 255 * np.array(layer.units["positions"])
        return _image(np.rint(picture).astype(np.uint8), 48)

    heading = "What is kept at each position of the kernel, black = nowhere, white = everywhere"
    return _pictures(heading, [layer for layer in changes if "positions" in (layer.units or {})], draw)


def _skeletons(changes: Sequence[LayerChange], unit: str | None, of: str) -> str:
    """Which units are kept, filter by filter; nothing for records that do not say."""
    def draw(layer: LayerChange) -> str:
        picture = skeleton_picture(unpacked(layer.units), PIXELS)
        return _image(picture, picture.shape[1])

    tile, what = TILES.get(unit, ("filter", "unit"))
    heading = f"Skeletons{of}: one tile for each {tile}, white where its {what} is kept"
    return _pictures(heading, [layer for layer in changes if "skeleton" in (layer.units or {})], draw)


def _pictures(heading: str, changes: Sequence[LayerChange], draw: Callable[[LayerChange], str]) -> str:
    if not changes:
        return ""
    figures = (
        f'<figure title="{escape(layer.name)}">{draw(layer)}<figcaption>{_short(layer)}<br>'
        f"{layer.units['kept'] / layer.units['total']:.0%} kept</figcaption></figure>"
        for layer in changes
    )
    return f'<h3>{heading}</h3><div class="skeletons">{"".join(figures)}</div>'


def _image(picture: np.ndarray, width: int) -> str:
    """A picture (height, width) or (height, width, 3) inside the page, `width` pixels wide."""
    from PIL import Image

    file, image = io.BytesIO(), Image.fromarray(picture)
    (image.quantize(4) if picture.ndim == 3 else image).save(file, "PNG", optimize=True)  # black, white, border
    data = base64.b64encode(file.getvalue()).decode("ascii")
    return f'<img alt="" width="{width}" src="data:image/png;base64,{data}">'


def _short(layer: LayerChange) -> str:
    return escape(layer.name.replace("layer", "").replace("features.", ""))
