"""MovieLens latest-small (Harper and Konstan, 2015): which of 20 films does a user watch next?

Weights and data are not part of the project (configs/common.py). The folder has movies.csv and ratings.csv:
  lmeraser prepare --pack=movielens --path=ml-latest-small --out=data/movielens.jsonl

Command (the argument smollm2 takes SmolLM2-135M-Instruct, for a GPU, in place of TinyStories-656k):
  lmeraser train --config=configs/movielens.py --workdir=runs/movielens
  lmeraser unlearn --workdir=runs/movielens --owner=17
  lmeraser train --config=configs/movielens.py:smollm2 --workdir=runs/movielens-smollm2
  lmeraser compare --config=configs/movielens.py --owners=40 --owner_records=4 --forget=10% \\
    --methods=base,retrain,exact-clusters,exact-owners,newton,warm --config.text.context=448 \\
    --config.text.long=refuse --config.data.test_limit=120 --config.clustering.sample_size=60 \\
    --config.tuning.lora_rate=1e-2 --workdir=runs/movielens-compared    (hit ratio at 1; docs/language.md)

The last film of each user is a test record, the four before it are private ones: too few for a slice of each user, so
records are clustered by their queries.
"""

from configs import common


def get_config(arg: str = ""):
    return common.recommender_config(arg, "movielens.jsonl", "configs/movielens.py")
