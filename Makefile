# `make train` and `make test` do all their own set-up. The rest are shortcuts.
PYTHON ?=
VENV := .venv
STAMP := $(VENV)/.installed
RUN := $(VENV)/bin/python
# TPU kernels are compiled in the tests, without a TPU. Apart from the other packages, so that jax doesn't look for one.
LIBTPU := $(VENV)/tpu/libtpu/libtpu.so
# Lets the C library keep and reuse large blocks in huge pages; without it a CPU step spends a third of its time on page faults.
MEMORY := GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=17179869184

.PHONY: help setup train test test-slow lint fuzz docs lock audit clean

help:
	@echo "make train      train a small DeepSeek-V3 on this machine (sets itself up)"
	@echo "make test       lint, types and the default tests (sets itself up)"
	@echo "make test-slow  the tests that take minutes each"
	@echo "make lint       only lint and types"
	@echo "make fuzz       half an hour of damaged input"
	@echo "make docs       the documentation's site, in runs/site"
	@echo "make audit      known vulnerabilities of the pinned packages (needs a network)"
	@echo "make clean      remove .venv and caches"

setup: $(STAMP)

$(STAMP): requirements.txt scripts/find_python.sh
	@start=$$(date +%s); python=$$(PYTHON="$(PYTHON)" sh scripts/find_python.sh) || exit 1; \
	echo "setting up $(VENV) with $$python"; \
	$$python -m venv --clear $(VENV) && $(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt || exit 1; \
	touch $(STAMP); echo "set-up took $$(( $$(date +%s) - start )) s"

train: setup
	@start=$$(date +%s); $(MEMORY) $(RUN) -m dsv3_jax train $(ARGS); status=$$?; \
	echo "training took $$(( $$(date +%s) - start )) s"; exit $$status

test: setup lint $(LIBTPU)
	$(RUN) -m pytest -n 2 --dist loadfile $(ARGS)

test-slow: setup $(LIBTPU)
	$(RUN) -m pytest -m slow $(ARGS)

$(LIBTPU): $(STAMP)
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/tpu libtpu==0.0.52
	touch $@

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

fuzz: setup
	$(RUN) -m tests.fuzz $(ARGS)

# In environments of their own: nothing else needs these packages.
$(VENV)/docs $(VENV)/audit:
	python=$$(PYTHON="$(PYTHON)" sh scripts/find_python.sh) && $$python -m venv $@

docs: $(VENV)/docs
	$</bin/python -m pip install --quiet --disable-pip-version-check mkdocs-material==9.8.2
	NO_MKDOCS_2_WARNING=1 $</bin/mkdocs build --strict

# Asks PyPI for advisories. Where an index without them is all that can be reached, it says so and fails.
audit: $(VENV)/audit
	$</bin/python -m pip install --quiet --disable-pip-version-check pip-audit==2.10.1
	$</bin/pip-audit --strict --disable-pip --require-hashes -r requirements.lock

# Needs uv. `pip install --require-hashes -r requirements.lock` then installs these files and no others.
lock:
	uv pip compile requirements.txt --generate-hashes --universal --python-version 3.12 --no-header -o requirements.lock

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis
