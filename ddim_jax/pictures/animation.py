"""Moving pictures: GIF and WebP."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, features

SIDE = 1024  # pixels of the longer side of an animation


def encode_animation(
    frames: np.ndarray, kind: str, frame_ms: int = 80, hold_ms: int = 1500
) -> bytes:
    """Frames as an animation that repeats for ever and holds its last frame.

    WebP is without loss. GIF has 256 colours a frame: grey is exact, of colours the nearest.

    Args:
      frames: uint8 (K, H, W, 3).
      kind: "gif" or "webp".
      frame_ms: milliseconds of each frame but the last.
      hold_ms: of the last.

    Returns:
      The file's content.

    Raises:
      ValueError: the frames are no such thing, or the kind is another.
      ModuleNotFoundError: this Pillow writes no WebP.

    Example:
      >>> frames = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.full(
      ...     (4, 4, 3), 9, np.uint8
      ... )
      >>> Image.open(io.BytesIO(encode_animation(frames, "gif"))).n_frames
      3
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not len(frames):
        raise ValueError(f"frames must be uint8 (K, H, W, 3), got {frames.dtype} {frames.shape}")
    if kind not in ("gif", "webp"):
        raise ValueError(f"an animation is 'gif' or 'webp', got {kind!r}")
    if kind == "webp" and not features.check("webp"):
        raise ModuleNotFoundError(
            "this Pillow writes no WebP: pip install --upgrade pillow, or ask for a GIF"
        )
    grey = kind == "gif" and (frames == frames[..., :1]).all()
    pictures = [Image.fromarray(frame[..., 0] if grey else frame) for frame in frames]
    times = [frame_ms] * (len(frames) - 1) + [hold_ms]
    options = {"optimize": False} if kind == "gif" else {"lossless": True, "method": 4}
    buffer = io.BytesIO()
    pictures[0].save(
        buffer, kind, save_all=True, append_images=pictures[1:], duration=times, loop=0, **options
    )
    return buffer.getvalue()
