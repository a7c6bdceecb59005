"""Fine-tune an encoder on visual question answering (VQA v2's files) and answer a test split."""

from mhmoe_vl.cli import run

if __name__ == "__main__":
    run("vqa", "configs/finetune/vqa_base.yaml", __doc__)
