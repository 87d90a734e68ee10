"""Tiny models of random weights in transformers' own classes and on-disk format."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertModel,
    BitImageProcessorPil,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizerFast,
    ConvNextImageProcessorPil,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2TokenizerFast,
    Owlv2Config,
    Owlv2ForObjectDetection,
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTImageProcessorPil,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
    RobertaTokenizerFast,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessorPil,
    RTDetrResNetConfig,
    RTDetrV2Config,
    RTDetrV2ForObjectDetection,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

TEXT_END = "<|endoftext|>"
START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_SIDE, SIGLIP_SIDE, DINOV2_SIDE, RESNET_SIDE, OWL_SIDE = 32, 24, 28, 32, 40
CLIP_CONTEXT, SIGLIP_CONTEXT, GPT2_CONTEXT, BERT_CONTEXT = 20, 12, 128, 40
RT_DETR_SIDE = 64
CLAP_CONTEXT, CLAP_MELS, CLAP_RATE = 24, 16, 8000

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
_MODELS = "sentence_transformers.models"
IMAGE_LABELS = ("red circle", "green square", "blue star", "yellow ring", "crane", "crane")

_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def clip_tokenizer() -> CLIPTokenizerFast:
    """Return a byte tokenizer in CLIP's format: every text can be encoded, nothing is merged."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), START, END]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizerFast(vocab=vocab, merges=[], model_max_length=CLIP_CONTEXT)


