"""Settings of the documentation's HTML: the pages of this folder, the reference from docstrings, and a gallery that the build runs."""

import os
import sys
from pathlib import Path


HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from site_text import PictureScraper, copy_cards, reference_text, site_links  # noqa: E402

import diffusers_ext  # noqa: E402


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DIFFUSERS_EXT_MODEL", str(HERE.parent / "pipelines" / "emoji-scenes-64"))

project = "diffusers-ext"
author = "The diffusers-ext authors"
release = version = diffusers_ext.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_gallery.gen_gallery"]
exclude_patterns = ["_build", "gallery/*", "README.md"]
root_doc = "index"
default_role = "code"  # docstrings write `name`, as Markdown does
suppress_warnings = ["config.cache"]  # the scraper is an object

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
autodoc_typehints = "none"  # signatures have them
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "pydata_sphinx_theme"
html_title = "diffusers-ext"
html_theme_options = {"navigation_with_keys": False, "show_toc_level": 2}
html_show_sourcelink = False

sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "auto_gallery",
    "filename_pattern": r"/plot_",
    "within_subsection_order": "FileNameSortKey",
    "image_scrapers": (PictureScraper(),),
    "capture_repr": (),
    "matplotlib_animations": False,
    "reset_modules": (),
    "download_all_examples": False,
    "show_memory": False,
    "abort_on_example_error": True,
    "remove_config_comments": True,
}


def setup(app):
    app.connect("autodoc-process-docstring", reference_text, priority=100)  # before napoleon
    app.connect("source-read", site_links)
    app.connect("builder-inited", copy_cards, priority=100)
