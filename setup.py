"""Maps the top-level rooms to the import name `wanmoe` (`wanmoe.kernels` is `kernels/`, and so on).

`wanmoe` itself is a namespace without an `__init__`, and so is the top-level `kernels/`: with the checkout
as working folder a `kernels/__init__.py` would shadow Hugging Face's package of that name inside transformers
and diffusers. Everything else about the package is in pyproject.toml.
"""

from setuptools import find_namespace_packages, setup

ROOMS = ("kernels", "moe_lora", "train", "infer", "launch")
DATA = ["*.toml", "*.json", "*.html", "*.j2", "*.css", "*.js", "py.typed"]

package_dir = {f"wanmoe.{room}": room for room in ROOMS}
packages = list(package_dir)
for room in ROOMS:
    # A folder of data alone (launch/presets) is a package too: that is how its files get into the wheel.
    found = find_namespace_packages(room, exclude=["__pycache__", "*.__pycache__"])
    packages += [f"wanmoe.{room}.{sub}" for sub in found]

setup(packages=packages, package_dir=package_dir, package_data={"": DATA})
