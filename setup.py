"""The part of the build that pyproject.toml cannot say: the CPU kernels, the wheel's name and the page on PyPI.

The kernels are a plain shared library beside their binding. Without a C++ compiler the package installs all the same,
and `yuanmoe.ops.native` says once what is missing; with YUANMOE_RELEASE=1 the build fails instead, so that no wheel
without them is published.
"""

import os
import re
import tomllib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = Path("src/yuanmoe/ops/native")
PROJECT = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = PROJECT["urls"]["Repository"]


class BuildLibrary(build_ext):
    """Builds a library for ctypes: its name carries no Python version, and it exports no module."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return ext.export_symbols


class PlatformWheel(bdist_wheel):
    """Names the wheel after its platform alone: the library knows no Python, so that one wheel serves every version."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


def absolute_links(markdown: str, tag: str) -> str:
    """Links and pictures of the repository as addresses at `tag`; links elsewhere and within the page stay."""
    inside = r"(?![a-z][a-z0-9+.-]*:|#|/)"
    pages, pictures = f"{REPOSITORY}/blob/{tag}/", f"{REPOSITORY}/raw/{tag}/"
    markdown = re.sub(rf"(!\[[^\]]*\]\(){inside}", rf"\g<1>{pictures}", markdown)
    # The text of a link may be a picture.
    markdown = re.sub(rf"((?<!!)\[(?:[^\[\]]|!\[[^\]]*\]\([^)]*\))*\]\(){inside}", rf"\g<1>{pages}", markdown)
    markdown = re.sub(rf'(\bsrc(?:set)?="){inside}', rf"\g<1>{pictures}", markdown)
    return re.sub(rf'(\bhref="){inside}', rf"\g<1>{pages}", markdown)


KERNELS = Extension(
    "yuanmoe.ops.native.libyuanmoe",
    sources=sorted(map(str, NATIVE.glob("csrc/**/*.cpp"))),
    depends=sorted(map(str, NATIVE.glob("csrc/**/*.h"))),
    include_dirs=[str(NATIVE / "csrc")],
    language="c++",
    # No -march: each variant names its instruction set in its source, and the CPU chooses at run time.
    # -ffp-contract=off: a fused multiply-add rounds once instead of twice, and variants would differ in the last bit.
    # -Wno-maybe-uninitialized: the AVX-512 header of gcc 12 warns about itself.
    extra_compile_args=[
        *("-std=c++17", "-O3", "-g0", "-pthread", "-ffp-contract=off", "-fvisibility=hidden"),
        "-Wno-maybe-uninitialized",
    ],
    extra_link_args=["-pthread"],
    optional=os.environ.get("YUANMOE_RELEASE") != "1",
)

setup(
    ext_modules=[KERNELS],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
    # PyPI shows the text alone, so that a link into the repository must say where that is.
    long_description=absolute_links(Path("README.md").read_text(encoding="utf-8"), f"v{PROJECT['version']}"),
    long_description_content_type="text/markdown",
)
