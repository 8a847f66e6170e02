"""What the site shows from outside docs/. mkdocs.yml calls this file.

README.md is the front page, scripts are pages to read, pictures and tables are copied. The pages keep the links that work in
the repository: each is rewritten to the place that its target has on the site.
"""

import os
import re
from pathlib import Path

from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#\s]+)")
LANGUAGES = {".py": "python", ".sh": "bash", ".c": "c"}
SOURCES = {}  # place -> file


def place(path):
    """Where a file of the repository stands on the site."""
    name = path.relative_to(ROOT).as_posix().removeprefix("docs/")
    return {"index.md": "pages.md", "benchmark/README.md": "commands.md"}.get(name, name + ".md" * (path.suffix in LANGUAGES))


def targets(path):
    """The files that a page links to."""
    found = [(path.parent / link).resolve() for link in LINK.findall(path.read_text(encoding="utf-8"))]
    return [target for target in found if target.is_file()]


def on_files(files, config):
    SOURCES.clear()
    waiting = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    while waiting:
        path = waiting.pop()
        if place(path) in SOURCES:
            continue
        SOURCES[place(path)] = path
        if path.suffix == ".md":
            waiting += targets(path)
        content = {"abs_src_path": str(path)}
        if path.suffix in LANGUAGES:
            front = f"---\nsearch: {{exclude: true}}\nhide: [toc]\n---\n# {path.name}\n\n"
            content = {"content": f"{front}````{LANGUAGES[path.suffix]}\n{path.read_text(encoding='utf-8')}````\n"}
        if place(path) not in files.src_uris:
            inclusion = InclusionLevel.INCLUDED if path.suffix == ".md" else InclusionLevel.NOT_IN_NAV
            files.append(File.generated(config, place(path), inclusion=inclusion, **content))
    if "index.md" in files.src_uris:
        files.remove(files.src_uris["index.md"])
    return files


def on_page_markdown(markdown, page, config, files):
    path = SOURCES[page.file.src_uri]

    def rewritten(link):
        target = (path.parent / link[1]).resolve()
        return os.path.relpath(place(target), os.path.dirname(page.file.src_uri)) if target.is_file() else link[1]

    return LINK.sub(rewritten, markdown) if path.suffix == ".md" else markdown
