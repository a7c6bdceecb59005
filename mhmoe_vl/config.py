"""The typed configuration: what every YAML file and ``--section.field value`` may say.

One model per class that it configures, in the field names of that class's constructor. Files are
merged left to right over the defaults, dotted overrides come last, unknown keys are errors. This
module never imports torch, so that ``--help`` answers at once.
"""

from __future__ import annotations

import difflib
import functools
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import pydantic
import yaml
from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt

from .errors import ConfigError, one_line

Fraction = Annotated[float, Field(ge=0, le=1)]
Pair = Annotated[tuple[PositiveInt, PositiveInt], Field(strict=False)]  # YAML has lists only
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Section(pydantic.BaseModel):
    """A part of the configuration; unknown keys are refused and values are not changed later."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, frozen=True, allow_inf_nan=False, strict=True
    )


# ------------------------------------------------------------------------------- feed-forward layers
class LinearRouterConfig(Section):
    kind: Literal["linear"] = "linear"
    gate: Literal["softmax", "sigmoid"] = "softmax"
    """how logits become gates"""


class CosineRouterConfig(Section):
    kind: Literal["cosine"] = "cosine"
    gate: Literal["softmax", "sigmoid"] = "softmax"
    """how logits become gates"""
    dim: PositiveInt = 16
    """width in which rows and experts are compared"""
    initial_temperature: PositiveFloat | None = None
    """divides the cosines; none means 0.3 for softmax and 0.07 for sigmoid"""
    learned_temperature: bool = True
    """train the temperature; the balance loss always uses the initial one"""
    normalize_rows: bool = True
    """L2-normalise the projected rows too; off (with a fixed temperature of 1) is the released MH-MoE code's form"""


RouterConfig = Annotated[LinearRouterConfig | CosineRouterConfig, Field(discriminator="kind")]


class DenseConfig(Section):
    kind: Literal["dense"] = "dense"
    hidden_dim: PositiveInt | Literal["parity"] | None = None
    """inner width; none means 4 times the token width"""
    activation: Literal["gelu", "relu", "swiglu"] = "gelu"
    """between the two matrices; swiglu has a third one"""
    bias: bool = True
    """biases on the matrices"""
    sub_ln: bool = False
    """LayerNorm over the inner width before the second matrix (Magneto, BEiT-3)"""


class MoEConfig(Section):
    kind: Literal["moe"] = "moe"
    num_experts: PositiveInt | Literal["parity"] = 8
    """experts to choose from"""
    hidden_dim: PositiveInt | Literal["parity"] | None = None
    """inner width of an expert; none means 4 times the token width"""
    top_k: PositiveInt = 1
    """experts chosen per routed row"""
    activation: Literal["gelu", "relu", "swiglu"] = "gelu"
    """inside an expert; swiglu has a third matrix"""
    bias: bool = True
    """biases on the experts' matrices"""
    router: RouterConfig = LinearRouterConfig()
    normalize_gates: bool = True
    """divide the gates of the chosen experts by their sum (never done for top_k = 1)"""
    num_shared_experts: int = Field(0, ge=0)
    """experts that every token passes, beside the routed ones"""
    shared_hidden_dim: PositiveInt | None = None
    """inner width of a shared expert; none means hidden_dim"""
    capacity_factor: PositiveFloat | None = None
    """rows an expert takes at most in training, over the even share; none drops nothing"""
    balance_share: Literal["first", "all"] = "first"
    """which choices the balance loss counts: the first of each row, or all top_k divided by k"""
    balance_per_modality: bool = False
    """form the balance loss for images and texts apart and average the two"""
    balance_bias_rate: NonNegativeFloat = 0.0
    """step of bias-based balancing without an auxiliary loss; 0 is off"""


class MHMoEConfig(MoEConfig):
    kind: Literal["mh_moe"] = "mh_moe"
    top_k: PositiveInt = 2
    """experts chosen per sub-token"""
    num_subtokens: PositiveInt = 4
    """pieces every token is cut into (the papers' h)"""
    head_layers: int = Field(1, ge=0, le=3)
    """linear layers before the split, ReLU between them"""
    merge_layers: int = Field(1, ge=0, le=3)
    """linear layers after the merge, ReLU between them"""
    subtoken_residual: bool = False
    """add each sub-token to its experts' sum inside the layer (paper 1's equation)"""
    conv_kernel: PositiveInt | None = None
    """head and merge by Conv1d over the token axis with this kernel instead of linear layers (ablation)"""
    conv_stride: PositiveInt = 1
    """stride of that Conv1d"""


