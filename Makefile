# The common commands by name. Each is one line that you can also type.
.PHONY: install test lint docs checkpoint saliency

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

# Trains the bundled checkpoint anew and puts it in place, with its numbers. Each stage resumes if it was stopped.
COCO = $(DATA)/coco-train/instances_train.json
MASKS = --train $(DATA)/train-seg/instances_train.json $(COCO) $(COCO)
checkpoint: runs/salient/instances.json
	accelerate launch training/sami.py --config training/recipes/bundled/0_encoder.yaml --teacher $(TEACHER) --output_dir runs/encoder \
	  --images $(DATA)/train-seg/images $(DATA)/coco-train/images $(DATA)/unlabelled/images $(DATA)/saliency/train/images
	accelerate launch training/finetune_masks.py --config training/recipes/bundled/1_ellipses.yaml $(MASKS) \
	  --encoder runs/encoder/model --output_dir runs/geometry
	accelerate launch training/finetune_masks.py --config training/recipes/bundled/2_at_256.yaml $(MASKS) \
	  --model runs/geometry/model --output_dir runs/at_256
	accelerate launch training/finetune_masks.py --config training/recipes/bundled/3_masks.yaml $(MASKS) \
	  --model runs/at_256/model --output_dir runs/masks
	accelerate launch training/finetune_masks.py --config training/recipes/bundled/4_decoder_at_512.yaml $(MASKS) $(COCO) \
	  --model runs/masks/model --output_dir runs/decoder_at_512
	accelerate launch training/finetune_masks.py --config training/recipes/bundled/5_small_objects.yaml $(MASKS) $(COCO) \
	  --model runs/decoder_at_512/model --output_dir runs/small_objects
	accelerate launch training/train_saliency.py --config training/recipes/bundled/6_saliency.yaml --model runs/small_objects/model \
	  $(SALIENCY) --output_dir runs/saliency
	python training/bundle_checkpoint.py --model runs/small_objects/model --saliency runs/saliency/model \
	  --annotations $(DATA)/coco-val-dev/instances_val.json --salient $(DATA)/saliency \
	  --curves runs/encoder runs/geometry runs/at_256 runs/masks runs/decoder_at_512 runs/small_objects runs/saliency

# Only a new saliency head for the checkpoint that is there.
SALIENCY = --train runs/salient/instances.json --val $(DATA)/saliency/val
runs/salient/instances.json:
	python training/filter_annotations.py --annotations $(DATA)/train-seg/instances_train.json --output $@ \
	  --sources clothing-co-parsing oxford-iiit-pet feral-cat --limit 300
saliency: runs/salient/instances.json
	accelerate launch training/train_saliency.py --config training/recipes/bundled/6_saliency.yaml $(SALIENCY) \
	  --output_dir runs/new_head/saliency
	python training/bundle_checkpoint.py --saliency runs/new_head/saliency/model --salient $(DATA)/saliency \
	  --curves runs/new_head/saliency
