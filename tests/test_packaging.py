"""Files of the distribution that repeat facts of the package."""

import re
from pathlib import Path

import yaml

import flowgen

ROOT = Path(__file__).parents[1]


def test_changelog_and_citation_have_the_version_of_the_package():
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == flowgen.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == flowgen.__version__


def test_continuous_integration_tests_the_supported_versions_of_python():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    versions = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert versions == re.findall(r"Python :: (3\.\d+)", pyproject)
    assert f'requires-python = ">={versions[0]}"' in pyproject
