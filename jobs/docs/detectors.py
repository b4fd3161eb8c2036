"""The page about detectors, from their classes and the stored figures of `make reproduce`."""

from jobs.docs.job_files import field_rows
from jobs.docs.markdown import escaped, sentence, table
from raydetect.cli.comparison import FIGURES, Comparison, compare
from raydetect.detectors._registry import ALIASES, detector_class

INTRODUCTION = """# Detectors

`raydetect detectors NAME` prints the same in a terminal, and `raydetect detectors --compare` the first table.
Choose one in a job with `detector: {name: NAME, params: {...}}`, or in Python with `create_model(NAME, ...)`.
[When to use which](../../raydetect/detectors/README.md#when-to-use-which) gives advice, cost and differences from the
papers.

Figures are our own; *Published* is what the authors reported, on their data. A dash means: not measured.

"""
HEAD = ("Detector", "Needs", "Localises", "Fit", "Fit, s", "Images/s", "x backbone", "Image AUROC", "Pixel AUROC")


def page() -> str:
    """The page as Markdown."""
    rows, where = compare()
    return f"{INTRODUCTION}{table(HEAD, [_line(row) for row in rows])}\n{where}\n\n" + "\n".join(map(_section, rows))


def _line(row: Comparison) -> list[str]:
    measured = ((row.measured.get(key), form) for key, form in FIGURES)
    figures = ["-" if figure is None else format(figure, form) for figure, form in measured]
    return [f"[`{row.name}`](#{row.name})", row.needs, "yes" if row.localises else "no", row.fit, *figures]


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
