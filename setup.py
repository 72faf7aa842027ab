"""What setup.cfg cannot say: the README of the package index is ours without the pictures.

Indexes show pictures from absolute addresses only, and those in README.rst are relative to the clone.
"""

import re
from pathlib import Path

from setuptools import setup

readme = (Path(__file__).parent / "README.rst").read_text(encoding="utf-8")
setup(long_description=re.sub(r"(?ms)^\.\. picture:.*?^\.\. end of picture$", "", readme))