FFNConfig = Annotated[DenseConfig | MoEConfig | MHMoEConfig, Field(discriminator="kind")]


class ParityConfig(Section):
    """The baseline that ``hidden_dim: parity`` and ``num_experts: parity`` are solved against."""

    kind: Literal["moe"] = "moe"
    num_experts: PositiveInt = 8
    """experts of the baseline"""
    hidden_dim: PositiveInt | None = None
    """inner width of a baseline expert; none means 4 times the token width"""
    top_k: PositiveInt = 1
    """experts chosen per token in the baseline"""
    activation: Literal["gelu", "relu", "swiglu"] = "gelu"
    """inside an expert of the baseline"""
    bias: bool = True
    """biases on the baseline's matrices"""
    num_shared_experts: int = Field(0, ge=0)
    """experts that every token passes in the baseline; give them to ``ffn`` too"""
    shared_hidden_dim: PositiveInt | None = None
    """inner width of a shared expert; none means hidden_dim"""
    rule: Literal["flops_and_parameters", "parameters"] = "flops_and_parameters"
    """paper 2's rule (equal FLOPs, then equal parameters) or paper 1's (equal parameters through the width alone)"""


# ------------------------------------------------------------------------------------------- encoder
class EncoderConfig(Section):
    embed_dim: PositiveInt = 192
    """token width"""
    depth: PositiveInt = 6
    """blocks"""
    num_heads: PositiveInt = 3
    """attention heads"""
    img_size: PositiveInt | Pair = 224
    """pixels, or (height, width)"""
    patch_size: PositiveInt = 16
    """side of a patch in pixels"""
    vocab_size: PositiveInt = 64010
    """rows of the text embedding"""
    max_text_len: PositiveInt = 1022
    """text positions"""
    modalities: Annotated[tuple[Literal["image", "text"], ...], Field(strict=False, min_length=1)] = ("image", "text")
    """branches to build"""
    multiway: Literal["decoupled", "shared_attention", "shared"] = "decoupled"
    """decoupled: everything per modality; shared_attention: FFN per modality; shared: one set of weights"""
    vl_ffn_layers: int = Field(0, ge=0)
    """top layers with one more FFN for pairs (multiway: shared_attention)"""
    ffn: FFNConfig = DenseConfig(sub_ln=True)
    """the feed-forward layer under study"""
    dense_ffn: DenseConfig = DenseConfig(sub_ln=True)
    """the feed-forward layer of the blocks without experts"""
    moe_every: PositiveInt = 2
    """every n-th block carries ``ffn`` when it is sparse"""
    expert_pool: Literal["joint", "per_modality"] = "joint"
    """one pool of experts for both modalities, or one each"""
    attention_sub_ln: bool = True
    """LayerNorm before the attention's output projection (Magneto)"""
    drop_path: Fraction = 0.0
    """largest rate, growing linearly with depth"""
    dropout: Fraction = 0.0
    """on embeddings and on the output of attention and feed-forward layers"""
    final_norm: bool = True
    """LayerNorm after the last block"""
    norm_eps: PositiveFloat = 1e-5
    """epsilon of every LayerNorm"""
    grad_checkpointing: bool = False
    """recompute activations in the backward pass to save memory"""


# ---------------------------------------------------------------------------------------------- data
class StreamConfig(Section):
    train: str | list[str]
    """shards to train on: folder, tar file, brace pattern or http(s) address, or a list of them"""
    val: str | list[str] | None = None
    """shards for validation"""
    batch_size: PositiveInt = 16
    """samples per optimizer step, over all ranks and accumulated parts"""


class BPEConfig(Section):
    """open_clip's bundled byte-pair encoding, with a mask and a padding piece appended."""

    kind: Literal["bpe"] = "bpe"


class SentencePieceConfig(Section):
    kind: Literal["sentencepiece"] = "sentencepiece"
    path: str
    """a .spm or .model file; ids follow BEiT-3's convention"""


