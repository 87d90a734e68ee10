"""Train a small CLAP on the sounds of the world, in transformers' own classes and on-disk format.

    python examples/shapes/train_clap.py --out examples/shapes/clap --steps 3000

The objective is CLAP's: symmetric cross-entropy over the similarities of a batch, with a learned
temperature for each direction. A third of every batch comes in near-miss pairs
(``sounds.near_miss``). Linear heads beside it state what is heard (``sound_dataset.facts``) from
the pooled output of each tower, with a weight that falls to zero; they are discarded.

The learning rate follows the clock where ``--minutes`` is given, else the steps. How the committed
weights came about is in README.md.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from metrics import recall_at_k
from playing import RATE, play
from small_clap import (
    MAX_TOKENS,
    build_model,
    build_tokenizer,
    fix_norm,
    pooled_sounds,
    pooled_texts,
    set_training,
)
from sound_captions import sound_caption
from sound_dataset import (
    HEADS,
    PRESENCES,
    SoundDataset,
    decibels,
    extractor,
    load_or_play,
    presence,
)
from sounds import sounds
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, normalize
from transformers import ClapModel, RobertaTokenizerFast
from workers import average_gradients, join_workers, run_workers

_MAX_LOGIT_SCALE = math.log(100.0)
_VALIDATION_SEED = 1
"""Validation draws from the training split under a seed of its own: the test split stays unseen."""


@dataclass(frozen=True)
class Batch:
    """What a step sees.

    features (B, 1, frames, mels) float32, facts (B, 17) int64, presence (B, P) float32 of 0 and 1,
    tokens (B, T) int64.
    """

    features: torch.Tensor
    facts: torch.Tensor
    presence: torch.Tensor
    tokens: torch.Tensor


def tokenise(tokenizer: RobertaTokenizerFast, texts: list[str]) -> npt.NDArray[np.int16]:
    """Return (N, T) int16 ids, padded."""
    rows = tokenizer(texts, padding="max_length", truncation=True, max_length=MAX_TOKENS)
    return np.array(rows.input_ids, dtype=np.int16)


def batches(
    data: SoundDataset, tokens: npt.NDArray[np.int16], pad: int, size: int, rng: np.random.Generator
) -> Iterator[Batch]:
    """Yield batches endlessly; a third of each is near-miss pairs.

    Args:
        data: Sounds that have been played.
        tokens: (N, K, T), ids of the K captions of each.
        pad: Id of the padding token.
        size: Sounds a batch.
        rng: Where chance comes from.
    """
    pairs = size // 6
    while True:
        order = rng.permutation(len(tokens) // 2)
        for start in range(0, len(order) - size, size - pairs):
            # Of the first both near misses, of the others one: batches of one size.
            some = 2 * order[start : start + size - pairs]
            some[pairs:] += rng.integers(2, size=len(some) - pairs)
            chosen = np.concatenate([some, some[:pairs] + 1])
            rows = tokens[chosen, rng.integers(tokens.shape[1], size=len(chosen))].astype(np.int64)
            # Few distinct shapes: the CPU kernels are generated anew for each.
            longest = -(-int((rows != pad).sum(axis=1).max()) // 8) * 8
            yield Batch(
                _varied(decibels(data.levels[chosen]), rng),
                torch.from_numpy(data.facts[chosen].astype(np.int64)),
                torch.from_numpy(presence(data.facts[chosen]).astype(np.float32)),
                torch.from_numpy(rows[:, :longest]),
            )


def _varied(mels: npt.NDArray[np.float32], rng: np.random.Generator) -> torch.Tensor:
    """Shift spectrograms in time and level by a little, as no two recordings begin alike."""
    gain = rng.uniform(-1.0, 1.0, (len(mels), 1, 1)) + rng.normal(0, 0.5, mels.shape)
    shifts = rng.integers(-3, 4, len(mels))
    moved = np.stack([np.roll(m, s, axis=0) for m, s in zip(mels, shifts, strict=True)])
    return torch.from_numpy((moved + gain).astype(np.float32)[:, None])


class Validation:
    """Four hundred sounds of the training split that no batch holds."""

    def __init__(self, tokenizer: RobertaTokenizerFast, count: int = 400) -> None:
        rng = np.random.default_rng(_VALIDATION_SEED)
        held_out = sounds("train", count, seed=_VALIDATION_SEED)
        played = [play(sound) for sound in held_out]
        made = [extractor()(p, sampling_rate=RATE, return_tensors="pt") for p in played]
        self._features = torch.cat([one["input_features"] for one in made])
        texts = [sound_caption(sound, rng, unseen=True) for sound in held_out]
        self._tokens = torch.from_numpy(tokenise(tokenizer, texts).astype(np.int64))

    def recall(self, model: ClapModel) -> tuple[float, float]:
        """Return text-to-audio recall at 1 and at 5."""
        set_training(model, training=False)
        with torch.no_grad():
            audio = normalize(model.audio_projection(pooled_sounds(model, self._features)))
            texts = normalize(model.text_projection(pooled_texts(model, self._tokens)[0]))
        set_training(model, training=True)
        found = texts.numpy(), audio.numpy()
        return recall_at_k(*found, 1), recall_at_k(*found, 5)


def contrastive_loss(model: ClapModel, audio: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Return the symmetric cross-entropy of a batch of embeddings (B, D)."""
    similarities = normalize(audio) @ normalize(texts).T
    target = torch.arange(len(similarities))
    to_text = cross_entropy(similarities * model.logit_scale_a.exp(), target)
    return (to_text + cross_entropy(similarities.T * model.logit_scale_t.exp(), target)) / 2


