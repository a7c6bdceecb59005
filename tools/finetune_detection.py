"""Fine-tune an encoder to detect objects and draw their masks (COCO's instances files), ViTDet's way."""

from mhmoe_vl.cli import run

if __name__ == "__main__":
    run("detection", "configs/finetune/detection_base.yaml", __doc__)
