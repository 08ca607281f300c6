"""The part of the build that pyproject.toml cannot say: the CPU kernels, a plain shared library beside their binding.

Optional: without a C++ compiler the package installs all the same, and `yuanmoe.ops.native` says once what is missing.
"""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE = Path("src/yuanmoe/ops/native")


class BuildLibrary(build_ext):
    """Builds a library for ctypes: its name carries no Python version, and it exports no module."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return ext.export_symbols


KERNELS = Extension(
    "yuanmoe.ops.native.libyuanmoe",
    sources=sorted(map(str, NATIVE.glob("csrc/*.cpp"))),
    depends=sorted(map(str, NATIVE.glob("csrc/*.h"))),
    language="c++",
    # No -march: each variant names its instruction set in its source, and the CPU chooses at run time.
    # -ffp-contract=off: a fused multiply-add rounds once instead of twice, and variants would differ in the last bit.
    # -Wno-maybe-uninitialized: the AVX-512 header of gcc 12 warns about itself.
    extra_compile_args=[
        *("-std=c++17", "-O3", "-g0", "-pthread", "-ffp-contract=off", "-fvisibility=hidden"),
        "-Wno-maybe-uninitialized",
    ],
    extra_link_args=["-pthread"],
    optional=True,
)

setup(ext_modules=[KERNELS], cmdclass={"build_ext": BuildLibrary})