def facts_loss(logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of stating what is heard in which order, and what is heard at all.

    Args:
        logits: (B, choices of all facts and presences).
        batch: The truth.
    """
    *parts, there = torch.split(logits, [*(1 + choices for choices in HEADS), PRESENCES], dim=1)
    ordered = [cross_entropy(part, batch.facts[:, index]) for index, part in enumerate(parts)]
    # About three of the columns are 1.
    found = binary_cross_entropy_with_logits(there, batch.presence, reduction="none")
    return torch.stack(ordered).mean(), found.sum(dim=1).mean()


class Trainer:
    """The model, the heads that state facts, and the optimiser of one worker."""

    def __init__(self, model: ClapModel, learning_rate: float, facts: float) -> None:
        """Set up training of ``model``.

        Args:
            model: What to train.
            learning_rate: Peak of the text tower's; the audio tower's is twice that.
            facts: Share of the run after which the heads that state facts are gone.
        """
        self.model = model
        self._facts = facts
        outputs = sum(1 + choices for choices in HEADS) + PRESENCES
        audio, text = model.config.audio_config.hidden_size, model.config.text_config.hidden_size
        self.heads = torch.nn.ModuleList(
            torch.nn.Linear(width, outputs) for width in (audio, text, text)
        )
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._weights = [*(p for _, p in named), *self.heads.parameters()]
        sounding = [p for name, p in named if name.startswith("audio")]
        groups = [
            (sounding, 2 * learning_rate),
            ([p for name, p in named if not name.startswith("audio")], learning_rate),
            (list(self.heads.parameters()), 10 * learning_rate),
        ]
        self._peaks = [peak for _, peak in groups]
        self._optimiser = torch.optim.AdamW(
            [{"params": params, "lr": peak} for params, peak in groups],
            betas=(0.9, 0.98),
            weight_decay=0.01,
            fused=True,
        )

    def step(self, batch: Batch, step: int, progress: float) -> dict[str, float]:
        """Make one step; return its losses by name.

        Args:
            batch: Sounds, what is heard in them, and captions.
            step: Number of steps before this one.
            progress: How much of the training is done, 0 to 1.
        """
        rate = min(1.0, step / 50) * 0.5 * (1 + math.cos(math.pi * progress))
        for group, peak in zip(self._optimiser.param_groups, self._peaks, strict=True):
            group["lr"] = peak * rate
        model = self.model
        with torch.autocast("cpu", torch.bfloat16):
            audio, (texts, words) = (
                pooled_sounds(model, batch.features),
                pooled_texts(model, batch.tokens),
            )
            vectors = model.audio_projection(audio), model.text_projection(texts)
            stated = [
                head(one).float()
                for head, one in zip(self.heads, (audio, texts, words), strict=True)
            ]
        contrastive = contrastive_loss(model, *(one.float() for one in vectors))
        (heard, found), (read, noted), (_, named) = (facts_loss(one, batch) for one in stated)
        share = max(0.0, 1.0 - progress / self._facts) if self._facts else 0.0
        stating = 2 * (heard + read) + found + noted + named
        torch.autograd.backward(contrastive + share * stating)
        average_gradients(self._weights)
        torch.nn.utils.clip_grad_norm_(self._weights, 1.0)
        self._optimiser.step()
        self._optimiser.zero_grad()
        with torch.no_grad():
            for scale in (model.logit_scale_a, model.logit_scale_t):
                scale.clamp_(max=_MAX_LOGIT_SCALE)
        losses = {"loss": contrastive, "heard": heard, "found": found, "read": read, "noted": noted}
        losses |= {"named": named}
        return {name: loss.item() for name, loss in losses.items()}


def train(options: argparse.Namespace) -> None:
    """Train with the command line's options, one process a worker, saving every few minutes."""
    load_or_play(Path(options.cache), options.sounds, options.seed)
    run_workers(_work, options)


def _work(rank: int, options: argparse.Namespace) -> None:
    """Train on one thread; gradients are averaged over the workers at every step."""
    join_workers(rank, options)
    data = load_or_play(Path(options.cache), options.sounds, options.seed)
    flat = [text for texts in data.captions for text in texts]
    tokenizer = build_tokenizer(flat[:20_000])
    tokens = tokenise(tokenizer, flat).reshape(len(data.captions), -1, MAX_TOKENS)
    model = build_model(tokenizer)
    if options.start:
        model.load_state_dict(ClapModel.from_pretrained(options.start).state_dict())
    fix_norm(model, torch.from_numpy(decibels(data.levels[:4000])))
    set_training(model, training=True)
    trainer = Trainer(model, options.learning_rate, options.facts)
    validation = Validation(tokenizer) if rank == 0 else None
    rng = np.random.default_rng([options.seed, 5, rank])
    began = saved = time.monotonic()
    for step, batch in enumerate(
        batches(data, tokens, int(tokenizer.pad_token_id), options.batch, rng)
    ):
        minutes = (time.monotonic() - began) / 60
        clock = torch.tensor(step / options.steps if options.steps else minutes / options.minutes)
        torch.distributed.broadcast(clock, 0)
        if clock >= 1.0:
            break
        losses = trainer.step(batch, step, clock.item())
        if validation is None:
            continue
        if step % 25 == 0:
            line = {"step": step, "minutes": minutes, "scale": model.logit_scale_a.exp().item()}
            line |= losses
            if step % 200 == 0:
                line["recall@1"], line["recall@5"] = validation.recall(model)
            print(json.dumps({name: round(value, 4) for name, value in line.items()}), flush=True)
        if time.monotonic() - saved > 180:
            saved = time.monotonic()
            _save(model, tokenizer, Path(options.out))
    if validation is not None:
        _save(model, tokenizer, Path(options.out))
        print(json.dumps({"recall": validation.recall(model)}), flush=True)
    torch.distributed.destroy_process_group()


def _save(model: ClapModel, tokenizer: RobertaTokenizerFast, out: Path) -> None:
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    extractor().save_pretrained(out)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", required=True, help="folder for the trained model")
    parser.add_argument("--start", help="folder of weights to go on from, of the same --sounds")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--steps", type=int, default=0, help="instead of --minutes")
    parser.add_argument("--batch", type=int, default=64, help="per worker")
    parser.add_argument("--sounds", type=int, default=27_000)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--facts", type=float, default=0.6, help="share of the run with facts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread")
    parser.add_argument(
        "--cache", default=str(Path.home() / ".cache" / "mmedge-shapes"), help="for played sounds"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    train(parse())
