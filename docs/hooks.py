"""For mkdocs: makes pages of the repository's own documents, and reads docstrings in transformers' style."""

import posixpath
import re
import shutil
from pathlib import Path

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
BROWSER_PAGE = ROOT / "build" / "browser"  # made by `make browser`; the site has it in browser/ if it is there
DOCUMENTS = {
    "README.md": "index.md",
    "training/README.md": "training.md",
    "src/hf_efficientsam/checkpoints/efficientsam-s/README.md": "checkpoint.md",
    "spaces/README.md": "demo.md",
    "spaces/browser/README.md": "browser.md",
    "examples/integrations/README.md": "integrations.md",
    "examples/README.md": "examples.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
LINK = re.compile(r"(?<=\]\()(?!\w+:)[^)#\s]+")  # the path of a relative link


def repository_path(document: str, link: str) -> str:
    """The file that a document of the repository links to, from the root."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(document), link))


def site_path(path: str) -> str:
    """The place in the site of a file of the repository."""
    return DOCUMENTS.get(path) or path.removeprefix("docs/")


def on_files(files, config):
    """Adds the documents outside docs/, and the files that they and the pages in docs/ link to."""
    pages = [f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")]
    for document in [*DOCUMENTS, *pages]:
        links = LINK.findall((ROOT / document).read_text(encoding="utf-8"))
        for path in [document, *(repository_path(document, link) for link in links)]:
            if (ROOT / path).is_file() and not files.get_file_from_path(site_path(path)):
                files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links between documents -> links between pages. Pages of the reference, docs/api, link to pages already."""
    source = page.file.src_uri
    if source.startswith("api/"):
        return markdown
    if source == "browser.md" and BROWSER_PAGE.is_dir():
        markdown += '\n<a href="browser/index.html">Open the page</a>, which this site has.\n'
    document = {name: document for document, name in DOCUMENTS.items()}.get(source, f"docs/{source}")
    return LINK.sub(lambda match: site_path(repository_path(document, match[0])), markdown)


def on_post_build(config):
    if BROWSER_PAGE.is_dir():
        shutil.copytree(BROWSER_PAGE, Path(config.site_dir, "browser"), dirs_exist_ok=True)


class TransformersDocstrings(griffe.Extension):
    """Types are Markdown, "(`int`, *optional*)", and objects are named as "[`Name`]"; mkdocstrings has neither."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            text = re.sub(r"(?m)^ *\w+ \(`.*?\):", lambda match: re.sub("[`*]", "", match[0]), obj.docstring.value)
            public = "|".join(map(str, obj.package.exports))
            text = re.sub(rf"\[(`((?:{public})(?:\.\w+)?)`)\]", rf"[\1][{obj.package.name}.\2]", text)
            obj.docstring.value = re.sub(r"\[(`[\w.]+`)\](?!\[)", r"\1", text)
