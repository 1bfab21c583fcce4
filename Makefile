PYTHON ?= python3
BIN = .venv/bin
CIFAR10 = data/cifar-10-python.tar.gz data/cifar-10-batches-py

.PHONY: setup demo test test-slow fuzz lint matrix bench bench-gpu

setup: .venv/installed

.venv/installed: setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[demo,test,dev]'
	touch $@

# Trains on CIFAR-10 if its archive is in data/, else on scikit-learn's digits.
# A short run wants a batch norm decay of 0.9: with 0.997 the moving averages
# have not settled after a few hundred steps. Digits must not be mirrored.
demo: setup
ifneq ($(wildcard $(CIFAR10)),)
	$(BIN)/python generate_cifar10_tfrecords.py --data-dir data
	$(BIN)/python cifar10_main.py --data-dir data --job-dir demo/cifar10 \
	  --num-layers 8 --train-steps 3000 --batch-norm-decay 0.9 \
	  --lr-boundaries-epochs 5,7.5 --lr-factors 1,0.1,0.01 \
	  --save-checkpoints-steps 500 --eval-every-secs 30
else
	$(BIN)/python generate_cifar10_tfrecords.py --data-dir demo/data \
	  --source digits
	$(BIN)/python cifar10_main.py --data-dir demo/data --job-dir demo/digits \
	  --num-layers 8 --train-steps 600 --train-batch-size 64 \
	  --batch-norm-decay 0.9 --use-distortion-for-training False \
	  --lr-boundaries-epochs 15,22 --lr-factors 1,0.1,0.01 \
	  --save-checkpoints-steps 200 --eval-every-secs 5
endif
	@echo 'See it: $(BIN)/tensorboard --logdir demo'

# Two processes at once; a test file stays in one, with what it prepares.
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Not for everyone: Atheris has wheels for some platforms only.
.venv/fuzz: .venv/installed
	$(BIN)/pip install --quiet --editable '.[fuzz]'
	touch $@

test-slow: .venv/fuzz
	$(BIN)/python -m pytest -m slow

# Writes what crashes to tests/crashers/, where the tests run it ever after.
fuzz: .venv/fuzz
	$(BIN)/python tests/fuzz.py --inputs 100000 2>fuzz.log

lint: setup
	$(BIN)/ruff check .

matrix: setup
	$(BIN)/nox

# One section: .venv/bin/python benchmarks/bench.py "input alone".
bench: setup
	$(BIN)/python benchmarks/bench.py
	$(BIN)/python benchmarks/bench_cluster.py

bench-gpu: setup
	$(BIN)/python benchmarks/bench.py --gpu