TextTokenizerConfig = Annotated[BPEConfig | SentencePieceConfig, Field(discriminator="kind")]


class CropConfig(Section):
    min_crop: Annotated[float, Field(gt=0, le=1)] = 0.2
    """smallest share of the picture that a random crop keeps"""
    flip: Fraction = 0.5
    """probability of a horizontal flip; set 0 where captions say left and right"""
    color_jitter: NonNegativeFloat = 0.4
    """strength of the brightness, contrast and saturation changes"""


class AugmentConfig(CropConfig):
    rand_augment_ops: int = Field(0, ge=0)
    """operations of RandAugment per picture; 0 is off, BEiT-3 takes 2"""
    rand_augment_magnitude: Annotated[float, Field(ge=0, le=10)] = 7.0
    """strength of those operations"""


class PolicyConfig(CropConfig):
    policy: str | None = None
    """a RandAugment of timm, such as rand-m9-mstd0.5-inc1"""
    erase_prob: Fraction = 0.0
    """probability of erasing a box of the picture with noise"""


# --------------------------------------------------------------------------------------------- tasks
class MaskedModelingConfig(Section):
    """Masked prediction on images, texts and pairs (BEiT-3's objective)."""

    kind: Literal["masked_modeling"] = "masked_modeling"
    visual_tokenizer: str | None = None
    """run folder or checkpoint of the visual tokenizer; needed when a stream has images"""
    data_dir: str = "."
    """folder that relative shard paths start from"""
    images: StreamConfig | None = None
    texts: StreamConfig | None = None
    pairs: StreamConfig | None = None
    text_tokenizer: TextTokenizerConfig = BPEConfig()
    augment: AugmentConfig = AugmentConfig()
    image_mask_ratio: Fraction = 0.4
    """share of patches masked, block-wise"""
    text_mask_ratio: Fraction = 0.15
    """share of text tokens masked in texts"""
    pair_text_mask_ratio: Fraction = 0.5
    """share of text tokens masked in pairs"""
    min_mask_block: PositiveInt = 16
    """smallest block of masked patches on a 14 x 14 grid; scaled with the grid's area"""
    unigram_samples: PositiveInt = 5000
    """training samples per stream that the unigram baseline counts"""


class PixelTeacherConfig(Section):
    """The patch's own pixels in [-1, 1]; needs no other model (mean squared error)."""

    kind: Literal["pixels"] = "pixels"


class OpenClipTeacherConfig(Section):
    """Patch features of an open_clip image tower (cosine loss)."""

    kind: Literal["open_clip"] = "open_clip"
    model: str = "ViT-B-16"
    """open_clip's name of the model"""
    pretrained: str | None = None
    """open_clip tag or local checkpoint; none means random weights"""


TeacherConfig = Annotated[PixelTeacherConfig | OpenClipTeacherConfig, Field(discriminator="kind")]


class VisualTokenizerConfig(Section):
    """VQ-KD: ViT encoder, l2-normalised codebook, ViT decoder."""

    img_size: PositiveInt = 224
    """side of the square picture in pixels"""
    patch_size: PositiveInt = 16
    """side of a patch in pixels"""
    embed_dim: PositiveInt = 768
    """width of the encoder"""
    depth: PositiveInt = 12
    """blocks of the encoder"""
    num_heads: PositiveInt = 12
    """attention heads of the encoder"""
    decoder_embed_dim: PositiveInt = 768
    """width of the decoder"""
    decoder_depth: PositiveInt = 3
    """blocks of the decoder"""
    decoder_num_heads: PositiveInt = 12
    """attention heads of the decoder"""
    num_codes: PositiveInt = 8192
    """entries of the codebook"""
    code_dim: PositiveInt = 32
    """width of a code"""
    target_dim: PositiveInt = 768
    """width of the teacher's features (3 * patch_size**2 for pixels)"""
    ema_decay: Fraction = 0.99
    """of the codebook's moving averages"""
    commitment_weight: NonNegativeFloat = 1.0
    """factor of the commitment loss"""
    revive_after: int = Field(100, ge=0)
    """training steps without use after which a code is re-seeded from the batch; 0 never"""


