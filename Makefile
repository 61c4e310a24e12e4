# Two commands: `make demo` turns a phantom's label map into a CT, `make test` checks it all.
PYTHON := .venv/bin/python
BUNDLE := bundles/abdominal_ct_mask_guided_ddpm
CONFIGS := $(BUNDLE)/configs
export OMP_NUM_THREADS ?= $(shell getconf _NPROCESSORS_ONLN)

.PHONY: demo test test-label train-demo
demo: .venv/installed
	$(PYTHON) -m common.phantom --output output/demo/phantom --train 0 --validation 1 --shape 128 128 40 --seed 20
	$(PYTHON) -m monai.bundle run --config_file "['$(CONFIGS)/inference.yaml','$(CONFIGS)/small.yaml']" \
	  --dataset_dir output/demo/phantom/labelsVa --checkpoint $(BUNDLE)/models/model_small.pt --output_dir output/demo \
	  --sampler ddpm --sampling_steps 100

test: .venv/evaluation
	$(PYTHON) -m ruff check
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist loadfile

# A MONAI Label server; its path holds sitecustomize.py.
test-label: .venv-label/installed
	OMP_NUM_THREADS=1 PYTHONPATH=tests/label .venv-label/bin/python -m pytest tests/label

# How models/model_small.pt was made, in about 75 minutes on one core. The first stage has one channel in each group of
# its norms, which can't see how bright a slice is; the second goes on with four, as small.yaml has it.
SMALL := "['$(CONFIGS)/train.yaml','$(CONFIGS)/small.yaml']" --dataset_dir output/phantom
train-demo: .venv/installed
	$(PYTHON) -m common.phantom --output output/phantom --train 60 --validation 4 --shape 128 128 40 --seed 0
	$(PYTHON) -m monai.bundle run training --config_file $(SMALL) --output_dir output/demo_stage_1 \
	  --iterations 3250 --network_def#norm_num_groups 32 --ema_momentum 2.0e-3
	$(PYTHON) -m monai.bundle run training --config_file $(SMALL) --output_dir output/demo_stage_2 \
	  --iterations 1100 --checkpoint output/demo_stage_1/model.pt --learning_rate 2.0e-4
	$(PYTHON) -m common.bundle output/demo_stage_2/model.pt $(BUNDLE)/models/model_small.pt

.venv/installed: setup.cfg constraints.txt
	python3 -m venv .venv
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

# TotalSegmentator and what it needs: another 1.2 GB, which the demo does without.
.venv/evaluation: .venv/installed
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --editable '.[test,evaluation]'
	touch $@

# MONAI Label, whose pins exclude most of constraints.txt; the torch is the same.
.venv-label/installed: setup.cfg
	python3 -m venv .venv-label
	.venv-label/bin/python -m pip install --quiet --editable '.[label]' pytest $$(grep ^torch== constraints.txt)
	touch $@
