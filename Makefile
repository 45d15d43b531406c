# The commands of the README. All of them set up first; doing it again costs nothing.
PY := .venv/bin/python
# Two cores are enough for everything here; torch's threads would only fight the processes for them.
export OMP_NUM_THREADS ?= 1
# Files of tests that run at once: those that are slow wait for servers and jobs more than they compute.
test: TEST_PROCESSES ?= 2
test-slow: TEST_PROCESSES ?= 3
test-examples: TEST_PROCESSES ?= 2

# GSM8K's gsm8k_train.jsonl and gsm8k_test.jsonl (github.com/openai/grade-school-math), for `make real-model`.
DATA ?= data/gsm8k

.PHONY: setup demo teacher study controls front-loading-study real-model recurrence-demo recurrence-parent \
  recurrence-study repro-demo repro-study test test-slow test-examples check gpu-rehearsal

setup:
	@tools/setup.sh

demo: setup
	$(PY) examples/demo/run.py --output runs/demo

teacher: setup
	$(PY) examples/demo/teacher.py --output runs/teacher

study: setup
	$(PY) tools/study.py examples/demo/study.yaml --output runs/study --num-workers 2

front-loading-study: setup
	$(PY) tools/study.py examples/front_loading_demo/study.yaml --output runs/front-loading-study --num-workers 2

controls: setup
	$(PY) tools/study.py examples/tpt_controls/study.yaml --output runs/controls --num-workers 2

real-model: setup
	examples/smollm2/run.sh $(DATA) runs/smollm2

recurrence-demo: setup
	$(PY) examples/recurrence_demo/run.py --output runs/recurrence-demo

recurrence-parent: setup
	$(PY) examples/recurrence_demo/parent.py --output runs/recurrence-parent

recurrence-study: setup
	$(PY) tools/study.py examples/recurrence_demo/study.yaml --output runs/recurrence-study

repro-demo: setup
	$(PY) examples/repro_demo/repro_arms.py --output runs/repro-demo

repro-study: setup
	$(PY) tools/study.py examples/repro_demo/study.yaml --output runs/repro-study --num-workers 2

test: setup
	$(PY) -m pytest -m "not slow and not example" -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

test-slow: setup
	$(PY) -m pytest -m slow -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

test-examples: setup
	$(PY) -m pytest -m example -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

check: setup
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(dir $(PY))lint-imports

# Apart from the others, in an environment of its own: Transformer Engine is built there the first time.
gpu-rehearsal:
	@benchmarks/gpu/setup.sh
	GPU_REHEARSAL=1 $${GPU_VENV:-.venv-gpu}/bin/python -m pytest tests/gpu_rehearsal tests/platform/test_given_options.py