class VisualTokenizerTaskConfig(Section):
    """Training of the visual tokenizer by distillation."""

    kind: Literal["visual_tokenizer"] = "visual_tokenizer"
    model: VisualTokenizerConfig = VisualTokenizerConfig()
    teacher: TeacherConfig = PixelTeacherConfig()
    data_dir: str = "."
    """folder that relative shard paths start from"""
    images: StreamConfig
    augment: AugmentConfig = AugmentConfig(min_crop=0.08, color_jitter=0.0)


class VQAFilesConfig(Section):
    """Official files of a split; several of each in the same order."""

    questions: str | list[str]
    """questions JSON"""
    annotations: str | list[str] | None = None
    """annotations JSON; none for a test split"""
    images: str | list[str]
    """folders of pictures by COCO's file names"""


class AnnotatedFilesConfig(Section):
    """An annotation file of a split and its pictures."""

    annotations: str
    """the official file"""
    images: str | list[str]
    """folders of pictures by their official names"""


class AnnotatedTaskConfig(Section):
    """What the tasks on annotation files share; val and test are optional sections like train."""

    data_dir: str = "."
    """folder that relative paths start from"""
    train: AnnotatedFilesConfig
    val: AnnotatedFilesConfig | None = None
    test: AnnotatedFilesConfig | None = None
    batch_size: PositiveInt
    """examples per optimizer step, over all ranks and accumulated parts"""


class PairTaskConfig(AnnotatedTaskConfig):
    """What the tasks on pictures with texts share."""

    max_text_len: Annotated[int, Field(ge=3)] = 64
    """tokens of a text, begin and end included; the rest is cut off"""
    text_tokenizer: TextTokenizerConfig = BPEConfig()
    augment: AugmentConfig = AugmentConfig(min_crop=0.5, color_jitter=0.0)


class VQAConfig(PairTaskConfig):
    """Visual question answering on VQA v2's files."""

    kind: Literal["vqa"] = "vqa"
    train: VQAFilesConfig
    val: VQAFilesConfig | None = None
    test: VQAFilesConfig | None = None
    val_images: PositiveInt = 1000
    """pictures of train whose questions validate instead, drawn by seed, while val is not set"""
    answers: str | None = None
    """list of answers (JSON list, answer2label.txt, or answers.json of a run); none builds it from train and val"""
    min_answer_count: PositiveInt = 9
    """occurrences that an answer needs to be listed"""
    batch_size: PositiveInt = 128
    """questions per optimizer step, over all ranks and accumulated parts"""


class NLVR2Config(PairTaskConfig):
    """Truth of sentences about pictures, on the files of NLVR2 or NLVR."""

    kind: Literal["nlvr2"] = "nlvr2"
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """share of the sentences of train that validate instead, drawn by seed, while val is not set"""
    pictures: Literal["pair", "boxes", "whole"] = "pair"
    """NLVR2's two pictures; of NLVR (v1) the three boxes of the drawn picture, or the whole"""
    batch_size: PositiveInt = 256
    """examples per optimizer step, over all ranks and accumulated parts"""


class CaptioningConfig(PairTaskConfig):
    """Captions of pictures, on the files of COCO, Karpathy's split, or Flickr8k."""

    kind: Literal["captioning"] = "captioning"
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """share of the pictures of train that validate, drawn by seed, while neither val nor the file itself says which"""
    batch_size: PositiveInt = 256
    """captions per optimizer step, over all ranks and accumulated parts"""
    max_text_len: Annotated[int, Field(ge=3)] = 32
    """tokens of a caption, begin and end included, in training and in generation"""
    mask_ratio: Annotated[float, Field(gt=0, le=1)] = 0.7
    """share of a caption's tokens that is hidden"""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """probability spread over all tokens in the targets"""
    drop_worst_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """share of the hidden tokens, those of the largest loss, that the loss leaves out"""
    drop_worst_after: int = Field(0, ge=0)
    """step from which it does"""
    num_beams: PositiveInt = 3
    """unfinished captions followed up per picture; 1 is greedy"""
    length_penalty: NonNegativeFloat = 0.6
    """power of the length that a caption's log-probability is divided by"""


