# make demo    train experts on real data, merge them from disk with every method, print the table and draw it
# make test    lint, types, all tests
# make docs    the documentation as HTML in docs/_build
# make clean   remove what the others made
#
# Needs Python >= 3.11 and the package index, nothing else. PYTHON=python3.13 make test takes another interpreter.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
INSTALLED_DOCS := .venv/installed-docs

.PHONY: demo test docs clean

demo: $(INSTALLED)
	$(BIN)/python -m examples.digits

test: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/pytest -n 2

docs: $(INSTALLED_DOCS)
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build

clean:
	rm -rf .venv build dist demo-output docs/_build .pytest_cache .ruff_cache .hypothesis .jax_cache

# The stamps are newer than pyproject.toml once everything it asks for is installed.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "jaxmerge needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e '.[plot,dev]'
	@touch $@

$(INSTALLED_DOCS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	@touch $@
