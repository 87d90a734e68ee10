PYTHON := .venv/bin/python

.PHONY: lint typecheck

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

# mypy knows nothing of package-dir, so it is shown the tree as it installs, in links.
typecheck:
	rm -rf .typecheck && mkdir -p .typecheck/mmedge
	ln -s $(addprefix ../../,$(wildcard mmedge/*)) .typecheck/mmedge/
	ln -s ../../converters ../../runtimes .typecheck/mmedge/
	cd .typecheck && ../$(PYTHON) -m mypy --config-file ../pyproject.toml -p mmedge
