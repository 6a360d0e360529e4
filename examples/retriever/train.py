"""Train the byte-level retriever on one GPU in under ten minutes.

    python examples/retriever/train.py --out checkpoint

Stages lengthen the prompts: the first runs until retrieval has formed, the others share the
remaining time. The checkpoint is saved after every stage, so a stopped run leaves a usable one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import random
import sysconfig
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_compiler.demo.model import (
    RetrieverConfig,
    RetrieverModel,
    transformers_config,
)
from sparse_compiler.demo.records import (
    PLACEMENTS,
    load_haystack,
    make_prompt,
    sample_training_batch,
    score_answers,
)

LEARNING_RATE = 2e-3
FINAL_RATE = 0.03  # of LEARNING_RATE, reached at the end of the last stage
BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.05
CLIP_NORM = 1.0
WARMUP_STEPS = 100
TEXT_LOSS_WEIGHT = 0.5
FORMED_ACCURACY = 0.97  # ends the first stage
FIRST_STAGE_SHARE = 0.5  # of the time at most
SKIP_PROBABILITY = 0.7
NUM_SKIPS = 3
LATER_STAGE_SHARES = (0.23, 0.28, 0.49)  # of what the first stage leaves
LOG_EVERY = 100
DEFAULT_STAGES = "512x64,2048x24,8192x12,32768x4"
EVALUATION_TOKENS = (16384, 32768, 65536, 131072)
EVALUATION_FILLS = (0.25, 0.02, 0.5)


@dataclass(frozen=True)
class Stage:
    """One training stage: `batch` prompts of `tokens` bytes per step."""

    tokens: int
    batch: int

    @classmethod
    def parse(cls, text: str) -> Stage:
        tokens, batch = text.lower().split("x")
        return cls(int(tokens), int(batch))


def log(message: str) -> None:
    print(message, flush=True)


def read_file(path: str) -> bytes:
    """The bytes of a file; nothing for a dangling link or an unreadable file."""
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def read_training_text(max_bytes: int) -> bytes:
    """Python source found on this machine: standard library and installed packages."""
    roots = {sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")}
    files: set[str] = set()
    for root in sorted(roots):
        for folder, _, names in os.walk(root):
            files.update(os.path.join(folder, name) for name in names if name.endswith(".py"))
    # A seeded shuffle, so that a cap on the bytes still leaves text of every kind.
    order = sorted(files)
    random.Random(0).shuffle(order)
    parts: list[bytes] = []
    size = 0
    with ThreadPoolExecutor(16) as pool:
        for first in range(0, len(order), 256):
            for part in pool.map(read_file, order[first : first + 256]):
                parts.append(part)
                size += len(part)
            if size >= max_bytes:
                break
    return b"".join(parts)[:max_bytes]


def draw_position_ids(batch: int, tokens: int, highest: int, generator: torch.Generator) -> Tensor:
    """[batch, tokens] ids that skip ahead at three random cuts and stay below `highest`.

    A model trained on 32K tokens thus meets the angles of 128K tokens.
    """
    device = generator.device
    cuts = torch.randint(1, tokens, (batch, NUM_SKIPS, 1), generator=generator, device=device)
    shares = torch.rand(batch, NUM_SKIPS, 1, generator=generator, device=device)
    total = torch.rand(batch, 1, 1, generator=generator, device=device) * (highest - tokens)
    skips = (total * shares / shares.sum(1, keepdim=True)).long()
    position = torch.arange(tokens, device=device)
    return position + ((position >= cuts) * skips).sum(1)


class Trainer:
    """Model, optimiser and data of one run."""

    def __init__(
        self,
        text: bytes,
        seed: int,
        device: torch.device,
        *,
        anywhere_share: float = 0.0,
        uniform_share: float = 0.0,
        tokens_per_question: int = 512,
        weights: dict[str, Tensor] | None = None,
    ) -> None:
        torch.manual_seed(seed)
        self.config = RetrieverConfig()
        self.model = RetrieverModel(self.config)
        for name, weight in self.model.named_parameters():
            if "norm" not in name:
                torch.nn.init.normal_(weight, std=0.02)
        if weights is not None:
            for name, weight in self.model.named_parameters():
                with torch.no_grad():
                    weight.copy_(weights[name])
        self.anywhere_share = anywhere_share
        self.uniform_share = uniform_share
        self.tokens_per_question = tokens_per_question
        self.model.to(device)
        matrices = [weight for weight in self.model.parameters() if weight.ndim >= 2]
        vectors = [weight for weight in self.model.parameters() if weight.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": WEIGHT_DECAY},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=LEARNING_RATE,
            betas=BETAS,
            fused=True,
        )
        self.device = device
        self.text = torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy()).to(device)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.coin = random.Random(seed)
        self.steps = 0

    def step(self, stage: Stage, rate: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One update. Returns text loss, answer loss, questions right, questions, on the device."""
        anywhere = self.coin.random() < self.anywhere_share
        most = max(64 if anywhere else 32, stage.tokens // self.tokens_per_question)
        batch = sample_training_batch(
            self.text,
            batch=stage.batch,
            tokens=stage.tokens,
            max_questions=min(most, max(4, stage.tokens // 64)),
            generator=self.generator,
            anywhere=anywhere,
            uniform_share=self.uniform_share,
        )
        position_ids = None
        if self.coin.random() < SKIP_PROBABILITY:
            position_ids = draw_position_ids(
                stage.batch,
                stage.tokens,
                self.config.max_position_embeddings,
                self.generator,
            )
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            logits = self.model(batch.tokens, position_ids)[:, :-1]
        targets = batch.tokens[:, 1:]
        text_mask, answer_mask = batch.text_mask[:, 1:], batch.answer_mask[:, 1:]
        losses = F.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), reduction="none"
        ).view_as(targets)
        # Masked means instead of indexing: the number of targets never has to reach the host.
        text_loss = (losses * text_mask).sum() / text_mask.sum()
        answer_loss = (losses * answer_mask).sum() / answer_mask.sum()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        (TEXT_LOSS_WEIGHT * text_loss + answer_loss).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.optimizer.step()
        self.steps += 1
        with torch.no_grad():
            wrong = (logits.argmax(-1) != targets) & answer_mask
            # The four digits of a question are adjacent: sum each window that is all digits.
            digits = answer_mask.float().unfold(1, 4, 1).sum(-1) == 4
            right = digits & (wrong.float().unfold(1, 4, 1).sum(-1) == 0)
        return text_loss.detach(), answer_loss.detach(), right.sum(), digits.sum()


def train_stage(
    trainer: Trainer,
    stage: Stage,
    deadline: float,
    *,
    peak_rate: float,
    until: float | None,
    decay: bool,
) -> dict[str, Any]:
    """Run steps until `deadline` (time.monotonic seconds) or accuracy `until`; returns a record."""
    begin = time.monotonic()
    first_step = trainer.steps
    sums = torch.zeros(4, dtype=torch.float64, device=trainer.device)
    seen = 0
    accuracy = text_loss = answer_loss = 0.0
    while True:
        now = time.monotonic()
        rate = peak_rate * min(1.0, (trainer.steps + 1) / WARMUP_STEPS)
        if decay:
            progress = min(1.0, (now - begin) / max(1e-6, deadline - begin))
            # A cosine from the full rate to FINAL_RATE of it.
            rate *= FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * progress))
        sums += torch.stack([part.double() for part in trainer.step(stage, rate)])
        seen += 1
        # Reading the device also keeps the host from running ahead of the deadline.
        report = seen >= LOG_EVERY
        if seen % 10 == 0 and trainer.device.type == "cuda":
            torch.cuda.synchronize()
        over = time.monotonic() >= deadline
        if report or over:
            totals = sums.tolist()
            text_loss, answer_loss = totals[0] / seen, totals[1] / seen
            accuracy = totals[2] / max(1.0, totals[3])
            log(
                f"stage {stage.tokens}x{stage.batch} step {trainer.steps} "
                f"{time.monotonic() - begin:.0f}s rate {rate:.2e} text {text_loss:.3f} "
                f"answer {answer_loss:.4f} right {accuracy:.4f}"
            )
            if not math.isfinite(text_loss + answer_loss):
                raise RuntimeError(f"the loss is {text_loss + answer_loss} at {trainer.steps}")
            sums.zero_()
            seen = 0
            if over or (until is not None and accuracy >= until):
                break
    return {
        "tokens": stage.tokens,
        "batch": stage.batch,
        "steps": trainer.steps - first_step,
        "seconds": round(time.monotonic() - begin, 1),
        "text_loss": round(text_loss, 4),
        "answer_loss": round(answer_loss, 4),
        "questions_right": round(accuracy, 4),
    }


