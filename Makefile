# The common commands by name. Each is one line that you can also type.
.PHONY: install test lint docs browser pack checkpoint saliency

DATA ?= ../shared/data
TEACHER ?= ../shared/weights/vit-small-patch14-teacher

install:
	pip install -c constraints.txt -e ".[train,dev]"

test:
	pytest -q -n 2 --dist loadfile -m "not gpu"

lint:
	ruff check && ruff format --check

# The site in site/, from the documents and docstrings: pip install -c constraints.txt -e ".[docs]"
docs:
	mkdocs build --strict

# The page in build/browser that runs the bundled checkpoint in a browser; its tests open it, and `make docs` puts it in site/.
browser:
	efficientsam export-browser bundled build/browser

# Trains the bundled checkpoint anew and puts it in place, with its numbers, on images whose terms allow it. Each stage
# resumes if it was stopped. COCO weighs four times; thresholds are chosen by what they find in examples/. OPTIONS go to every
# training: with a few images, `make checkpoint DATA=few OPTIONS="--steps 2 --warmup_steps 1"` tries all stages in minutes.
CLEARED = runs/cleared/instances.json
COCO = $(DATA)/coco-train/instances_train.json
MASKS = --train $(CLEARED) $(DATA)/extra-seg/instances_train.json $(COCO) $(COCO) $(COCO) $(COCO)
THRESHOLDS = --pred_iou_thresh 0.3 --stability_score_thresh 0.5 --stability_score_offset 1
$(CLEARED):
	python training/filter_annotations.py --annotations $(DATA)/train-seg/instances_train.json --output $@ \
	  --sources clothing-co-parsing oxford-iiit-pet feral-cat building-facade
# Images and masks for training on another machine, and those to measure on: 80 MB in files of 4 MiB.
pack: $(CLEARED)
	python training/pack_masks.py --output_dir runs/pack --size 512 \
	  --annotations $(CLEARED) $(DATA)/extra-seg/instances_train.json $(COCO)
	python training/pack_masks.py --output_dir runs/pack --annotations $(DATA)/coco-val-dev/instances_val.json
checkpoint: $(CLEARED) runs/salient/instances.json
	accelerate launch training/finetune_masks.py --config training/recipes/bundled/s_512_1_frozen_encoder.yaml $(MASKS) \
	  --select_weights $(TEACHER) --output_dir runs/s_512_1 $(OPTIONS)
	accelerate launch --mixed_precision bf16 training/finetune_masks.py --config training/recipes/bundled/s_512_2_last_layers.yaml $(MASKS) \
	  --model runs/s_512_1/model --output_dir runs/s_512_2 $(OPTIONS)
	accelerate launch --mixed_precision bf16 training/finetune_masks.py --config training/recipes/bundled/s_512_3_six_layers.yaml $(MASKS) \
	  --model runs/s_512_2/model --output_dir runs/s_512_3 $(OPTIONS)
	accelerate launch --mixed_precision bf16 training/finetune_masks.py --config training/recipes/bundled/s_512_3_six_layers.yaml $(MASKS) \
	  --model runs/s_512_3/model --learning_rate 3e-4 --steps 3000 --output_dir runs/s_512_4 $(OPTIONS)
	python training/average_models.py --models runs/s_512_3/model runs/s_512_4/model --output_dir runs/s_512_4_average
	accelerate launch --mixed_precision bf16 training/finetune_masks.py --config training/recipes/bundled/s_640_5_six_layers.yaml $(MASKS) \
	  --model runs/s_512_4_average --output_dir runs/s_640_5 $(OPTIONS)
	python training/average_models.py --models runs/s_512_3/model runs/s_512_4/model runs/s_640_5/model --output_dir runs/s_512_5_average
	accelerate launch --mixed_precision bf16 training/finetune_masks.py --config training/recipes/bundled/s_512_6_random_crops.yaml $(MASKS) \
	  --model runs/s_512_5_average --output_dir runs/s_512_6 $(OPTIONS)
	accelerate launch --mixed_precision bf16 training/finetune_masks.py --config training/recipes/bundled/s_512_7_threshold.yaml $(MASKS) \
	  --model runs/s_512_5_average --cache_dir runs/s_512_3/embeddings --output_dir runs/s_512_7 $(OPTIONS)
	python training/average_models.py --models runs/s_512_6/model runs/s_512_7/model --output_dir runs/s_512
	accelerate launch training/train_saliency.py --config training/recipes/bundled/8_saliency.yaml --model runs/s_512 \
	  $(SALIENCY) --output_dir runs/saliency $(OPTIONS)
	python training/bundle_checkpoint.py --model runs/s_512 --saliency runs/saliency/model $(THRESHOLDS) \
	  --annotations $(DATA)/coco-val-dev/instances_val.json --salient $(DATA)/saliency \
	  --curves runs/s_512_1 runs/s_512_2 runs/s_512_3 runs/s_512_4 runs/s_640_5 runs/s_512_6 runs/saliency

# Only a new saliency head for the checkpoint that is there.
SALIENCY = --train runs/salient/instances.json --val $(DATA)/saliency/val
runs/salient/instances.json:
	python training/filter_annotations.py --annotations $(DATA)/train-seg/instances_train.json --output $@ \
	  --sources clothing-co-parsing oxford-iiit-pet feral-cat --limit 300
saliency: runs/salient/instances.json
	accelerate launch training/train_saliency.py --config training/recipes/bundled/8_saliency.yaml $(SALIENCY) \
	  --output_dir runs/new_head/saliency
	python training/bundle_checkpoint.py --saliency runs/new_head/saliency/model --salient $(DATA)/saliency \
	  --curves runs/new_head/saliency
