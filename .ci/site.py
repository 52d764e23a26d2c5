"""A hook of MkDocs: pages that lie outside of docs/, and one of the API for each wing."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
OUTSIDE = {
    "experiments/README.md": "experiments.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
WINGS = {  # page of the API → its first sentence
    "arrays": "What a dozen files share: arrays, keys by image number, checks.",
    "process": "The diffusion process: schedules, τ, Eq. 4, 5, 7, 12, 16, exact denoisers.",
    "sampling": "Methods as tables, the one scan that runs them, and what is built on it.",
    "categorical": "Categories instead of pixels: Appendix A.",
    "networks": "Ho et al.'s U-Net, its configuration and its cost.",
    "storage": "Whole files, digests, checkpoints and weights on disk.",
    "data": "Data sets, and batches of them by number.",
    "pictures": "Pixels in and out, grids and plots.",
    "weights": "Trained models, whatever wrote them.",
    "generation": "Many images, on all devices, in shards.",
    "evaluation": "How close samples are to data.",
    "training": "The step, the loop, runs that resume, presets.",
    "cli": "The command `ddim-jax`: one file a command.",
}


def on_config(config):
    """Leaves underscores alone: x̄_t and x̄_s are two numbers, and no emphasis."""
    from markdown.extensions import Extension

    class Underscores(Extension):
        def extendMarkdown(self, md):
            if hasattr(md, "delimiters"):  # Markdown ≥ 3.11
                md.delimiters.remove("_")
            md.inlinePatterns.deregister("em_strong2", strict=False)

    config.markdown_extensions.append(Underscores())
    return config


def on_files(files, config):
    """Adds the pages that are not files of docs/."""
    from mkdocs.structure.files import File

    def add(page, content):
        files.append(File.generated(config, page, content=content))

    for source, page in OUTSIDE.items():
        add(page, _here((ROOT / source).read_text()))
    for wing, sentence in WINGS.items():
        parts = [f"::: {module}" for module in _modules(wing)]
        add(f"api/{wing}.md", "\n\n".join([f"# ddim_jax.{wing}", sentence, *parts]))
    add("api/index.md", _public_names())
    return files


def on_page_markdown(markdown, page, **_):
    """Links as GitHub wants them, turned to the pages of the site."""
    return _here(markdown) if "/" not in page.file.src_uri else markdown


def _here(markdown):
    for source, page in OUTSIDE.items():
        markdown = re.sub(rf"\]\((\.\./)?{re.escape(source)}", f"]({page}", markdown)
    return re.sub(r"\]\((\.\./)?docs/", "](", markdown)


def _modules(wing):
    """The public modules of a wing."""
    folder = ROOT / "ddim_jax" / wing
    for file in sorted(folder.rglob("*.py")) or [folder.with_suffix(".py")]:
        parts = file.relative_to(ROOT).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" and len(parts) > 3 else parts
        if not any(part.startswith("_") for part in parts):
            yield ".".join(parts)


def _public_names():
    """A table of `ddim_jax.__all__`: a name that no page describes is an unknown reference."""
    import griffe

    package = griffe.load("ddim_jax", search_paths=[str(ROOT)])
    rows = []
    for name in sorted(package.exports, key=str.lower):
        thing = package[name]
        if thing.is_alias:
            thing = thing.final_target
        if name == "__version__":
            continue
        page = f"[`{name}`]({name}.md)" if name == "categorical" else f"[`{name}`][{thing.path}]"
        said = thing.docstring.value.splitlines()[0] if thing.docstring else ""
        rows.append(f"| {page} | {said.replace('|', chr(92) + '|')} |")
    return "\n".join(
        [
            "# The public names",
            "",
            "`import ddim_jax as ddim` gives these. All else is imported from its wing, such as",
            "`ddim_jax.training.loop.fit`, and may move.",
            "",
            "| `ddim.` | |",
            "|---|---|",
            *rows,
        ]
    )
