"""`raydetect export`: a run for spreadsheets and labelling tools."""

from pathlib import Path

import click

from raydetect.cli.options import BAD_JOB, errors, ledger_of, prepare_output, storage_options
from raydetect.errors import SpecError
from raydetect.progress.activity import doing

MISSING_SHOWN = 10


@click.command()
@click.argument("results")
@click.option("--as", "form", type=click.Choice(["csv", "coco", "folder"]), required=True, help="What to make.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="[default: rows.csv, coco.json or flagged]")
@click.option("--map-threshold", type=float, help="coco: cut maps from this value on. [default: regions of the rows]")
@click.option("--polygons", is_flag=True, help="coco: polygons along pixel edges instead of run lengths.")
@storage_options
def export(
    results: str,
    form: str,
    output: Path | None,
    map_threshold: float | None,
    polygons: bool,
    endpoint_url: str | None,
    profile: str | None,
    anon: bool,
) -> None:
    """Write a run's rows, outlines or flagged images for other tools.

    csv: all rows in one file. coco: the regions of rows as run lengths or polygons: outlines if the run has
    sink.style: map, else boxes. folder: the flagged images as they are stored, their overlays, and a table of them.
    """
    with errors(BAD_JOB):
        if form != "coco" and (map_threshold is not None or polygons):
            raise SpecError(f"--map-threshold and --polygons belong to --as coco, given --as {form}. Leave them out.")
        from raydetect.export.coco import require_maps
        from raydetect.export.folder import require_flags
        from raydetect.report.pictures import Pictures, reach_of

        ledger = ledger_of(results, endpoint_url, profile, anon)
        run = ledger.require_run()
        pictures = Pictures(ledger, run, reach_of(run).source)
        if form == "coco":
            require_maps(pictures, map_threshold)
        if form == "folder":
            require_flags(run, ledger)
        place = output or Path({"csv": "rows.csv", "coco": "coco.json", "folder": "flagged"}[form])
        prepare_output(place, form == "folder")
    with errors(), doing("reading the rows"):
        if form == "csv":
            from raydetect.export.table import write_csv

            click.echo(f"Wrote {write_csv(ledger, place):,} rows.\nTable: {place}")
        elif form == "coco":
            from raydetect.export.coco import write_coco

            images, regions = write_coco(pictures, place, map_threshold, polygons)
            click.echo(f"Wrote {regions:,} regions of {images:,} images.\nAnnotations: {place}")
        else:
            from raydetect.export.folder import write_folder

            count, missing = write_folder(pictures, place)
            for sentence in missing[:MISSING_SHOWN]:
                click.echo(sentence, err=True)
            left_out = f"; {len(missing):,} pictures could not be read" if missing else ""
            click.echo(f"Wrote {count:,} flagged images{left_out}.\nFolder: {place}")
