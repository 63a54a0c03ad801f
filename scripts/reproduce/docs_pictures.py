"""Create the pictures of the documentation from the commands on its pages.

    python scripts/reproduce/docs_pictures.py [all | NAME.png ...]

A comment on a page of docs/ names a picture in docs/images, the files it is made of, one below the
other, and the time that this takes, if it is long. It may contain commands:

    <!-- picture: edit.png = smiling.png male.png; 5 minutes
    flowgen edit face.png --attribute Smiling --run faces --out smiling.png
    flowgen edit face.png --attribute Male --run faces --out male.png
    -->

A comment directly below a bash block runs that block too, and every block of the page above that
has such a comment; `<!-- picture -->` is a block without a picture that later pictures need. The
commands of a page run in outputs/docs_pictures/PAGE, where trainings continue after an
interruption. Without names, pictures that take long are listed and skipped.
"""

import argparse
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"
WORK = REPOSITORY / "outputs" / "docs_pictures"
COMMENT = re.compile(
    r"(?:^```bash\n(?P<block>(?:(?!```)[^\n]*\n)*)```\n\s*)?"
    r"<!-- picture(?:: (?P<name>\S+\.png))?(?: = (?P<files>[^;\n]+?))?(?:; (?P<time>[^\n]+?))?"
    r"(?: -->|\n(?P<commands>.*?)-->)",
    re.M | re.S,
)


@dataclass
class Picture:
    """A picture of a page: its commands, the files it is made of, and its time if it is long."""

    name: str
    page: Path
    commands: list[str]
    files: list[str]
    time: str

    def create(self) -> None:
        """Run the commands, and save the files one below the other in docs/images."""
        folder = WORK / self.page.relative_to(DOCS).with_suffix("")
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("docs", "scripts"):  # commands name their files
            if not (folder / name).exists():
                (folder / name).symlink_to(REPOSITORY / name)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        subprocess.run(
            ["bash", "-ec", continue_trainings("\n".join(self.commands))],
            cwd=folder,
            env={**os.environ, "PATH": path},
            check=True,
        )
        images = [Image.open(folder / file) for file in self.files]
        result = images[0]
        if len(images) > 1:
            size = (max(image.width for image in images), sum(image.height for image in images))
            result = Image.new("RGB", size, "white")
            for index, image in enumerate(images):
                result.paste(image, (0, sum(above.height for above in images[:index])))
        result.save(DOCS / "images" / self.name, optimize=True)


def continue_trainings(commands: str) -> str:
    """Let trainings with a fixed folder continue where an earlier call stopped."""
    commands = commands.replace("\\\n", " ")
    command = re.compile(r"^flowgen train (?=.*output_dir=)", re.M)
    return command.sub("flowgen train resume=true ", commands)


def pictures_of(page: Path) -> list[Picture]:
    """Read the pictures of a page, with the commands that create each."""
    pictures = []
    blocks: list[str] = []
    times: list[str] = []
    for match in COMMENT.finditer(page.read_text()):
        own_time = [match["time"]] if match["time"] else []
        if match["block"]:
            blocks.append(match["block"])
            times += own_time
        if match["name"]:
            is_part_of_page = match["block"] or not match["commands"]
            commands = [*(blocks if is_part_of_page else []), match["commands"] or ""]
            time = " + ".join(times if is_part_of_page else own_time)
            files = (match["files"] or "").split()
            pictures.append(Picture(match["name"], page, commands, files, time))
    return pictures


def all_pictures() -> list[Picture]:
    """Read the pictures of all pages."""
    pages = [path for path in sorted(DOCS.rglob("*.md")) if DOCS / "_build" not in path.parents]
    return [picture for page in pages for picture in pictures_of(page)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="pictures to create, or all")
    names = parser.parse_args().names
    pictures = all_pictures()
    unknown = set(names) - {"all"} - {picture.name for picture in pictures}
    if unknown:
        parser.error(f"no page of docs/ has a comment for {', '.join(sorted(unknown))}")
    failed = []
    for picture in pictures:
        page = picture.page.relative_to(REPOSITORY)
        if not picture.files:
            print(f"{picture.name}: {picture.time} ({page})")
        elif picture.name in names or "all" in names or not (names or picture.time):
            print(f"{picture.name}: running the commands of {page}", flush=True)
            try:
                picture.create()
            except subprocess.CalledProcessError:
                failed.append(picture.name)
        elif not names:
            print(f"{picture.name}: skipped, takes {picture.time} ({page})")
    if failed:
        sys.exit(f"commands failed, so these pictures are as before: {', '.join(failed)}")


if __name__ == "__main__":
    main()
