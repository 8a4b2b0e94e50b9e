"""HAM10000 skin lesions with the paper's backbones (5.1): 10,015 images of 7,470 lesions, 7 diagnoses.

The data, in one folder (--config.data.path, data/ham10000 here; the images may lie in folders of any names):
  HAM10000_images_part_1/ISIC_0024306.jpg ...
  HAM10000_images_part_2/ISIC_0029306.jpg ...
  HAM10000_metadata.csv                        columns lesion_id, image_id, dx, ...

Command (vit-b-22k, vit-b-1k, swin-b-22k or swin-b-1k; the weights as `lmeraser backbone --list` names them):
  lmeraser train --config=configs/ham10000.py:vit-b-22k --config.backbone.weights=FOLDER --workdir=runs/ham10000
  lmeraser evaluate --workdir=runs/ham10000                       accuracy and balanced accuracy
  lmeraser unlearn --workdir=runs/ham10000 --owner=HAM_0000118    all images of one lesion

Several images show the same lesion. A lesion is one owner, and the test images, a fifth, are drawn by lesion, so that
none is on both sides. (The paper does not state its split.) Two thirds of the images are of one class, nv: look at the
balanced accuracy.

Expected (paper, Figure 4, its own split, after convergence): vit-b-22k 0.7946, vit-b-1k 0.7910, swin-b-22k 0.8142,
swin-b-1k 0.7872. This file has not been run in full by us: it needs the published weights and a GPU.
"""

from configs import common


def get_config(arg: str = ""):
    config = common.paper_config(arg, "configs/ham10000.py")
    config.data.source = "folder"
    config.data.path = "data/ham10000"
    config.data.train_split = "."
    config.data.labels = "data/ham10000/HAM10000_metadata.csv"
    config.data.csv_columns = "image_id,dx,lesion_id"
    config.data.split_by = "owner"
    config.data.test_share = 0.2
    config.data.augment = "paper"
    config.data.store_size = 256  # 600 x 450 at 341 x 256, the size that the 224 pixels are cropped from
    config.data.store_width = 341
    return config
