"""Train the visual tokenizer (VQ-KD) whose codes are the targets of masked image modelling."""

from mhmoe_vl.cli import run

if __name__ == "__main__":
    run("visual_tokenizer", "configs/visual_tokenizer/scenes_tiny.yaml", __doc__)
