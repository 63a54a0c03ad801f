"""Write a page with the results of `make demo`: samples of the included models and the new run."""

import argparse

from markupsafe import Markup

from flowgen.commands.report import sections
from flowgen.config.runs import OUTPUTS, find_run
from flowgen.utils.html import Picture, Section, data_url, write_html

LEAD = (
    "Samples of models that flowgen includes, and a Glow that this machine has trained on 4,000 "
    "digits: its results, samples, and interpolation between two test digits."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="the run of the demo")
    parser.add_argument("models", nargs="*", help="models with samples in outputs/, as zoo/NAME")
    args = parser.parse_args()
    run = find_run(args.run)
    pictures = [
        Picture(
            Markup("<code>flowgen sample --run {}</code>").format(name),
            data_url(OUTPUTS / name / "sample.png"),
        )
        for name in args.models
    ]
    included = Section("included", "Included models", pictures=pictures)
    path = run.folder / "demo.html"
    write_html(path, "flowgen demo", [LEAD], [included, *sections([run])])
    print(path)


if __name__ == "__main__":
    main()
