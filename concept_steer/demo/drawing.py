"""How the builder draws: fit, paste, and the marks that no caption names (watermark, QR-like code, lettering)."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 128
WATERMARKS = ("STOCK", "SAMPLE", "DEMO", "PREVIEW")
WORDS = ("HELLO", "SALE", "NEWS", "OPEN", "STOP", "2024")


def fit(picture: np.ndarray, size: int) -> np.ndarray:
    """Crop to what is not transparent and scale the longer side to `size`; (h, w, 4) uint8."""
    ys, xs = np.nonzero(picture[..., 3] > 8)
    cropped = Image.fromarray(picture[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1])
    scale = size / max(cropped.size)
    shape = (max(1, round(cropped.width * scale)), max(1, round(cropped.height * scale)))
    return np.asarray(cropped.resize(shape, Image.Resampling.LANCZOS))


def nurse_cap(picture: np.ndarray) -> np.ndarray:
    """Draw a white cap with a red cross on top of a fitted doctor: the sets share one picture for both."""
    image = Image.fromarray(picture).copy()
    draw = ImageDraw.Draw(image)
    middle, width, height = image.width // 2, round(0.42 * image.width), round(0.17 * image.height)
    draw.polygon(
        [
            (middle - width // 2 - 4, 2), (middle + width // 2 + 4, 2),
            (middle + width // 2 - 2, height + 4), (middle - width // 2 + 2, height + 4),
        ],
        fill=(255, 255, 255, 255), outline=(150, 150, 160, 255), width=2,
    )  # fmt: skip
    arm = max(2, height // 6)
    center = height // 2 + 3
    draw.rectangle([middle - arm, center - 3 * arm, middle + arm, center + 3 * arm], fill=(225, 30, 45, 255))
    draw.rectangle([middle - 3 * arm, center - arm, middle + 3 * arm, center + arm], fill=(225, 30, 45, 255))
    return np.asarray(image)


def paste(canvas: np.ndarray, picture: np.ndarray, center_x: int, center_y: int) -> None:
    """Alpha-composite `picture` onto `canvas` (H, W, 3) in place, clipped at the edges."""
    height, width = picture.shape[:2]
    top, left = center_y - height // 2, center_x - width // 2
    y0, x0, y1, x1 = max(top, 0), max(left, 0), min(top + height, SIZE), min(left + width, SIZE)
    part = picture[y0 - top : y1 - top, x0 - left : x1 - left].astype(np.float32)
    alpha = part[..., 3:] / 255
    canvas[y0:y1, x0:x1] = (canvas[y0:y1, x0:x1] * (1 - alpha) + part[..., :3] * alpha + 0.5).astype(np.uint8)


def watermark(canvas: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """A translucent dark bar with a white word, at one of three heights; returns picture and word index."""
    word = int(rng.integers(len(WATERMARKS)))
    layer = Image.new("RGBA", (SIZE, SIZE))
    draw = ImageDraw.Draw(layer)
    y = int(rng.choice([8, 53, 98])) + int(rng.integers(-4, 5))
    x = 64 + int(rng.integers(-6, 7))
    draw.rectangle([x - 54, y, x + 54, y + 22], fill=(40, 40, 48, 165))
    font = ImageFont.load_default(20)
    draw.text((x, y + 11), WATERMARKS[word], font=font, fill=(255, 255, 255, 245), anchor="mm")
    return np.asarray(Image.alpha_composite(Image.fromarray(canvas).convert("RGBA"), layer).convert("RGB")), word


def qr_code(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A QR-like code (15 by 15 modules of 3 px with finder squares) in one of the lower corners or upper corners."""
    n, px = 15, 3
    modules = rng.random((n, n)) < 0.5
    for y, x in ((0, 0), (0, n - 5), (n - 5, 0)):
        modules[y : y + 5, x : x + 5] = True
        modules[y + 1 : y + 4, x + 1 : x + 4] = False
        modules[y + 2, x + 2] = True
    code = np.kron(np.where(modules, 0, 255).astype(np.uint8), np.ones((px, px), np.uint8))
    code = np.pad(code, 3, constant_values=255)
    side = code.shape[0]
    top, left = (int(rng.choice([2, SIZE - side - 2])) for _ in range(2))
    canvas = canvas.copy()
    canvas[top : top + side, left : left + side] = code[..., None]
    return canvas


def lettering(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A printed word on a yellow label at the top or the bottom."""
    image = Image.fromarray(canvas)
    draw = ImageDraw.Draw(image)
    y = int(rng.choice([4, SIZE - 28]))
    draw.rectangle([24, y, 104, y + 24], fill=(255, 240, 120), outline=(0, 0, 0), width=2)
    draw.text((64, y + 12), str(rng.choice(WORDS)), font=ImageFont.load_default(20), fill=(0, 0, 0), anchor="mm")
    return np.asarray(image)