class ImageNetConfig(Section):
    """Classification of pictures in class folders (ImageFolder) or in shards with a cls member."""

    kind: Literal["imagenet"] = "imagenet"
    data_dir: str = "."
    """folder that relative paths start from"""
    train: str | list[str] = "train"
    """folder of class folders, or shards: folder, tar file, brace pattern or http(s) address, or a list of them"""
    val: str | list[str] | None = None
    """the same for validation"""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """share of the pictures of train that validate instead, drawn by seed, while val is not set"""
    classes: str | PositiveInt | None = None
    """list of class names (JSON list, or one a line) or, for shards, their number; none takes train's folders sorted"""
    batch_size: PositiveInt = 1024
    """pictures per optimizer step, over all ranks and accumulated parts"""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """probability spread over all classes in the targets"""
    mixup: NonNegativeFloat = 0.0
    """alpha of Mixup; 0 is off"""
    cutmix: NonNegativeFloat = 0.0
    """alpha of CutMix; 0 is off"""
    mix_prob: Fraction = 1.0
    """probability that a step is mixed, where either is on"""
    mix_switch_prob: Fraction = 0.5
    """probability of CutMix instead of Mixup, where both are on"""
    test_size: PositiveInt | Pair | None = None
    """pixels, or (height, width), of pictures in evaluation; none means encoder.img_size"""
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 1.0
    """side of the centred crop in evaluation, over that of the largest one"""
    mean: Annotated[tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat], Field(strict=False)] = (0.5, 0.5, 0.5)
    """taken off red, green and blue of 0 to 1"""
    std: Annotated[tuple[PositiveFloat, PositiveFloat, PositiveFloat], Field(strict=False)] = (0.5, 0.5, 0.5)
    """that they are divided by then"""
    augment: PolicyConfig = PolicyConfig(min_crop=0.08, color_jitter=0.0)


class ScaleJitterConfig(Section):
    min_scale: PositiveFloat = 0.1
    """smallest size of a training picture, relative to the one that just fits into encoder.img_size"""
    max_scale: PositiveFloat = 2.0
    """largest such size; what does not fit is cut off at random"""
    flip: Fraction = 0.5
    """probability of a horizontal flip"""


class DetectorConfig(Section):
    """Pyramid, region proposals, box and mask heads; the defaults are ViTDet's."""

    dim: PositiveInt = 256
    """width of pyramid and heads"""
    masks: bool = True
    """predict masks too (Mask R-CNN); else boxes alone (Faster R-CNN)"""
    cascade: bool = False
    """refine boxes in three stages (Cascade R-CNN)"""
    anchor_scale: PositiveInt = 8
    """side of a square anchor in strides of its level: 8 for objects of 32 px on, less for smaller ones"""
    proposal_convs: PositiveInt = 2
    """hidden convolutions before region proposals"""
    box_convs: int = Field(4, ge=0)
    """hidden convolutions of the box head"""
    box_fc_dim: PositiveInt = 1024
    """width of the linear layer after them"""
    mask_convs: PositiveInt = 4
    """hidden convolutions of the mask head"""
    num_proposals: PositiveInt = 1000
    """most proposals per picture"""
    proposal_samples: PositiveInt = 256
    """anchors per picture that the losses of proposals are computed on"""
    roi_samples: PositiveInt = 512
    """proposals per picture that the losses of the heads are computed on"""
    score_threshold: Fraction = 0.05
    """lowest score of a detection"""
    nms_threshold: Fraction = 0.5
    """overlap (IoU) from which the lower of two detections of a class is left out"""
    max_detections: PositiveInt = 100
    """most detections per picture"""


class DetectionConfig(AnnotatedTaskConfig):
    """Object detection and instance segmentation on COCO's instances files (ViTDet)."""

    kind: Literal["detection"] = "detection"
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """share of the pictures of train that validate instead, drawn by seed, while val is not set"""
    batch_size: PositiveInt = 64
    """pictures per optimizer step, over all ranks and accumulated parts"""
    augment: ScaleJitterConfig = ScaleJitterConfig()
    window_size: PositiveInt | None = None
    """patches to a side of the windows that blocks attend in (ViTDet: 14); none lets every block see the whole map"""
    num_global_blocks: PositiveInt = 4
    """evenly spaced blocks that see the whole map all the same"""
    detector: DetectorConfig = DetectorConfig()


