"""The page about the command line, from click's commands."""

import inspect
from collections.abc import Iterator

import click

from jobs.docs.markdown import code, escaped, table
from raydetect.cli.main import main

INTRODUCTION = """# Commands

`raydetect COMMAND --help` prints the same in a terminal. Commands that read a job file take its values from the file
and from `--set`: `--set sink.heatmaps=all` overrides one key. [Job files](job-files.md) lists the keys.

| Exit code | Meaning |
|---|---|
| 0 | success |
| 1 | the run failed, or the storage was unavailable: start it again; `verify` found damage |
| 2 | the job file is invalid, or a path in it does not exist |
| 3 | finished, but with more bad rows than `max_bad_fraction` |
| 4 | an audit raised an alarm |
| 130 | stopped by Ctrl-C; what is committed is kept |

`eval "$(_RAYDETECT_COMPLETE=bash_source raydetect)"` enables completion in bash.

"""


def page() -> str:
    """The page as Markdown."""
    commands = sorted(_commands(main, "raydetect"), key=lambda found: found[0])
    head = table(("Command", ""), [(f"[`{name}`](#{_anchor(name)})", command.get_short_help_str(200))
                                   for name, command in commands])  # fmt: skip
    return INTRODUCTION + head + "\n" + "\n".join(_section(name, command) for name, command in commands)


def _commands(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from _commands(command, f"{path} {name}")
        elif not command.hidden:
            yield f"{path} {name}", command


def _anchor(name: str) -> str:
    return name.replace(" ", "-")


def _section(name: str, command: click.Command) -> str:
    context = click.Context(command, info_name=name)
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    rows = [_option(parameter, context) for parameter in command.params if isinstance(parameter, click.Option)]
    text = escaped(inspect.cleandoc(command.help or ""))
    options = table(("Option", "Meaning"), [row for row in rows if row]) if rows else ""
    return f"## {name}\n\n{text}\n\n```text\n{usage}\n```\n\n{options}"


def _option(option: click.Option, context: click.Context) -> tuple[str, str] | None:
    record = option.get_help_record(context)
    return record and (code(record[0]), escaped(record[1]))
