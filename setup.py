"""Maps the top-level rooms to the import name `wanmoe`, and builds the CUDA library where it can.

`wanmoe.kernels` is `kernels/`, and so on. `wanmoe` itself is a namespace without an `__init__`, and so is the
top-level `kernels/`: with the checkout as working folder a `kernels/__init__.py` would shadow Hugging Face's
package of that name inside transformers and diffusers. The rest is in pyproject.toml.

The CUDA library is never required. WANMOE_BUILD_CUDA=1 builds it or fails, =0 does not. Unset, it is built
where nvcc and a CUDA build of torch are at hand; that takes `pip install --no-build-isolation`, since an
isolated build sees no torch. WANMOE_CUDA_ARCHS chooses the GPUs ("80;89;90").
"""

import importlib.util
import os
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, SetupError

ROOMS = ("kernels", "moe_lora", "train", "infer", "launch")
DATA = ["*.toml", "*.json", "*.html", "*.j2", "*.css", "*.js", "py.typed"]

spec = importlib.util.spec_from_file_location(
    "cuda_library", Path(__file__).parent / "kernels" / "cuda_library.py"
)
cuda_library = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cuda_library)


def reason_against():
    """Why the CUDA library is not built, or None."""
    wish = os.environ.get("WANMOE_BUILD_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SetupError(f"WANMOE_BUILD_CUDA is {wish!r}; set it to 1 or 0, or not at all")
    if wish == "0":
        return "WANMOE_BUILD_CUDA is 0"
    obstacle = cuda_library.obstacle()
    if obstacle and wish == "1":
        raise SetupError(f"WANMOE_BUILD_CUDA is 1, but the CUDA library cannot be built: {obstacle}")
    if not obstacle and not wish and not cuda_library.torch_has_cuda():
        obstacle = "torch is a build without CUDA; WANMOE_BUILD_CUDA=1 builds all the same"
    return obstacle


class BuildPackage(build_py):
    """Says why there will be no CUDA library."""

    def run(self):
        if REASON:
            print(f"wanmoe: without the CUDA library, since {REASON}")
        super().run()


class BuildLibrary(build_ext):
    """One nvcc call; the result is loaded by torch, not by Python, so its name carries no Python version."""

    def get_ext_filename(self, fullname):
        return f"{fullname.replace('.', '/')}.so"

    def build_extension(self, ext):
        try:
            cuda_library.build(Path(self.get_ext_fullpath(ext.name)).resolve())
        except cuda_library.LibraryError as error:
            raise CompileError(f"{error}\nWANMOE_BUILD_CUDA=0 installs without the CUDA library") from error


class Wheel(bdist_wheel):
    """With the library it is for one platform, but still for any Python."""

    def get_tag(self):
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


REASON = reason_against()
package_dir = {f"wanmoe.{room}": room for room in ROOMS}
packages = list(package_dir)
for room in ROOMS:
    # A folder of data alone (launch/presets) is a package too: that is how its files get into the wheel.
    found = find_namespace_packages(room, exclude=["__pycache__", "*.__pycache__", "bench.results*"])
    packages += [f"wanmoe.{room}.{sub}" for sub in found]

setup(
    packages=packages,
    package_dir=package_dir,
    package_data={"": DATA},
    exclude_package_data={"": ["*.md"]},  # MANIFEST.in has them for the sdist
    ext_modules=[] if REASON else [Extension("wanmoe.kernels.libwanmoe_cuda", sources=[])],
    cmdclass={"build_py": BuildPackage, "build_ext": BuildLibrary, "bdist_wheel": Wheel},
)
