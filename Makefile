# The common commands by name. Each is one line that you can also type.
.PHONY: install test lint checkpoint

DATA ?= ../shared/data
TEACHER ?= ../shared/weights/vit-small-patch14-teacher

install:
	pip install -c constraints.txt -e ".[train,dev]"

test:
	pytest -q -m "not gpu"

lint:
	ruff check && ruff format --check

