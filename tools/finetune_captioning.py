"""Fine-tune an encoder to write captions (files of COCO, Karpathy's split, or Flickr8k)."""

from mhmoe_vl.cli import run

if __name__ == "__main__":
    run("captioning", "configs/finetune/captioning_base.yaml", __doc__)
