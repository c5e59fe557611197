"""Pictures made to hurt: how long `open_image` takes over each, and how far the memory rises."""

import json
import os
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

from diffusers_ext.imaging import ImageError, open_image


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(
    width: int, height: int, chunks: bytes = b"", packed: bytes | None = None, depth: int = 8, colour: int = 0
) -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    pixels = b"" if packed is None else _chunk(b"IDAT", packed)
    return b"\x89PNG\r\n\x1a\n" + header + chunks + pixels + _chunk(b"IEND", b"")


def _zeros(length: int) -> bytes:
    """Deflated zeros, made piece by piece: the bomb's maker has little memory too."""
    deflate = zlib.compressobj(9)
    pieces = [deflate.compress(bytes(min(2**20, length - start))) for start in range(0, length, 2**20)]
    return b"".join([*pieces, deflate.flush()])


def _gif(frames: int) -> bytes:
    head = b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0x80, 0, 0) + bytes(3) + b"\xff" * 3
    frame = (
        b"\x21\xf9\x04\x00\x01\x00\x00\x00" + b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    )
    return head + frame * frames + b"\x3b"


def _saved(image: Image.Image, name: str, folder: Path, **options: object) -> bytes:
    path = folder / name
    image.save(path, **options)  # type: ignore[arg-type]
    return path.read_bytes()


def _exif_bomb(folder: Path) -> bytes:
    exif = b"Exif\x00\x00MM\x00\x2a\x00\x00\x00\x08" + struct.pack(">H", 5000)
    exif += b"".join(struct.pack(">HHII", 0x0112 + i, 2, 0xFFFFFFFF, 8) for i in range(5000))
    return _saved(Image.new("RGB", (16, 16), "red"), "exif.jpg", folder, exif=exif[:65000])


def pictures(folder: Path) -> Iterator[tuple[str, str, bytes, bool | None]]:
    """(name, file name, content, whether it must open; `None` if either is right)."""
    yield "100 MP PNG", "a.png", _png(10000, 10000, packed=_zeros(10000 * 1251), depth=1), False
    yield "900 MP PNG", "b.png", _png(30000, 30000, packed=_zeros(2**24), depth=1), False
    yield "PNG of 64k chunks", "c.png", _png(8, 8, _chunk(b"tEXt", b"a\0b") * 65536, _zeros(8 * 9)), False
    yield "PNG that says 16 and unpacks 64 MB", "d.png", _png(16, 16, packed=_zeros(2**26)), None
    yield "zTXt bomb", "e.png", _png(16, 16, _chunk(b"zTXt", b"a\0\0" + _zeros(2**27)), _zeros(16 * 17)), None
    yield "GIF of 10 000 frames", "f.gif", _gif(10000), None
    yield "EXIF bomb", "g.jpg", _exif_bomb(folder), None
    yield "text", "h.png", b"I am a picture, honestly.", False
    yield "SVG", "i.svg", b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", False
    yield "PostScript", "j.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", False
    yield "negative size", "k.png", _png(2**31 - 1, 2**31 - 1), False
    yield "no pixels", "l.png", _png(0, 0), False
    yield "16 bits", "m.png", _saved(Image.new("I;16", (32, 32), 40000), "m.png", folder), True
    yield "CMYK", "n.jpg", _saved(Image.new("CMYK", (32, 32)), "n.jpg", folder), True
    yield "1 x 1", "o.png", _saved(Image.new("RGB", (1, 1)), "o.png", folder), True
    yield "1 x 20 000", "p.png", _saved(Image.new("L", (1, 20000)), "p.png", folder), True
    yield "palette with transparency", "q.png", _saved(Image.new("P", (32, 32)), "q.png", folder, transparency=0), True
    yield "bilevel", "r.png", _saved(Image.new("1", (32, 32)), "r.png", folder), True


def peak_memory() -> int:
    """Largest resident set of this process so far, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM; this probe needs Linux")


def measure(path: Path) -> dict[str, object]:
    """Opens one picture in a forked process, so that its peak is its own; seconds are those of the processor."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        Path("/proc/self/clear_refs").write_text("5")
        before, started = peak_memory(), time.process_time()
        try:
            image = open_image(path)
            outcome, said = "opened", f"{image.mode} {image.size}"
        except ImageError as error:
            outcome, said = "refused", str(error)
        except BaseException as error:
            outcome, said = "raw", f"{type(error).__name__}: {error}"
        seconds = time.process_time() - started
        result = {"outcome": outcome, "said": said, "seconds": seconds, "megabytes": (peak_memory() - before) / 2**20}
        os.write(writer, json.dumps(result).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read()
    os.waitpid(pid, 0)
    return json.loads(data) if data else {"outcome": "died", "said": "", "seconds": 0.0, "megabytes": 0.0}


def probe(run: Callable[[Path], dict[str, object]] = measure) -> dict[str, dict[str, object]]:
    results = {}
    with tempfile.TemporaryDirectory(prefix="reliability-") as scratch:
        folder = Path(scratch)
        # What the first picture imports and allocates is not the fault of a hostile one.
        (folder / "warm.png").write_bytes(_saved(Image.new("RGB", (8, 8)), "warm.png", folder))
        open_image(folder / "warm.png")
        Image.init()
        for name, file, content, must_open in pictures(folder):
            (folder / file).write_bytes(content)
            wanted = {None: "either", True: "opened", False: "refused"}[must_open]
            results[name] = run(folder / file) | {"wanted": wanted, "kilobytes": len(content) / 1024}
    return results


if __name__ == "__main__":
    json.dump(probe(), sys.stdout)