def write_atomically(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(path.suffix + ".part")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def save(trainer: Trainer, out: Path, record: dict[str, Any]) -> None:
    """Write bf16 weights (the tied embedding once), config.json and training.json into `out`."""
    weights = {
        name: weight.detach().to(torch.bfloat16).contiguous().cpu()
        for name, weight in trainer.model.named_parameters()
    }
    data = safetensors.torch.save(weights, metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        **transformers_config(trainer.config),
    }
    record["sha256"] = hashlib.sha256(data).hexdigest()
    record["steps"] = trainer.steps
    write_atomically(out / "retriever.safetensors", data)
    write_atomically(out / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    write_atomically(out / "training.json", (json.dumps(record, indent=2) + "\n").encode())


@torch.no_grad()
def evaluate(
    trainer: Trainer, sizes: Sequence[int], prompts: int, deadline: float
) -> list[dict[str, Any]]:
    """Dense accuracy of the saved (bf16) weights; stops early at `deadline`."""
    model = RetrieverModel(trainer.config).to(trainer.device, torch.bfloat16)
    model.load_state_dict(trainer.model.state_dict())
    haystack = load_haystack()
    figures: list[dict[str, Any]] = []
    for fill in EVALUATION_FILLS:
        for tokens in sizes:
            for placement in PLACEMENTS:
                if time.monotonic() > deadline:
                    log("evaluation stopped: out of time")
                    return figures
                right: list[Tensor] = []
                for seed in range(prompts):
                    prompt = make_prompt(
                        tokens,
                        placement=placement,
                        seed=10_000 + seed,
                        records=max(64, int(fill * tokens) // 16),
                        haystack=haystack,
                    )
                    logits = model(
                        prompt.tokens[None].to(trainer.device),
                        logits_to_keep=prompt.logit_positions,
                    )
                    right.append(score_answers(logits, prompt))
                scores = torch.cat(right).float()
                figures.append(
                    {
                        "tokens": tokens,
                        "placement": placement,
                        "records_fraction": fill,
                        "questions": scores.numel(),
                        "right": round(scores.mean().item(), 4),
                    }
                )
                log(
                    f"evaluation {tokens} {placement} fill {fill}: "
                    f"{scores.mean().item():.4f} of {scores.numel()}"
                )
    return figures


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--seconds-limit", type=float, default=560.0, help="all in all")
    parser.add_argument("--evaluation-seconds", type=float, default=35.0, help="kept for the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", default=DEFAULT_STAGES, help="TOKENSxBATCH, comma-separated")
    parser.add_argument("--rate", type=float, default=LEARNING_RATE, help="peak learning rate")
    parser.add_argument(
        "--anywhere-share",
        type=float,
        default=0.0,
        help="share of the batches whose questions stand anywhere after their record",
    )
    parser.add_argument(
        "--uniform-share",
        type=float,
        default=0.0,
        help="share of the prompts whose number of records is uniform, not log-uniform",
    )
    parser.add_argument(
        "--tokens-per-question",
        type=int,
        default=512,
        help="long prompts ask up to one question for so many; short ones up to 32 (anywhere: 64)",
    )
    parser.add_argument("--resume", type=Path, help="folder of a checkpoint to train further")
    parser.add_argument("--text-bytes", type=int, default=100_000_000, help="haystack, at most")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, some seconds, any device")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, save and evaluate."""
    begin = time.monotonic()
    options = parse_arguments(arguments)
    sizes: Sequence[int] = EVALUATION_TOKENS
    prompts = 8
    if options.smoke:
        options.seconds_limit = min(options.seconds_limit, 40.0)
        options.evaluation_seconds = 12.0
        options.stages = "256x2,384x2,512x1,640x1"
        options.text_bytes = min(options.text_bytes, 4_000_000)
        sizes, prompts = (2048,), 1
    stages = [Stage.parse(text) for text in options.stages.split(",")]
    device = torch.device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)

    text = read_training_text(options.text_bytes)
    log(f"{len(text) / 1e6:.0f} MB of Python source after {time.monotonic() - begin:.0f}s")
    weights = None
    earlier: dict[str, Any] | None = None
    if options.resume is not None:
        weights = safetensors.torch.load_file(options.resume / "retriever.safetensors")
        earlier = json.loads((options.resume / "training.json").read_text())
    trainer = Trainer(
        text,
        options.seed,
        device,
        anywhere_share=options.anywhere_share,
        uniform_share=options.uniform_share,
        tokens_per_question=options.tokens_per_question,
        weights=weights,
    )
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    record: dict[str, Any] = {
        "seed": options.seed,
        "recipe": {
            "optimizer": "AdamW",
            "learning_rate": options.rate,
            "final_rate": FINAL_RATE * options.rate,
            "anywhere_share": options.anywhere_share,
            "uniform_share": options.uniform_share,
            "tokens_per_question": options.tokens_per_question,
            "betas": list(BETAS),
            "weight_decay": WEIGHT_DECAY,
            "clip_norm": CLIP_NORM,
            "warmup_steps": WARMUP_STEPS,
            "precision": "bfloat16 autocast",
            "loss": f"{TEXT_LOSS_WEIGHT} * text + answers",
            "position_skips": f"{NUM_SKIPS} in {SKIP_PROBABILITY:.0%} of the batches",
            "stages": options.stages,
            "seconds_limit": options.seconds_limit,
        },
        "training_text": {
            "bytes": len(text),
            "sha256": hashlib.sha256(text).hexdigest(),
        },
        "device": device_name,
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "safetensors": safetensors.__version__,
            "numpy": np.__version__,
        },
        "parameters": sum(weight.numel() for weight in trainer.model.parameters()),
        "stages": [],
        "evaluation": [],
    }
    if earlier is not None:
        record["resumed_from"] = earlier
    log(f"{record['parameters']} parameters on {device_name}, torch {torch.__version__}")

    # Now, because a Python without its source must not be noticed only after the training.
    evaluation_haystack = load_haystack()
    train_end = begin + options.seconds_limit - options.evaluation_seconds
    start = time.monotonic()
    # The weights of a checkpoint retrieve already, so that no stage has to wait for it.
    forming = 0 if options.resume is None else -1
    for number, stage in enumerate(stages):
        last = number == len(stages) - 1
        now = time.monotonic()
        if number == forming:
            deadline = now + FIRST_STAGE_SHARE * (train_end - now)
        else:
            shares = (*LATER_STAGE_SHARES, *[LATER_STAGE_SHARES[-1]] * len(stages))
            left = shares[number - forming - 1 : len(stages) - forming - 1]
            deadline = train_end if last else now + (train_end - now) * left[0] / sum(left)
        done = train_stage(
            trainer,
            stage,
            deadline,
            peak_rate=options.rate,
            until=FORMED_ACCURACY if number == forming else None,
            decay=last,
        )
        record["stages"].append(done)
        save(trainer, options.out, record)
        log(f"saved after stage {done}")
    record["training_seconds"] = round(time.monotonic() - start, 1)
    record["evaluation_text"] = {
        "bytes": len(evaluation_haystack.text),
        "sha256": evaluation_haystack.sha256,
    }
    record["evaluation"] = evaluate(trainer, sizes, prompts, begin + options.seconds_limit)
    record["wall_seconds"] = round(time.monotonic() - begin, 1)
    save(trainer, options.out, record)
    log(f"done after {record['wall_seconds']}s")


if __name__ == "__main__":
    main()
