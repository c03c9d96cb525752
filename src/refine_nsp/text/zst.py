"""Read files compressed by zstd to the end of their last frame. This module is imported only where the package zstandard is there."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import zstandard


class WholeFrames(io.BufferedReader):
    """Read the bytes of all frames of a .zst file. Raises EOFError where the last frame is cut off, which zstandard alone lets pass."""

    def __init__(self, file: Path) -> None:
        super().__init__(_Raw(file), 2**17)


class _Raw(io.RawIOBase):
    def __init__(self, file: Path) -> None:
        self.file = file.open("rb")
        self.frame: zstandard.ZstdDecompressionObj | None = None  # None between two frames
        self.waiting = b""  # bytes that were read of the file and belong to the next frame
        self.text = memoryview(b"")
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.text:
            block = self.waiting or self.file.read(2**17)
            if not block:
                if self.frame is not None:
                    raise EOFError("the compressed text ends within a frame")
                return 0
            self.frame = self.frame or self.decompressor.decompressobj()
            self.text = memoryview(self.frame.decompress(block))
            self.waiting = self.frame.unused_data if self.frame.eof else b""
            if self.frame.eof:
                self.frame = None
        room = memoryview(buffer)
        count = min(len(room), len(self.text))
        room[:count], self.text = self.text[:count], self.text[count:]
        return count

    def close(self) -> None:
        self.file.close()
        super().close()
