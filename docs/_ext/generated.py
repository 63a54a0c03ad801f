"""Directives for text that is generated: settings from conf/*.yaml, options from click."""

import inspect
import re
from typing import ClassVar

import click
from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from flowgen import cli
from flowgen.api import list_datasets, list_models
from flowgen.config.settings import (
    Setting,
    description,
    flatten,
    format_value,
    group_options,
    read_yaml,
    settings_of_file,
    settings_of_option,
)
from flowgen.data import DOWNLOADABLE

CHOICES = re.compile(r"One of ([^.]+)\.")  # in the comment of a setting
ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")
URL = re.compile(r"https?://[^\s)]+")


def code(text: str) -> str:
    return "`" + text.replace("|", "\\|") + "`" if text else ""


def prose(text: str) -> str:
    """Return a comment of a YAML file as Markdown: escaped, with code and links to papers."""
    text = re.sub(r"([*_\[\]|<>])", r"\\\1", text)
    text = re.sub(r"(?<![\w`])([a-z_\\]+=[\w.:/,\\-]*\w|data\.root|trainer\.\w+)", unescape, text)
    text = ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", text)
    return URL.sub(lambda match: f"<{match[0]}>" if "arxiv" not in match[0] else match[0], text)


def unescape(match: re.Match[str]) -> str:
    return "`" + match[0].replace("\\", "") + "`"


def setting_rows(settings: list[Setting]) -> list[list[str]]:
    rows = []
    for setting in settings:
        meaning = CHOICES.sub("", setting.meaning).strip(" ;")
        meaning = meaning[:1].upper() + meaning[1:]
        listed = CHOICES.search(setting.meaning)
        choices = " ".join(map(code, listed[1].split(", "))) if listed else ""
        value = setting.default
        default = "empty" if value == "" else code(format_value(value))
        if isinstance(value, str) and "${" in value:
            default = "`outputs/DATE/TIME_MODEL_DATA`"  # it is composed from other settings
        rows.append([code(setting.key), default, choices, prose(meaning)])
    return rows


def markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Return a table without the columns that are empty in every row."""
    used = [column for column in range(len(header)) if any(row[column] for row in rows)]
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line[column] for column in used) + " |" for line in lines]


class MarkdownDirective(SphinxDirective):
    """A directive whose content is generated Markdown."""

    def lines(self) -> list[str]:
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        container = nodes.container(classes=["generated"])
        content = StringList(self.lines(), source=self.get_source_info()[0])
        self.state.nested_parse(content, self.content_offset, container)
        for table in container.findall(nodes.table):
            table["classes"] += ["generated", self.name]
        return list(container.children)


class SettingsDirective(MarkdownDirective):
    """`{settings} model=glow`, `{settings} general` or `{settings} experiment`."""

    required_arguments = 1
    option_spec: ClassVar = {
        "changes": directives.flag
    }  # only the other sections that the model changes

    def lines(self) -> list[str]:
        group, _, option = self.arguments[0].partition("=")
        header = ["Setting", "Default", "Choices", "Meaning"]
        if "changes" in self.options:
            return self.changed_defaults(option)
        if group in ("general", "evaluation"):
            settings = [
                setting
                for setting in settings_of_file("train").values()
                if setting.key.startswith("evaluation.") == (group == "evaluation")
            ]
        elif group == "trainer" and option == "gpu":
            return self.differences("gpu", "cpu")
        elif option:
            settings = [
                setting
                for setting in settings_of_option(group, option).values()
                if setting.key not in ("data.search_dirs", "data.download_hint")
            ]
        else:
            rows = [
                [code(f"{group}={name}"), prose(description(f"{group}/{name}"))]
                for name in group_options(group)
            ]
            return markdown_table(["Option", "Meaning"], rows)
        return markdown_table(header, setting_rows(settings))

    def differences(self, option: str, base: str) -> list[str]:
        """Return the settings of a trainer that differ from another one."""
        values = settings_of_option("trainer", base)
        rows = [
            [
                code(key),
                code(format_value(values[key].default)),
                code(format_value(setting.default)),
            ]
            for key, setting in settings_of_option("trainer", option).items()
            if setting.default != values[key].default
        ]
        return markdown_table(["Setting", f"`trainer={base}`", f"`trainer={option}`"], rows)

    def changed_defaults(self, model: str) -> list[str]:
        """Return the settings of data and trainer that a model changes."""
        config = read_yaml(f"model/{model}")
        changes = flatten({name: config[name] for name in ("data", "trainer") if name in config})
        rows = [[code(key), code(format_value(value))] for key, value in changes.items()]
        if not rows:
            return ["The model keeps the defaults of the data and of the trainer."]
        table = markdown_table(["Setting", f"Default with `model={model}`"], rows)
        return ["The model changes these defaults:", "", *table]


class CommandUsage(MarkdownDirective):
    """`{command} sample`: the usage of a command, its help, and a table of its options."""

    required_arguments = 1

    def lines(self) -> list[str]:
        name = self.arguments[0]
        command = cli.cli.commands[name]
        context = click.Context(command, info_name=name)
        usage = " ".join(["flowgen", name, *command.collect_usage_pieces(context)])
        rows = []
        for parameter in command.get_params(context):
            if isinstance(parameter, click.Option):
                names = ", ".join(map(code, [*parameter.opts, *parameter.secondary_opts]))
                if not parameter.is_flag:
                    value = parameter.make_metavar(context).replace("INTEGER RANGE", "N")
                    names += " " + prose(value.replace("|", " | "))
                default = str(parameter.default) if parameter.show_default else ""
                rows.append([names, code(default), prose(parameter.help or "")])
        help_text = inspect.cleandoc(command.help or "").splitlines()
        table = markdown_table(["Option", "Default", "Meaning"], rows)
        return ["```text", usage, "```", "", *help_text, "", *table]


class ModelTable(MarkdownDirective):
    """`{model-table}`: every model, its page, description, likelihood and paper."""

    def lines(self) -> list[str]:
        pages = {"iaf": "maf", "sylvester": "planar"}
        rows = [
            [f"[`{name}`]({pages.get(name, name)}.md)", prose(text), likelihood, prose(paper)]
            for name, text, paper, likelihood in list_models()
        ]
        return markdown_table(["`model=`", "Description", "Likelihood", "Paper"], rows)


class DataTable(MarkdownDirective):
    """`{data-table}`: every data set and its source."""

    def lines(self) -> list[str]:
        rows = []
        for name, text, source, _ in list_datasets():
            section = read_yaml(f"data/{name}")
            downloaded = section["_target_"].rpartition(".")[2] in DOWNLOADABLE
            how = "downloaded if missing" if downloaded else "`data.root=` your copy"
            if "root" not in section and not downloaded:
                how = "included, or generated"
            rows.append(
                [code(name), prose(text), how + (f", [web page]({source})" if source else "")]
            )
        return markdown_table(["`data=`", "Images", "Source"], rows)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("settings", SettingsDirective)
    app.add_directive("command", CommandUsage)
    app.add_directive("model-table", ModelTable)
    app.add_directive("data-table", DataTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
