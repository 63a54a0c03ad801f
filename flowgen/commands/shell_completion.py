"""`flowgen shell-completion install`: completion with the Tab key, by the scripts of click."""

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    add_completion_class,
    get_completion_class,
)

from flowgen.utils.errors import UserError
from flowgen.utils.files import atomic_write

ZSH_SETUP = "(( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }; "


@add_completion_class
class BashCompletion(BashComplete):
    """Completion for bash, which splits words such as `model=gl` at the equals sign."""

    # No space follows a unique completion such as `trainer.steps=`.
    source_template = BashComplete.source_template.replace(
        "    return 0\n", "    [[ $COMPREPLY == *= ]] && compopt -o nospace\n    return 0\n"
    )
    prefix = ""  # part of the word that bash keeps, such as `model=`

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the words before the cursor and the incomplete word, joined at equals signs."""
        words, incomplete = super().get_completion_args()
        joined: list[str] = []
        previous = ""
        for word in [*words, incomplete]:
            if joined and word and "=" in (word, previous):
                joined[-1] += word
            else:
                joined.append(word)
            previous = word
        self.prefix = joined[-1].removesuffix(incomplete.removeprefix("="))
        return joined[:-1], joined[-1]

    def format_completion(self, item: CompletionItem[str]) -> str:
        """Return a line for the script, without the part of the word that bash keeps."""
        return f"{item.type},{item.value.removeprefix(self.prefix)}"


def install(*, shell: str | None = None) -> Iterator[str]:
    """Install completion for a shell; a second time changes nothing.

    Args:
        shell: bash, zsh or fish; None: the shell in the variable SHELL.

    Yields:
        Lines that name the changed files, and how to use completion.

    Raises:
        UserError: If the shell is unknown or a file cannot be written.
    """
    shell = shell or Path(os.environ.get("SHELL", "")).stem
    script, startup, setup = _files(shell)
    completion: Any = get_completion_class(shell)
    source = completion(click.Command("flowgen"), {}, "flowgen", "_FLOWGEN_COMPLETE").source()
    try:
        yield _write_script(script, source)
        if startup is not None:
            file = shlex.quote(str(script))
            yield _add_line(startup, f"if [ -f {file} ]; then {setup}source {file}; fi")
    except OSError as error:
        raise UserError(
            f"{error.filename or script}: {error.strerror}: make it writable, or set HOME to a "
            "folder that is"
        ) from error
    yield "open a new terminal to use it: `flowgen sa` and Tab give `flowgen sample`"


def _files(shell: str) -> tuple[Path, Path | None, str]:
    """Return the script of a shell, the file that must load it, and code to run before that."""
    home = Path.home()
    if shell == "bash":
        data = Path(os.environ.get("XDG_DATA_HOME") or home / ".local" / "share")
        folder = Path(os.environ.get("BASH_COMPLETION_USER_DIR") or data / "bash-completion")
        return folder / "completions" / "flowgen", home / ".bashrc", ""
    if shell == "zsh":
        startup = Path(os.environ.get("ZDOTDIR") or home) / ".zshrc"
        return home / ".zfunc" / "_flowgen", startup, ZSH_SETUP
    if shell == "fish":  # loads the scripts in this folder by itself
        config = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
        return config / "fish" / "completions" / "flowgen.fish", None, ""
    raise UserError(
        f"completion is not available for the shell {shell or '(SHELL is not set)'}: "
        "choose --shell bash, zsh or fish"
    )


def _write_script(path: Path, source: str) -> str:
    """Write the completion script unless it is there, and return a message."""
    if path.is_file() and path.read_bytes() == source.encode():
        return f"{path} is up to date"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_bytes(source.encode())
    return f"wrote {path}"


def _add_line(path: Path, line: str) -> str:
    """Add a line to the end of a startup file unless it has it, and return a message."""
    content = path.read_bytes() if path.exists() else b""
    if line.encode() in content.splitlines():
        return f"{path} loads it already"
    end = b"" if content.endswith(b"\n") or not content else b"\n"
    with open(path, "ab") as file:  # keeps a link to another file, and the file's mode
        file.write(end + f"# completion of flowgen with the Tab key\n{line}\n".encode())
    return f"added two lines to {path}, which load it"