TaskConfig = Annotated[
    MaskedModelingConfig
    | VisualTokenizerTaskConfig
    | VQAConfig
    | NLVR2Config
    | CaptioningConfig
    | ImageNetConfig
    | DetectionConfig,
    Field(discriminator="kind"),
]


# -------------------------------------------------------------------------------------------- engine
class OptimConfig(Section):
    lr: PositiveFloat = 1e-3
    """peak learning rate"""
    min_lr: NonNegativeFloat = 1e-6
    """learning rate at the last step"""
    warmup_steps: int = Field(0, ge=0)
    """steps of linear growth from 0 to the peak"""
    schedule: Literal["cosine", "linear", "steps"] = "cosine"
    """decay after the warm-up: down to min_lr at the last step, or to a tenth at 8/9 and a hundredth at 26/27 of all"""
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.98)
    """AdamW's decay rates of the two moments"""
    eps: PositiveFloat = 1e-6
    """AdamW's epsilon"""
    weight_decay: NonNegativeFloat = 0.05
    """AdamW's, on matrices only"""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """learning rate factor from each block to the one below it"""
    head_lr_factor: PositiveFloat = 1.0
    """learning rate factor of the model's ``head`` (not its pooler), times its layer's (BEiT-3's VQA head: 20)"""
    clip_grad: PositiveFloat | None = 3.0
    """largest norm of all gradients together"""
    balance_loss_weight: NonNegativeFloat = 0.01
    """factor of the balance loss, mean over layers of experts"""
    z_loss_weight: NonNegativeFloat = 0.0
    """factor of the router z-loss, mean over layers of experts"""


class TrainConfig(Section):
    steps: PositiveInt = 1000
    """optimizer steps"""
    accumulate: PositiveInt = 1
    """parts that each batch is split into, one after the other, to save memory"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """bfloat16 autocast; auto uses it where the processor has it"""
    device: str = "auto"
    """cpu, cuda, cuda:1, or auto"""
    threads: int = Field(0, ge=0)
    """processor threads per rank; 0 leaves torch's choice"""
    num_workers: int = Field(1, ge=0)
    """processes that prepare data; the result does not depend on it"""
    log_every: PositiveInt = 10
    """steps between log lines"""
    eval_every: int = Field(0, ge=0)
    """steps between evaluations; 0 evaluates at the end only (and before the first step)"""
    save_every: int = Field(0, ge=0)
    """steps between checkpoints; 0 saves at the end and when stopped"""
    keep_steps: bool = False
    """keep every saved step as checkpoints/step-..., not only last and best"""
    resume: str = "auto"
    """auto continues the run in output_dir, never starts anew and refuses a used folder"""
    ema_decay: Fraction = 0.0
    """moving average of the weights, evaluated instead of them; 0 is off"""
    tensorboard: bool = False
    """write TensorBoard events too (extra: track)"""
    compile: bool = False
    """torch.compile the model"""
    max_bad_fraction: Fraction = 0.01
    """share of unreadable training samples above which the run stops"""


class RunConfig(Section):
    """One run of a training tool: an encoder, a task, an optimizer, the loop."""

    output_dir: str = "out/run"
    """run folder"""
    seed: int = Field(0, ge=0)
    """of weights, data order, crops and masks"""
    init_from: str | None = None
    """run folder or checkpoint whose encoder the training starts from"""
    parity: ParityConfig | None = None
    """baseline for ``parity`` values in encoder.ffn"""
    encoder: EncoderConfig | None = None
    task: TaskConfig
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()


def run_config(kind: str) -> type[RunConfig]:
    """:class:`RunConfig` with the one kind of task that a tool trains."""
    [task] = [v for v in variants(TaskConfig) if v.model_fields["kind"].default == kind]
    return pydantic.create_model("RunConfig", __base__=RunConfig, task=(task, RunConfig.model_fields["task"]))


# ------------------------------------------------------------------------------------------- loading
MAX_CHARACTERS = 100_000
"""Most characters of a configuration file; parsing YAML takes a thousand times its size in memory."""