def write_clip(
    folder: Path, *, eos_token_id: int | None = None, seed: int = 0, vocab_size: int | None = None
) -> Path:
    """Write a CLIP with every file that a hub repository has.

    Args:
        folder: Where to write.
        eos_token_id: As in config.json; None for the tokenizer's own.
        seed: Of the weights.
        vocab_size: Rows of the token embedding; None for the tokenizer's own.
    """
    tokenizer = clip_tokenizer()
    end = int(tokenizer.eos_token_id)
    config = CLIPConfig(
        text_config={
            **_TOWER,
            "vocab_size": vocab_size or len(tokenizer),
            "max_position_embeddings": CLIP_CONTEXT,
            "bos_token_id": int(tokenizer.bos_token_id),
            "eos_token_id": end if eos_token_id is None else eos_token_id,
            "pad_token_id": int(tokenizer.pad_token_id),
            "projection_dim": 16,
        },
        vision_config={**_TOWER, "image_size": CLIP_SIDE, "patch_size": 8, "projection_dim": 16},
        projection_dim=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(config)
        _spread(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    side = {"height": CLIP_SIDE, "width": CLIP_SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": CLIP_SIDE}, crop_size=side).save_pretrained(folder)
    return folder


def write_vit(folder: Path, *, seed: int = 0) -> Path:
    """Write a ViT that classifies images by IMAGE_LABELS."""
    config = ViTConfig(
        **_TOWER,
        image_size=CLIP_SIDE,
        patch_size=8,
        id2label=dict(enumerate(IMAGE_LABELS)),
        label2id={name: index for index, name in enumerate(IMAGE_LABELS)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ViTForImageClassification(config)
        _spread(model)
        _centre(model, CLIP_SIDE)
    model.save_pretrained(folder)
    side = {"height": CLIP_SIDE, "width": CLIP_SIDE}
    ViTImageProcessorPil(size=side).save_pretrained(folder)
    return folder


def write_dinov2(folder: Path, *, registers: bool = False, seed: int = 0) -> Path:
    """Write a DINOv2 that classifies images of another size than it was trained on.

    Args:
        folder: Where to write.
        registers: Whether it has register tokens.
        seed: Of the weights.
    """
    kinds: Any = (Dinov2Config, Dinov2ForImageClassification)
    if registers:
        kinds = (Dinov2WithRegistersConfig, Dinov2WithRegistersForImageClassification)
    sizes = {name: value for name, value in _TOWER.items() if name != "intermediate_size"}
    config = kinds[0](
        **sizes, mlp_ratio=2, image_size=42, patch_size=7, id2label=dict(enumerate(IMAGE_LABELS))
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kinds[1](config)
        _spread(model)
        _centre(model, DINOV2_SIDE)
    model.save_pretrained(folder)
    crop = {"height": DINOV2_SIDE, "width": DINOV2_SIDE}
    BitImageProcessorPil(size={"shortest_edge": 32}, crop_size=crop).save_pretrained(folder)
    return folder


def write_resnet(folder: Path, *, seed: int = 0) -> Path:
    """Write a ResNet of two stages that classifies images by IMAGE_LABELS."""
    config = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[32, 64],
        depths=[1, 2],
        id2label=dict(enumerate(IMAGE_LABELS)),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ResNetForImageClassification(config)
        for norm in model.modules():  # as after training, so that folding them shows
            if isinstance(norm, torch.nn.BatchNorm2d):
                norm.running_mean.normal_(0, 0.2)
                norm.running_var.uniform_(0.5, 2)
        _centre(model, RESNET_SIDE)
    model.save_pretrained(folder)
    size = {"shortest_edge": RESNET_SIDE}
    ConvNextImageProcessorPil(size=size, crop_pct=0.875).save_pretrained(folder)
    return folder


def write_siglip(folder: Path, *, seed: int = 0) -> Path:
    """Write a SigLIP, its tokenizer as a sentencepiece model and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    things = [f"{c} {s}" for c in ("red", "green", "blue", "yellow")
              for s in ("circle", "square", "triangle", "star")]  # fmt: skip
    corpus = [f"a {one} left of a small {two}" for one in things for two in things]
    (folder / "spiece.model").write_bytes(train_unigram(corpus, 64))
    config = SiglipConfig(
        text_config={
            **_TOWER,
            "vocab_size": 64,
            "max_position_embeddings": SIGLIP_CONTEXT,
            "projection_size": 32,
        },
        vision_config={**_TOWER, "image_size": SIGLIP_SIDE, "patch_size": 8},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SiglipModel(config)
        _spread(model)
        model.logit_scale.data.fill_(2.3)
        model.logit_bias.data.fill_(-10.0)
    model.save_pretrained(folder)
    side = {"height": SIGLIP_SIDE, "width": SIGLIP_SIDE}
    SiglipImageProcessorPil(size=side).save_pretrained(folder)
    return folder


def write_sentence_transformer(folder: Path, *, seed: int = 0) -> Path:
    """Write a BERT with mean pooling, a dense layer and normalisation, as sentence-transformers."""
    from safetensors.torch import save_file

    tokenizer = word_pieces()
    config = BertConfig(
        **_TOWER, vocab_size=len(tokenizer), max_position_embeddings=BERT_CONTEXT, pad_token_id=0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertModel(config)
        _spread(model)
        dense = torch.nn.Linear(32, 16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    names = ("Transformer", "Pooling", "Dense", "Normalize")
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{name}" * (i > 0), "type": f"{_MODELS}.{name}"}
        for i, name in enumerate(names)
    ]
    settings: dict[str, object] = {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": BERT_CONTEXT - 8, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": {"query": "find: ", "document": ""},
            "default_prompt_name": None,
        },
        "1_Pooling/config.json": {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True},
        "2_Dense/config.json": {
            "in_features": 32,
            "out_features": 16,
            "bias": True,
            "activation_function": "torch.nn.modules.activation.Tanh",
        },
    }
    for name, value in settings.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value))
    weights = {f"linear.{name}": value for name, value in dense.state_dict().items()}
    save_file(weights, folder / "2_Dense" / "model.safetensors")
    return folder


def word_pieces() -> PreTrainedTokenizerFast:
    """Return a WordPiece tokenizer in BERT's format: letters, and pieces within words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from tokenizers.processors import TemplateProcessing

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    tokens = [*special, *letters, *(f"##{letter}" for letter in letters)]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(WordPiece(vocab, unk_token="[UNK]"))  # noqa: S106
    tokenizer.normalizer = BertNormalizer()
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",  # noqa: S106
        unk_token="[UNK]",  # noqa: S106
        cls_token="[CLS]",  # noqa: S106
        sep_token="[SEP]",  # noqa: S106
        model_max_length=BERT_CONTEXT,
    )


def write_clap(folder: Path, *, fusion: bool = False, seed: int = 0) -> Path:
    """Write a CLAP of two stages that takes a second of sound, with a byte tokenizer.

    Args:
        folder: Where to write.
        fusion: Of long audio, as in laion/clap-htsat-fused.
        seed: Of the weights.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocab = {token: i for i, token in enumerate([*special, *sorted(ByteLevel.alphabet())])}
    tokenizer = RobertaTokenizerFast(vocab=vocab, merges=[], model_max_length=CLAP_CONTEXT)
    audio = {
        "spec_size": 32,
        "num_mel_bins": CLAP_MELS,
        "window_size": 4,
        "patch_embeds_hidden_size": 16,
        "hidden_size": 32,
        "depths": [2, 1],
        "num_attention_heads": [2, 4],
        "num_hidden_layers": 2,
        "enable_fusion": fusion,
    }
    text = {
        **_TOWER,
        "num_hidden_layers": 1,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": CLAP_CONTEXT + 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=16))
        _spread(model)
        model.logit_scale_a.data.fill_(2.5)
        # The statistics of decibels.
        model.audio_model.audio_encoder.batch_norm.running_mean.fill_(-30.0)
        model.audio_model.audio_encoder.batch_norm.running_var.fill_(400.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ClapFeatureExtractor(
        feature_size=CLAP_MELS,
        sampling_rate=CLAP_RATE,
        hop_length=160,
        max_length_s=1,
        fft_window_size=256,
        frequency_min=50,
        frequency_max=4000,
        truncation="fusion" if fusion else "rand_trunc",
    ).save_pretrained(folder)
    return folder


def write_gpt2(folder: Path, *, seed: int = 6) -> Path:
    """Write a GPT-2 of random weights with a byte tokenizer of chats, without a padding token."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocab = {token: index for index, token in enumerate([*sorted(ByteLevel.alphabet()), TEXT_END])}
    tokenizer = GPT2TokenizerFast(vocab=vocab, merges=[], model_max_length=GPT2_CONTEXT)
    tokenizer.chat_template = CHAT_TEMPLATE
    end = int(tokenizer.eos_token_id)
    config = GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=GPT2_CONTEXT,
        vocab_size=len(tokenizer),
        bos_token_id=end,
        eos_token_id=end,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
        _spread(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_owl(folder: Path, *, second: bool = False, seed: int = 0) -> Path:
    """Write an OWL-ViT of 5 x 5 patches, or an OWLv2, with a byte tokenizer.

    Args:
        folder: Where to write.
        second: OWLv2, which pads images to a square.
        seed: Of the weights.
    """
    tokenizer = clip_tokenizer()
    parts = {
        "text_config": {
            **_TOWER,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": CLIP_CONTEXT,
            "pad_token_id": int(tokenizer.pad_token_id),
            "bos_token_id": int(tokenizer.bos_token_id),
            "eos_token_id": int(tokenizer.eos_token_id),
        },
        "vision_config": {**_TOWER, "image_size": OWL_SIDE, "patch_size": 8},
        "projection_dim": 32,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: torch.nn.Module = (
            Owlv2ForObjectDetection(Owlv2Config(**parts))
            if second
            else OwlViTForObjectDetection(OwlViTConfig(**parts))
        )
        _spread(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = Owlv2ImageProcessorPil if second else OwlViTImageProcessorPil
    processor(size={"height": OWL_SIDE, "width": OWL_SIDE}).save_pretrained(folder)
    return folder


def write_rt_detr(folder: Path, *, second: bool = False, seed: int = 0) -> Path:
    """Write an RT-DETR of one or two decoder layers and five classes, for images of 64 x 64.

    Args:
        folder: Where to write.
        second: RT-DETR v2, which samples otherwise.
        seed: Of the weights.
    """
    kinds: Any = (RTDetrConfig, RTDetrForObjectDetection)
    if second:
        kinds = (RTDetrV2Config, RTDetrV2ForObjectDetection)
    config = kinds[0](
        backbone_config=RTDetrResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 8, 16, 16],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            out_features=["stage2", "stage3", "stage4"],
        ),
        encoder_in_channels=[8, 16, 16],
        encoder_hidden_dim=16,
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        d_model=16,
        decoder_in_channels=[16, 16, 16],
        decoder_ffn_dim=32,
        decoder_layers=1 + second,  # v2 ties heads between layers
        decoder_attention_heads=2,
        decoder_n_points=2,
        num_queries=20,
        num_denoising=0,
        id2label=dict(enumerate(("red circle", "green square", "blue star", "crane", "crane"))),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kinds[1](config)
        _spread(model)
    model.save_pretrained(folder)
    side = {"height": RT_DETR_SIDE, "width": RT_DETR_SIDE}
    RTDetrImageProcessorPil(size=side).save_pretrained(folder)
    return folder


def _spread(model: torch.nn.Module) -> None:
    """Make weights as large as trained ones, so that outputs differ from input to input."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 0.3)


def _centre(model: torch.nn.Module, side: int) -> None:
    """Shift the biases of a classifier so that images of noise get classes of all kinds."""
    pixels = (
        torch.rand(32, 1, 1, 1) + 0.2 * torch.randn(32, 3, side, side) + torch.rand(32, 3, 1, 1)
    )
    with torch.no_grad():
        logits = model.eval()(pixels * 2 - 2).logits
        head = model.classifier if hasattr(model.classifier, "bias") else model.classifier[-1]
        head.bias -= logits.mean(dim=0)


def train_unigram(sentences: Iterable[str], vocab_size: int) -> bytes:
    """Train a unigram model as SigLIP's: end token 1, unknown 2, no padding or start token."""
    from sentencepiece import SentencePieceTrainer

    buffer = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=buffer,
        model_type="unigram",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
        num_threads=1,
    )
    return buffer.getvalue()
