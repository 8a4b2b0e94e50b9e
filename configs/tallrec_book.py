"""TALLRec's books (Bao et al., 2023; BookCrossing): will a reader like the next book, Yes. or No.?

Weights and data are not part of the project (configs/common.py). Of TALLRec two files:
  lmeraser prepare --pack=tallrec --path=book_valid.jsonl.gz --path=book_test.jsonl.gz --out=data/tallrec_book.jsonl

Command (the argument smollm2 takes SmolLM2-135M-Instruct, for a GPU, in place of TinyStories-656k):
  lmeraser train --config=configs/tallrec_book.py --workdir=runs/tallrec
  lmeraser train --config=configs/tallrec_book.py:smollm2 --workdir=runs/tallrec-smollm2
  lmeraser compare --config=configs/tallrec_book.py --owners=160 --owner_records=1 --forget=10% \\
    --methods=base,retrain,exact-clusters,newton,warm --config.text.context=448 --config.text.long=refuse \\
    --config.data.test_limit=600 --config.clustering.sample_size=100 --config.tuning.lora_rate=1e-2 \\
    --config.tuning.epochs=10 --workdir=runs/tallrec-compared    (AUC of yes against no; docs/language.md)

Records have no owner: they are clustered by their queries.
"""

from configs import common


def get_config(arg: str = ""):
    return common.recommender_config(arg, "tallrec_book.jsonl", "configs/tallrec_book.py")
