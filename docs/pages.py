"""Hook of the site: which files of the repository are pages or lie beside them, each under its own path."""

from pathlib import Path

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
    for pattern in PAGES:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files
