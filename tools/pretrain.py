"""Pre-train a multiway encoder by masked prediction on images, texts and image-text pairs."""

from mhmoe_vl.cli import run

if __name__ == "__main__":
    run("masked_modeling", "configs/pretrain/scenes_tiny.yaml", __doc__)
