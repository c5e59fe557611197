"""Builds the sprite sheets of the emoji scenes from the vendors' drawings.

    python training/data/build_emoji_scenes.py                       # all vendors -> the user's cache
    python training/data/build_emoji_scenes.py --vendor noto --out diffusers_ext/data/sheets

The drawings come from npm packages (fetched with the `npm pack` of the machine, so its registry settings hold), are
checked against the checksums below, cached, and rendered with resvg at 96 pixels. The result is deterministic.
"""

import argparse
import hashlib
import io
import json
import os
import shutil
import subprocess  # nosec B404
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from diffusers_ext.data.sprites import CELL, SpriteSheet
from diffusers_ext.data.words import FAMILIES, FXEMOJI_SLUGS, OBJECTS


@dataclass(frozen=True)
class Vendor:
    """Where the drawings of one hand come from: npm package, version, sha256 of its archive, licence of the artwork."""

    package: str
    version: str
    sha256: str
    licence: str
    held_out: bool = False


VENDORS = {
    "noto": Vendor(
        "@iconify-json/noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Apache-2.0",
    ),
    "twemoji": Vendor(
        "@iconify-json/twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "CC-BY-4.0",
    ),
    "fluent": Vendor(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT",
    ),
    "fxemoji": Vendor(
        "@iconify-json/fxemoji",
        "1.2.2",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        "Apache-2.0",
        held_out=True,
    ),
}


class DataError(RuntimeError):
    """A package could not be had or is not what it should be."""


def default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "diffusers-ext" / "emoji-scenes"


def fetch(vendor: Vendor, cache: Path) -> Path:
    """Path of the verified archive of `vendor` in `cache`, downloading it once."""
    name = f"{vendor.package.lstrip('@').replace('/', '-')}-{vendor.version}.tgz"
    archive = cache / name
    if not archive.exists():
        npm = shutil.which("npm")
        if npm is None:
            raise DataError(f"npm is not installed, so {vendor.package} cannot be fetched; install Node.js with npm")
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as staging:
            command = [npm, "pack", "--silent", f"{vendor.package}@{vendor.version}"]
            # no shell, and no word of it is from outside
            run = subprocess.run(command, cwd=staging, capture_output=True, text=True)  # noqa: S603  # nosec B603
            if run.returncode or not (Path(staging) / name).exists():
                reason = (run.stderr.strip() or "no reason given").splitlines()[-1]
                raise DataError(f"npm could not fetch {vendor.package}@{vendor.version}: {reason}")
            os.replace(Path(staging) / name, archive)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != vendor.sha256:
        archive.unlink()
        raise DataError(
            f"{name} has sha256 {digest}, expected {vendor.sha256}; the damaged copy was removed, run the command again"
        )
    return archive


def read_drawings(archive: Path) -> dict:
    with tarfile.open(archive) as tar:
        member = tar.extractfile("package/icons.json")
        if member is None:
            raise DataError(f"{archive.name} holds no icons.json; remove it and run the command again")
        return json.load(member)


def render(icons: dict, slug: str) -> np.ndarray | None:
    """RGBA uint8 (96, 96, 4) of one drawing, or None where the vendor has none of that name."""
    import resvg_py

    alias = icons.get("aliases", {}).get(slug, {})
    icon = icons["icons"].get(alias.get("parent", slug))
    if icon is None:
        return None
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    left, top = icon.get("left", 0), icon.get("top", 0)
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left} {top} {width} {height}" '
        f'width="{CELL}" height="{CELL}">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=CELL, height=CELL)
    with Image.open(io.BytesIO(bytes(png))) as picture:
        pixels = np.asarray(picture.convert("RGBA"))
    return pixels[:, ::-1] if alias.get("hFlip") else pixels


def build(name: str, cache: Path) -> SpriteSheet:
    """The sheet of vendor `name`: every object and family member that the vendor drew, in the vocabulary's order."""
    vendor = VENDORS[name]
    icons = read_drawings(fetch(vendor, cache))
    families = [slug for groups in FAMILIES.values() for group in groups for slug, _ in group]
    wanted = {slug: FXEMOJI_SLUGS.get(slug, "") if vendor.held_out else slug for slug in [*OBJECTS, *families]}
    drawn = {slug: render(icons, there) for slug, there in wanted.items()}
    return SpriteSheet(name, {slug: pixels for slug, pixels in drawn.items() if pixels is not None}, vendor.licence)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vendor", action="append", choices=VENDORS, help="repeat for several (default: all)")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="where downloaded packages are kept")
    parser.add_argument("--out", type=Path, default=None, help="where sheets are written (default: <cache>/sheets)")
    options = parser.parse_args(arguments)
    try:
        for name in options.vendor or VENDORS:
            sheet = build(name, options.cache)
            print(f"{sheet.save(options.out or options.cache / 'sheets')}: {len(sheet.sprites)} drawings")
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