class _StrictLoader(yaml.SafeLoader):
    """YAML without tags, aliases or duplicate keys, and with 3e-4 read as a number."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        place = f"{event.start_mark.name}:{event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"{place}: alias '*{one_line(event.anchor, 60)}' is refused (write the values again)")
        if getattr(event, "tag", None) is not None:
            raise ConfigError(f"{place}: tag {one_line(event.tag, 100)!r} is refused (use plain values)")
        return super().compose_node(parent, index)


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node)
        place = f"{key_node.start_mark.name}:{key_node.start_mark.line + 1}"
        if not isinstance(key, str):
            raise ConfigError(f"{place}: key {key!r} is not a name (quote it or remove it)")
        if key in result:
            raise ConfigError(f"{place}: {key!r} stands twice (keep one)")
        result[key] = loader.construct_object(value_node, deep=True)
    return result


_StrictLoader.add_constructor("tag:yaml.org,2002:map", _mapping)
# YAML 1.1 reads 3e-4 as text, no/off/yes as booleans and 2020-01-01 as a date. Here scientific notation is a number,
# only true and false are booleans, there are no dates, and none is null, as --help writes it.
_YAML_WORDS = {f"tag:yaml.org,2002:{name}" for name in ("bool", "null", "timestamp")}
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _YAML_WORDS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|none|None|)$"), ["~", "n", "N", ""]
)
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false|True|False)$"), list("tfTF"))
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parse(text: str, name: str) -> Any:
    """The value of a YAML text; ``name`` is for messages."""
    loader = _StrictLoader(text)
    loader.name = name
    return loader.get_single_data()


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: the file is missing, is not YAML, holds tags or duplicate keys, or no mapping.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS + 1)
        if len(text) > MAX_CHARACTERS:
            raise ConfigError(f"{path}: more than {MAX_CHARACTERS} characters (name a configuration file)")
        loaded = _parse(text, str(path))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror} (name an existing YAML file)") from error
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # not UTF-8, a number of 5,000 digits
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(
            f"{place}: not readable as YAML: {one_line(getattr(error, 'problem', error), 120)} (mend the file)"
        ) from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: holds {type(loaded).__name__}, not sections (write 'section:' and indented values)")
    return loaded


def merge(base: dict[str, Any], update: dict[str, Any]) -> dict[str, Any]:
    """``update`` over ``base``, section by section; a section of another ``kind`` replaces the old one."""
    result = dict(base)
    for key, value in update.items():
        old = result.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and value.get("kind", old.get("kind")) == old.get("kind"):
            result[key] = merge(old, value)
        else:
            result[key] = value
    return result


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """Nested mapping from ``--section.field value`` and ``--section.field=value`` arguments."""
    result: dict[str, Any] = {}
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        if not argument.startswith("--"):
            raise ConfigError(f"{argument!r} is not an option (write --section.field value)")
        name, equals, text = argument[2:].partition("=")
        if not equals:
            if not queue:
                raise ConfigError(f"--{name} needs a value (write --{name} value)")
            text = queue.pop(0)
        try:
            value = _parse(text, f"--{name}")
        except ConfigError:
            raise
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(f"--{name}: {one_line(text, 100)!r} cannot be read (quote it)") from error
        for part in reversed(name.replace("-", "_").split(".")):
            value = {part: value}
        result = merge(result, value)
    return result


def variants(annotation: Any) -> list[type[Section]]:
    """The section classes that an annotation allows (none for a plain value)."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    if typing.get_origin(annotation) in (Union, types.UnionType, Annotated):
        return [found for part in typing.get_args(annotation) for found in variants(part)]
    return []


def _walk(model: type[Section], location: tuple[str | int, ...]) -> tuple[list[type[Section]], str]:
    """The sections that pydantic's error ``location`` ends in, and the location as a user writes it.

    pydantic adds the tag of a union's variant (``ffn.mh_moe.top_k``) and, at the end, the type that was tried.
    """
    models, shown = [model], []
    for part in location:
        tagged = [m for m in models if "kind" in m.model_fields and m.model_fields["kind"].default == part]
        if tagged:
            models = tagged
            continue
        shown.append(str(part))
        models = [v for m in models if part in m.model_fields for v in variants(m.model_fields[part].annotation)]
    tried = r"\.(constrained-)?(int|float|str|bool|list|tuple|literal|function)[^.]*$"
    return models, re.sub(tried, "", ".".join(shown))


