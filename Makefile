# Each target does its own set-up: a virtual environment in .venv, redone when what it is made from changes.
PYTHON ?= python3
PIP := .venv/bin/python -m pip --disable-pip-version-check --no-input
READY := .venv/.ready
ROOMS := kernels moe_lora train infer launch

.PHONY: demo test lint bench cuda gpu gpu-wheels links wheel clean
.DELETE_ON_ERROR:

demo: $(READY)  ## clips to report on the CPU; make demo CLIPS=folder takes your own
	.venv/bin/wanmoe demo $(if $(CLIPS),--clips "$(CLIPS)")

test: $(READY)  ## the whole suite; make test ARGS="tests/kernels -x" for a part of it
	.venv/bin/pytest -n 2 --dist loadfile $(ARGS)

bench: $(READY)  ## the op against its peers, on the GPU or the CPU; make bench ARGS="--suite full"
	.venv/bin/wanmoe bench $(ARGS)

cuda: $(READY)  ## the CUDA kernels of csrc/, in place; needs nvcc
	.venv/bin/python -m wanmoe.kernels.cuda_library

# Takes the machine's own torch, triton and nvcc, and nothing from the network: wheels of what else is missing lie in WHEELS.
gpu: links  ## every GPU test, the tuner and the benchmark in less than 8 minutes; make gpu OUT=folder WHEELS=folder
	$(if $(WHEELS),$(PYTHON) -m pip install -q --no-index --no-deps --upgrade --target .gpu $(WHEELS)/*.whl)
	PYTHONPATH="$(CURDIR)/.types:$(CURDIR)/.gpu" $(PYTHON) -m wanmoe.kernels.bench.gpu --out $(or $(OUT),gpu-results)

# What `wanmoe bench block` and `bench ring` import besides torch, triton, numpy, matplotlib and what these bring, and pytest-xdist.
gpu-wheels:  ## the wheels that make gpu wants besides torch, for WHEELS=folder; FOR=3.13 is the Python that will run
	$(PYTHON) -m pip download --no-deps --only-binary=:all: --python-version $(or $(FOR),3.12) -c constraints.txt \
	  -d $(or $(WHEELS),wheels) accelerate aiohappyeyeballs aiohttp aiosignal annotated-doc annotated-types anyio attrs \
	  certifi charset-normalizer diffusers execnet frozenlist fsspec ftfy h11 httpcore2 httpx2 huggingface-hub idna \
	  multidict peft propcache psutil pydantic pydantic-core pytest-xdist pyyaml regex requests safetensors shellingham \
	  tokenizers tomli-w tqdm transformers truststore typer typing-extensions typing-inspection urllib3 wcwidth yarl

links:  # wanmoe as an import without an installation
	@mkdir -p .types/wanmoe && for room in $(ROOMS); do ln -sfn "../../$$room" ".types/wanmoe/$$room"; done

lint: $(READY) links  ## style, format and types; mypy follows links, not setuptools' import hook
	.venv/bin/ruff check . && .venv/bin/ruff format --check .
	MYPYPATH=.types .venv/bin/mypy --namespace-packages --explicit-package-bases -p wanmoe

wheel: $(READY)  ## dist/*.tar.gz, and dist/*.whl built out of it: nothing that lies about gets in
	rm -rf build dist && .venv/bin/python -m build --no-isolation

clean:
	rm -rf .venv .types .gpu build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# DeepSpeed comes as source: DS_BUILD_OPS=0 leaves its ops to be compiled at first use, so that this step needs no torch.
# wan22 is the official model that the tests compare with; of its many requirements they need none.
$(READY): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "wanmoe needs Python 3.10 or newer, which $(PYTHON) is not: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo 'Setting up .venv: a few minutes, the first time.'
	@$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv || { rm -rf .venv; echo "$(PYTHON) has no working venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PIP) install -q -c constraints.txt pip
	DS_BUILD_OPS=0 PYTHONWARNINGS=ignore $(PIP) install -q -c constraints.txt -e '.[dev]'
	$(PIP) install -q -c constraints.txt --no-deps wan22
	@touch $@
