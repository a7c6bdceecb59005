"""Fine-tune an encoder to tell whether a sentence is true of its pictures (files of NLVR2 or NLVR)."""

from mhmoe_vl.cli import run

if __name__ == "__main__":
    run("nlvr2", "configs/finetune/nlvr2_base.yaml", __doc__)
