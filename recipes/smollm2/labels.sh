#!/bin/sh
# The labels of the SAEs in the package, from the pool in the package; a few minutes each on one thread.
# Usage: recipes/smollm2/labels.sh MODEL (a folder of SmolLM2-135M-Instruct, or its Hub id)
set -eu
assets=hf_neuronselect/assets
neuronselect sae label --model "$1" --sae auto --dtype bfloat16 --pool bundled:pool --tokens 300000 \
    --out $assets/saes/smollm2-135m-instruct/layers.28/labels.parquet
neuronselect sae label --pool bundled:pool --tokens 300000 --out $assets/sae/layers.3/labels.parquet
