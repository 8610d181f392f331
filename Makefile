# make demo | test | test-slow | test-parity | test-faults | install | lint | clean
# [ACCELERATOR=cpu|cuda12|cuda13|tpu] [PYTHON=python3.12] [ROUNDS=1000] [SEED=1]

PYTHON ?= python3
ACCELERATOR ?= cpu
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(ACCELERATOR)
WORKDIR ?= runs/digits
ROUNDS ?= 24
SEED ?= 0

ifeq ($(filter $(ACCELERATOR),cpu cuda12 cuda13 tpu),)
$(error ACCELERATOR=$(ACCELERATOR) is unknown; choose cpu, cuda12, cuda13 or tpu)
endif
JAX := $(if $(filter cpu,$(ACCELERATOR)),jax,jax[$(ACCELERATOR)])

.PHONY: demo test test-slow test-parity test-faults install lint clean

demo: $(STAMP)
	$(BIN)/python -m dit_jax.datasets.digits
	$(BIN)/python -m dit_jax.train --config configs/vae_digits.py --workdir $(WORKDIR)/vae
	$(BIN)/python -m dit_jax.encode --config configs/digits_latents.py \
	  --vae $(WORKDIR)/vae --out $(WORKDIR)/moments
	$(BIN)/python -m dit_jax.train --config configs/digits_latents.py --workdir $(WORKDIR)/dit \
	  --config.latents.moments=$(WORKDIR)/moments --config.latents.vae=$(WORKDIR)/vae
	$(BIN)/python -m dit_jax.evaluate --workdir $(WORKDIR)/dit --num 1000 --labels balanced

test: $(STAMP) lint
	$(BIN)/python -m pytest --durations=10

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow --durations=10

test-parity: $(STAMP) requirements-parity.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  -c constraints.txt -r requirements-parity.txt
	# Its datasets alone use its torchvision, which wants a torch of its own.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  -c constraints.txt --no-deps torch-fidelity
	$(BIN)/python -m pytest tests/parity tests/convert/torch_files_test.py

test-faults: $(STAMP)
	PYTHONPATH=tests $(BIN)/python -m faults.campaign --rounds $(ROUNDS) --seed $(SEED)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

install: $(STAMP)

$(STAMP): requirements.txt requirements-dev.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) \
	and f"Python {v} is too old: 3.11 or later is needed; make PYTHON=/path/to/python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  -c constraints.txt '$(JAX)' -e '.[dev]'
	@rm -f $(VENV)/.installed-*
	@touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .ruff_cache