def validate(model: type[Section], values: dict[str, Any], source: str | Callable[[str], str] = "configuration") -> Any:
    """``model`` filled from ``values``; ``source`` says where they are from, or where the one with this path is.

    Raises:
        ConfigError: an unknown key (with the nearest known name), a wrong type, an impossible value.
    """
    try:
        return model.model_validate(values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        location, (_, path) = first["loc"], _walk(model, first["loc"])
        source = source(path) if callable(source) else source
        if first["type"] == "extra_forbidden":
            known = sorted({name for m in _walk(model, location[:-1])[0] for name in m.model_fields})
            if str(location[-1]) in ("heads", "num_heads") and "num_subtokens" in known:
                near = ["num_subtokens"]
            else:
                near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
            remedy = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"{source}: {path} is not an option ({remedy})") from error
        if first["type"] == "missing":
            raise ConfigError(f"{source}: {path} is not set (give it a value)") from error
        got = one_line(repr(first["input"]), 60)
        if first["type"] in ("model_type", "model_attributes_type", "union_tag_not_found"):
            raise ConfigError(f"{source}: {path or 'the file'} is a section, got {got} (write its fields)") from error
        raise ConfigError(f"{source}: {path}: {first['msg'].lower()}, got {got} (change the value)") from error


def load(model: type[Section], files: list[str | Path], overrides: list[str] | None = None) -> Any:
    """The configuration from YAML ``files`` (left to right), then dotted ``overrides``."""
    parts = [*((str(path), read_yaml(path)) for path in files), ("command line", parse_overrides(overrides or []))]

    def source(path: str) -> str:
        """The last part that holds ``path``; all files where none does."""
        holders = [name for name, part in parts if _holds(part, path.split("."))]
        return holders[-1] if holders else ", ".join(str(f) for f in files) or "command line"

    return validate(model, functools.reduce(merge, (part for _, part in parts), {}), source)


def _holds(values: Any, keys: list[str]) -> bool:
    """Whether nested mappings have a value at ``keys``, or a list on the way there."""
    for key in keys:
        if isinstance(values, list):
            return True
        if not isinstance(values, dict) or key not in values:
            return False
        values = values[key]
    return True


def dump(config: Section) -> str:
    """The whole configuration as YAML that :func:`load` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


# ---------------------------------------------------------------------------------------------- help
def _type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is Literal:
        return "{" + ",".join(map(str, arguments)) + "}"
    if origin in (Union, types.UnionType):
        return " | ".join(_type_name(a) for a in arguments)
    if origin in (list, tuple):
        return f"[{', '.join('...' if a is Ellipsis else _type_name(a) for a in arguments)}]"
    return "none" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))


def describe(model: type[Section], prefix: str = "", base: type[Section] | None = None) -> str:
    """Every option of ``model``: name, type, default, meaning; the text of ``--help``.

    Plain values come before sections. A variant that extends another (``base``) shows what it adds or changes.
    """
    plain, sections = [], []
    for name, field in model.model_fields.items():
        known = base.model_fields.get(name) if base else None
        if name == "kind" or (known is not None and known.default == field.default):
            continue
        choices = variants(field.annotation)
        if choices:
            sections += [_describe_variant(choice, choices, f"{prefix}{name}") for choice in choices]
            continue
        default = (
            "required" if field.is_required() else f"default: {'none' if field.default is None else field.default}"
        )
        plain.append(f"  --{prefix}{name} {_type_name(field.annotation)}  ({default})")
        if field.description:
            plain.append(f"        {field.description}")
    return "\n".join(plain + sections)


def _describe_variant(variant: type[Section], choices: list[type[Section]], path: str) -> str:
    kind = variant.model_fields.get("kind")
    base = next((c for c in choices if c is not variant and issubclass(variant, c)), None)
    title = f"--{path}.kind {kind.default}" if kind and len(choices) > 1 else path
    if base:
        title += f": as {base.model_fields['kind'].default}, and"
    elif variant.__doc__:
        title += f": {variant.__doc__.strip().splitlines()[0]}"
    return f"\n{title}\n{describe(variant, f'{path}.', base)}"
