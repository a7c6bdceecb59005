"""Fine-tune an encoder to classify pictures (class folders or shards, as of ImageNet)."""

from mhmoe_vl.cli import run

if __name__ == "__main__":
    run("imagenet", "configs/finetune/imagenet_base.yaml", __doc__)
