"""Train the bundled base model: a Llama of under 10 M parameters, on two CPU cores or one GPU.

    python recipes/tiny/train_lm.py --work WORK --tokens 30e6 --out WORK/model

Muon for matrices, AdamW for embeddings and norms, bf16 weights with float32 master weights, and a constant learning rate
with linear decay over the last quarter. A snapshot is written every ``--snapshot-tokens``; started again, the run resumes
from ``WORK/train_state.pt``.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

logger = logging.getLogger("tiny.train_lm")


def config(tokenizer, hidden_size: int, num_layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=round(hidden_size * 8 / 3 / 32) * 32,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def batches(tokens: np.ndarray, bos: int, batch_tokens: int, seq_len: int):
    """Rows of ``seq_len`` tokens, each starting with bos like the rows the model is used on."""
    body = seq_len - 1
    rows = batch_tokens // seq_len
    for start in range(0, len(tokens) - rows * body, rows * body):
        block = tokens[start : start + rows * body].reshape(rows, body).astype(np.int64)
        yield torch.from_numpy(np.concatenate([np.full((rows, 1), bos), block], axis=1))


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder written by corpus.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=float, default=30.2e6)
    parser.add_argument("--batch-tokens", type=int, default=16384)
    parser.add_argument("--micro-tokens", type=int, default=4096, help="tokens per backward pass")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--hidden-size", type=int, default=320)
    parser.add_argument("--num-layers", type=int, default=5)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--snapshot-tokens", type=float, default=5e6)
    parser.add_argument("--max-steps", type=int, default=None, help="stop early (to time a shape)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.work / "tokenizer")
    model = LlamaForCausalLM(config(tokenizer, args.hidden_size, args.num_layers)).to(device)
    # Forward and backward use bf16 weights (half the memory traffic); updates go to float32 master weights.
    master = {name: p.detach().clone().float().requires_grad_() for name, p in model.named_parameters()}
    model.to(torch.bfloat16)
    matrices = [p for name, p in master.items() if ".layers." in name and p.ndim == 2]
    others = [p for name, p in master.items() if not (".layers." in name and p.ndim == 2)]
    muon = torch.optim.Muon(matrices, lr=args.muon_lr, weight_decay=0.01, momentum=0.95)
    adam = torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    logger.info("%.2f M parameters", sum(p.numel() for p in model.parameters()) / 1e6)

    @torch.no_grad()
    def copy_to_model() -> None:
        for name, p in model.named_parameters():
            p.copy_(master[name])

    tokens = np.load(args.work / "tokens.npy", mmap_mode="r")
    held_out, tokens = tokens[:200_000], tokens[200_000:]
    total_steps = int(args.tokens // args.batch_tokens)
    state_file = args.work / "train_state.pt"
    first_step = 0
    if state_file.exists() and args.max_steps is None:
        state = torch.load(state_file, weights_only=True)
        for name, p in master.items():
            p.data.copy_(state["model"][name])
        copy_to_model()
        muon.load_state_dict(state["muon"])
        adam.load_state_dict(state["adam"])
        first_step = state["step"]
        logger.info("resumed at step %d", first_step)

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, :-1])
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    step_loss = torch.compile(loss_of)

    @torch.no_grad()
    def held_out_loss() -> float:
        model.eval()
        losses = [loss_of(ids.to(device)).item() for ids in batches(held_out, tokenizer.bos_token_id, 16384, 512)]
        model.train()
        return float(np.mean(losses))

    def save(folder: Path, step: int) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        record = {"step": step, "tokens": step * args.batch_tokens, "held_out_loss": held_out_loss()}
        (folder / "training.json").write_text(json.dumps(record, indent=1))
        logger.info("saved %s: %s", folder, record)

    snapshot_every = int(args.snapshot_tokens // args.batch_tokens)
    mark, seen = time.perf_counter(), 0
    stream = batches(tokens, tokenizer.bos_token_id, args.batch_tokens, args.seq_len)
    for step, ids in enumerate(stream):
        if step >= total_steps or (args.max_steps and step >= args.max_steps):
            break
        if step < first_step:
            continue
        warmup = min(1.0, (step + 1) / 50)
        decay = min(1.0, (total_steps - step) / (0.25 * total_steps))
        for optimizer, lr in ((muon, args.muon_lr), (adam, args.adam_lr)):
            for group in optimizer.param_groups:
                group["lr"] = lr * warmup * decay
        micro = ids.to(device).split(max(1, args.micro_tokens // args.seq_len))
        for part in micro:
            loss = step_loss(part)
            (loss / len(micro)).backward()
        for name, p in model.named_parameters():
            master[name].grad = p.grad.float()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        muon.step()
        adam.step()
        copy_to_model()
        model.zero_grad(set_to_none=False)
        seen += ids.numel()
        if step % 10 == 0:
            rate = seen / (time.perf_counter() - mark)
            mark, seen = time.perf_counter(), 0
            logger.info("step %d/%d loss %.3f %.0f tokens/s", step, total_steps, loss.item(), rate)
        if (step + 1) % snapshot_every == 0 and not args.max_steps:
            state = {
                "model": {name: p.detach() for name, p in master.items()},
                "muon": muon.state_dict(),
                "adam": adam.state_dict(),
            }
            torch.save(state | {"step": step + 1}, state_file)
            save(args.out.with_name(f"{args.out.name}-{(step + 1) * args.batch_tokens / 1e6:.0f}M"), step + 1)
    if not args.max_steps:
        save(args.out, total_steps)


if __name__ == "__main__":
    main()
