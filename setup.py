from pathlib import Path

from setuptools import setup
from setuptools.command.sdist import sdist


class Sdist(sdist):
    """Adds what setuptools leaves out by itself: what the tests need, and the guides that README links to."""

    def make_distribution(self) -> None:
        root = Path(__file__).parent
        files = [path for folder in ("examples", "tests") for path in (root / folder).rglob("*")]
        wanted = (".py", ".php", ".rst", ".json")
        self.filelist.extend(sorted(str(path.relative_to(root)) for path in files if path.suffix in wanted))
        self.filelist.remove_duplicates()
        super().make_distribution()


setup(cmdclass={"sdist": Sdist})
