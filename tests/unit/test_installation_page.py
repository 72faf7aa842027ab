"""The page on installation knows every extra there is, and no other."""

from __future__ import annotations

import configparser
import re

from tests.servers import ROOT


def test_every_extra_is_documented() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    page = (ROOT / "docs" / "installation.rst").read_text()
    assert set(re.findall(r"``\[([a-z]+)\]``", page)) == set(config["options.extras_require"])
