"""Draws coverage.svg: which branch covers which token.

Rows are reading tokens, columns the tokens read. Text and colours follow the reader's light or dark scheme; the two
branches differ in shape as well as in colour. Run `python docs/figures/coverage.py` after a change.
"""

from __future__ import annotations

from pathlib import Path

T = 12
WINDOW = 3
CELL = 30
LEFT, TOP = 120, 84
WIDTH, HEIGHT = 784, TOP + T * CELL + 62

STYLE = """
  .card { fill: #ffffff; stroke: #d0d7de; }
  .ink { fill: #1f2328; } .soft { fill: #59636e; }
  .rule { stroke: #d0d7de; fill: none; } .mark { stroke: #1f2328; fill: none; stroke-width: 1.5; }
  .softmax { fill: #0969da; } .linear { fill: #bc4c00; } .future { fill: #c8d1da; }
  text { font: 14px ui-sans-serif, system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
  .small { font-size: 12px; } .title { font-size: 16px; font-weight: 600; }
  @media (prefers-color-scheme: dark) {
    .card { fill: #0d1117; stroke: #3d444d; }
    .ink { fill: #f0f6fc; } .soft { fill: #9198a1; }
    .rule { stroke: #3d444d; } .mark { stroke: #f0f6fc; }
    .softmax { fill: #58a6ff; } .linear { fill: #f0883e; } .future { fill: #3d444d; }
  }
"""


def text(x: float, y: float, words: str, kind: str = "ink", anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{words}</text>'


def cell(t: int, i: int) -> str:
    """A square for the softmax branch, a disc for the linear one, a dot for the future (SWA-1, RLA-1)."""
    x, y = LEFT + i * CELL, TOP + t * CELL
    middle = f'cx="{x + CELL / 2:g}" cy="{y + CELL / 2:g}"'
    if i > t:
        return f'<circle {middle} r="2" class="future"/>'
    if i >= t - WINDOW:
        return f'<rect x="{x + 3}" y="{y + 3}" width="{CELL - 6}" height="{CELL - 6}" rx="4" class="softmax"/>'
    return f'<circle {middle} r="9" class="linear"/>'


def draw() -> str:
    last = T - 1
    x0, x1 = LEFT + (last - WINDOW) * CELL, LEFT + T * CELL
    y = TOP + last * CELL
    side = LEFT + T * CELL + 28
    label = f"Token {last} reads tokens {last - WINDOW} to {last} by softmax and tokens 0 to {last - WINDOW - 1}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="t d">',
        f'<title id="t">Which branch covers which token, window w = {WINDOW}</title>',
        f'<desc id="d">{label} by the linear branch. Each past token is read once.</desc>',
        f"<style>{STYLE}</style>",
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8" class="card"/>',
        text(24, 32, f"Each past token is read exactly once (w = {WINDOW})", "ink title"),
        text(LEFT + T * CELL / 2, TOP - 26, "token being read, i", "soft", "middle"),
        text(24, TOP + T * CELL / 2, "reading", "soft"),
        text(24, TOP + T * CELL / 2 + 18, "token t", "soft"),
    ]
    for n in range(T):
        parts.append(text(LEFT + n * CELL + CELL / 2, TOP - 8, str(n), "soft small", "middle"))
        parts.append(text(LEFT - 10, TOP + n * CELL + CELL / 2 + 4, str(n), "soft small", "end"))
    parts += [cell(t, i) for t in range(T) for i in range(T)]
    parts += [
        f'<rect x="{LEFT - 2}" y="{y - 1}" width="{T * CELL + 4}" height="{CELL + 2}" rx="6" class="mark"/>',
        f'<path d="M{LEFT + 4} {y + CELL + 8}v6H{x0 - 4}v-6" class="mark"/>',
        f'<path d="M{x0 + 4} {y + CELL + 8}v6H{x1 - 4}v-6" class="mark"/>',
        text((LEFT + x0) / 2, y + CELL + 34, "one F × Dv state per kv head", "ink small", "middle"),
        text((x0 + x1) / 2, y + CELL + 34, "w + 1 = 4 tokens", "ink small", "middle"),
        f'<rect x="{side}" y="{TOP + 4}" width="{CELL - 6}" height="{CELL - 6}" rx="4" class="softmax"/>',
        text(side + 36, TOP + 21, "softmax, exact", "ink"),
        text(side + 36, TOP + 41, "t − w ≤ i ≤ t", "soft small"),
        f'<circle cx="{side + 12}" cy="{TOP + 86}" r="9" class="linear"/>',
        text(side + 36, TOP + 91, "linear, from the state", "ink"),
        text(side + 36, TOP + 111, "i ≤ t − w − 1", "soft small"),
        f'<circle cx="{side + 12}" cy="{TOP + 156}" r="2" class="future"/>',
        text(side + 36, TOP + 161, "the future: unread", "soft"),
        f'<path d="M{side} {TOP + 190}H{WIDTH - 24}" class="rule"/>',
        text(side, TOP + 220, "Both reads are RMS-normalised,", "ink"),
        text(side, TOP + 240, "weighted per channel and added.", "ink"),
        text(side, TOP + 272, "A token that leaves the window", "ink"),
        text(side, TOP + 292, "is folded into the state:", "ink"),
        text(side, TOP + 312, "S ← S + φ(k)ᵀ v", "ink"),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw(), encoding="utf-8")
