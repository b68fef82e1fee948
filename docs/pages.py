"""Hook of the site: which files of the repository are pages or lie beside them, each under its own path.

The examples are executed: their pages are the notebooks of docs/notebooks.py, which are made two at a time.
"""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import notebooks
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "LICENSE",
    "docs/*.md",
    "docs/*/*.md",
    "docs/pictures/*",
    "examples/0*.py",
    "fq_transforms/bench/results/*.md",
    "fq_transforms/bench/results/*.png",
    "fq_transforms/bench/results/*.json",
]


@event_priority(100)  # before mkdocs-jupyter, which takes the examples
def on_files(files, config):
    """Add the pages to what docs_dir has, which are styles only."""
    names = sorted(path.stem for path in notebooks.EXAMPLES.glob("0*.py"))
    with ThreadPoolExecutor(2) as two:
        list(two.map(executed, names))
    for pattern in PAGES:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


@event_priority(100)  # likewise
def on_pre_page(page, config, files):
    """Give the page of an example its notebook to render."""
    if page.file.src_uri.startswith("examples/"):
        page.file.abs_src_path = str(notebooks.path_of(Path(page.file.src_uri).stem))
    return page


def executed(name):
    """Make the notebook of an example, in a process of its own; what it raises ends the build."""
    if not notebooks.is_current(name):
        done = subprocess.run([sys.executable, notebooks.__file__, name], capture_output=True, text=True, check=False)
        if done.returncode:
            raise PluginError(f"examples/{name}.py: {done.stderr.strip()[-4000:]}")
