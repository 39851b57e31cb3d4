"""How Sphinx builds this site: ``sphinx-build -W --keep-going docs docs/_build``."""

from importlib.metadata import version as version_of

project = "torch-gradflow"
author = "torch-gradflow developers"
copyright = "torch-gradflow developers, MIT licence"
version = release = version_of("torch-gradflow")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "gallery"]  # what is read of the gallery is what it writes to auto_gallery
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# Docstrings are in Google's style. Their attributes are fields of a list, not objects of their own.
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
add_module_names = False

sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "auto_gallery",
    "filename_pattern": r"\.py$",  # run all of them
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": True,
    "show_memory": False,
    "write_computation_times": False,
    "download_all_examples": False,
    "show_signature": False,
    "image_srcset": ["2x"],
    "thumbnail_size": (520, 240),
}
suppress_warnings = ["config.cache"]

html_theme = "furo"
html_title = "torch-gradflow"
html_show_sourcelink = False
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
