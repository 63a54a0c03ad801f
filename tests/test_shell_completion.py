"""Installation of completion with the Tab key, and its work in a real bash."""

import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_cli import assert_error

FILES = {
    "bash": [".bashrc", ".local/share/bash-completion/completions/flowgen"],
    "zsh": [".zfunc/_flowgen", ".zshrc"],
    "fish": [".config/fish/completions/flowgen.fish"],
}
TAB_SECONDS = 20.0  # maximum time of a completion, on a busy machine


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("BASH_COMPLETION_USER_DIR", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "ZDOTDIR"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("shell", FILES)
def test_installing_twice_changes_nothing(command, home, shell):
    status, output, _ = command("shell-completion", "install", "--shell", shell)
    assert status == 0
    installed = contents(home)
    assert sorted(installed) == FILES[shell]
    assert output.count(str(home)) == len(FILES[shell])
    assert "open a new terminal" in output
    script = next(text for name, text in installed.items() if not name.endswith("rc"))
    assert f"_FLOWGEN_COMPLETE={shell}_complete".encode() in script
    status, output, _ = command("shell-completion", "install", "--shell", shell)
    assert status == 0
    assert "up to date" in output
    assert "wrote" not in output
    assert "added" not in output
    assert contents(home) == installed


@pytest.mark.parametrize(("shell", "startup"), [("bash", ".bashrc"), ("zsh", ".zshrc")])
def test_startup_files_keep_their_content(command, home, monkeypatch, shell, startup):
    (home / "dotfiles").write_bytes(b"export A=\xff")  # without a newline at the end
    (home / startup).symlink_to(home / "dotfiles")
    monkeypatch.setenv("SHELL", f"/usr/bin/{shell}")
    assert command("shell-completion", "install")[0] == 0
    assert (home / startup).is_symlink()
    assert (home / "dotfiles").read_bytes().startswith(b"export A=\xff\n# completion of flowgen")


def test_folders_of_the_user_are_respected(command, home, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "my config"))
    monkeypatch.setenv("BASH_COMPLETION_USER_DIR", str(home / "my scripts"))
    for shell in ("fish", "bash"):
        assert command("shell-completion", "install", "--shell", shell)[0] == 0
    assert (home / "my config" / "fish" / "completions" / "flowgen.fish").is_file()
    assert f"source '{home}/my scripts/completions/flowgen'" in (home / ".bashrc").read_text()


def test_an_older_script_is_replaced(command, home):
    script = home / FILES["fish"][0]
    script.parent.mkdir(parents=True)
    script.write_text("old")
    assert "wrote" in command("shell-completion", "install", "--shell", "fish")[1]
    assert script.read_text() != "old"


def test_mistakes_get_one_line(command, home, monkeypatch):
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    assert_error(command("shell-completion", "install"), "tcsh: choose --shell bash, zsh or fish")
    monkeypatch.delenv("SHELL")
    assert_error(command("shell-completion", "install"), "SHELL is not set")
    (home / ".bashrc").mkdir()
    result = command("shell-completion", "install", "--shell", "bash")
    assert_error(result, f"{home / '.bashrc'}: Is a directory")


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_bash_completes_commands_and_settings(command, home, monkeypatch):
    (home / ".bashrc").write_text("PS1='$ '\n")
    assert command("shell-completion", "install", "--shell", "bash")[0] == 0
    program = home / "bin" / "flowgen"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m flowgen "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TERM", "dumb")
    assert type_in_bash("flowgen sa\t", "flowgen sample ")
    assert type_in_bash("flowgen train model=gl\t", "model=glow ")
    assert type_in_bash("flowgen train trainer.minu\t5", "trainer.minutes=5")  # without a space
    assert type_in_bash("flowgen sample --sampler=gi\t", "--sampler=gibbs ")
    assert type_in_bash("flowgen complete --sampler=hm\t", "--sampler=hmc ")
    assert type_in_bash("flowgen evaluate num_imp\t4", "num_importance_samples=4")


def type_in_bash(keys: str, expected: str) -> bool:
    """Type keys in an interactive bash and return whether it shows the expected text."""
    import pty

    ours, theirs = pty.openpty()
    with subprocess.Popen(
        ["bash", "-i"], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    ) as process:
        os.close(theirs)
        try:
            read_until(ours, "$ ")  # the prompt
            os.write(ours, keys.encode())
            return read_until(ours, expected)
        finally:
            process.kill()
            os.close(ours)


def read_until(terminal: int, expected: str) -> bool:
    """Read from a terminal until it shows the expected text; return False if that takes long."""
    shown = b""
    end = time.monotonic() + TAB_SECONDS
    while expected.encode() not in shown:
        if not select.select([terminal], [], [], max(0.0, end - time.monotonic()))[0]:
            return False
        shown += os.read(terminal, 4096)
    return True
