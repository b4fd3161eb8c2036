"""The page about detectors, from their classes and the stored figures of `make reproduce`."""

from collections.abc import Mapping, Sequence

from jobs.docs.job_files import field_rows
from jobs.docs.markdown import escaped, sentence, table
from raydetect.cli.comparison import FIGURES, NOT_MEASURED, NOTES, Comparison, compare
from raydetect.detectors._registry import ALIASES, detector_class

INTRODUCTION = """# Detectors

`raydetect detectors NAME` prints the same in a terminal, and `raydetect detectors --compare` the tables.
Choose one in a job with `detector: {name: NAME, params: {...}}`, or in Python with `create_model(NAME, ...)`.
[When to use which](../../raydetect/detectors/README.md#when-to-use-which) gives advice, cost and differences from the
papers.

"""
ABOUT_FIGURES = f"""
## Figures

Figures of `make reproduce`, a table for each machine; *Published*, below, is what the authors reported, on their data.
A dash means: not measured. {" ".join(NOTES)}
[Jobs at the published settings](../../jobs/reproduce/published/README.md) are for whoever has the data set and a GPU.
"""
HEAD = ("Detector", "Needs", "Localises", "Fit")
FIGURES_HEAD = ("Detector", *(title for _, title, _ in FIGURES), "Ours (default)")


def page() -> str:
    """The page as Markdown."""
    groups = compare()
    rows = sorted((row for found in groups.values() for row in found), key=lambda row: row.name)
    properties = table(HEAD, [[_link(row), row.needs, "yes" if row.localises else "no", row.fit] for row in rows])
    return f"{INTRODUCTION}{properties}{ABOUT_FIGURES}{_figures(groups)}\n" + "\n".join(map(_section, rows))


def _figures(groups: Mapping[str, Sequence[Comparison]]) -> str:
    text = ""
    for where, rows in groups.items():
        if where == NOT_MEASURED:
            text += f"\n{where}: {', '.join(map(_link, rows))}.\n"
        else:
            text += f"\n{where}:\n\n" + table(FIGURES_HEAD, [[_link(row), *row.figures, row.settings] for row in rows])
    return text


def _link(row: Comparison) -> str:
    return f"[`{row.name}`](#{row.name})"


def _section(row: Comparison) -> str:
    kind = detector_class(row.name)
    info = kind.info
    aliases = [alias for alias, name in ALIASES.items() if name == row.name]
    also = f" Also known as {', '.join(f'`{alias}`' for alias in aliases)}." if aliases else ""
    return (
        f"## {row.name}\n\n{escaped(sentence(f'{info.title} ({info.venue}, {info.paper}): {info.summary}'))}{also}\n\n"
        f"Published: {escaped(sentence(info.published))}\n\n"
        + table(("Parameter", "Type", "Default", "Meaning"), field_rows(kind.Params, {}))
    )
