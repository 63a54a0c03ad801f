"""`flowgen push`: a trained model put on the Hugging Face Hub."""

from pathlib import Path
from tempfile import TemporaryDirectory

from flowgen.commands.cards import front_matter, licence_of
from flowgen.commands.export import export
from flowgen.training.find import find_checkpoint
from flowgen.training.hub import FILE, PREFIX, check_name, upload
from flowgen.training.portable import about_portable


def push(*, name: str, repository: str, licence: str | None, private: bool) -> list[str]:
    """Put a run's model on the Hub as OWNER/NAME, with its card and samples: where it lies, and how to use it.

    Raises FlowgenError where the terms of its images forbid to pass it on.
    """
    repository = check_name(repository.removeprefix(PREFIX))
    licence = licence_of(find_checkpoint(name)[1]["config"]["data"], licence)
    with TemporaryDirectory() as folder:
        model, text, _ = export(name=name, path=Path(folder) / FILE, called=PREFIX + repository)
        text.with_name("README.md").write_text(front_matter(about_portable(model), licence) + text.read_text())
        text.unlink()
        address = upload(Path(folder), repository, private)
    return [address, f"flowgen sample --run {PREFIX}{repository}"]
