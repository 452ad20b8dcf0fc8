"""Train a small Transformer to look things up, with and without LIF gates on its attention.

Each sequence lists eight letters with a digit each, and then asks for the digit of one of them.
Both models start from the same weights and see the same sequences. They differ in one call:
`lif_attention` takes the place of `scaled_dot_product_attention`. On this task the gates change
next to nothing: both models learn it, one as soon as the other. Takes half a minute on two cores.

python scripts/examples/attention.py
"""

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ember_ext import lif_attention
from ember_ext.nn import LIFParameters

LETTERS, DIGITS, WIDTH, HEADS = 8, 8, 64, 4


class Block(nn.Module):
    """Causal attention and an MLP, each added to its input [B, T, WIDTH]."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.gate = LIFParameters(HEADS) if gated else None  # draws no random numbers
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, T, WIDTH]."""
        parts = self.qkv(self.norms[0](x)).chunk(3, 2)
        q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in parts)
        if self.gate is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            gates = (self.gate.threshold, self.gate.leak, self.gate.steepness)
            y = lif_attention(q, k, v, *gates, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.wide(self.norms[1](x))))


def sequences(rows: int) -> tuple[Tensor, Tensor]:
    """Tokens [B, 17], each with its place, and the digit [B] that is asked for."""
    letters = torch.rand(rows, LETTERS).argsort(1)
    digits = torch.randint(DIGITS, (rows, LETTERS))
    asked = torch.randint(LETTERS, (rows, 1))
    pairs = torch.stack((letters, LETTERS + digits), 2).flatten(1)
    return torch.cat((pairs, letters.gather(1, asked)), 1), digits.gather(1, asked)[:, 0]


parser = argparse.ArgumentParser(description="Compare attention with and without LIF gates.")
parser.add_argument("--updates", type=int, default=400, help="optimiser steps (default: 400)")
updates = parser.parse_args().updates
torch.set_num_threads(1)  # the model is too small for two
for name, gated in (("ungated", False), ("with LIF gates", True)):
    torch.manual_seed(0)
    embedding, head = nn.Embedding(LETTERS + DIGITS, WIDTH), nn.Linear(WIDTH, DIGITS)
    places = nn.Parameter(0.1 * torch.randn(2 * LETTERS + 1, WIDTH))
    model = nn.Sequential(Block(gated), Block(gated), head)
    trained = [*embedding.parameters(), places, *model.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    for update in range(updates + 1):
        tokens, answers = sequences(64)
        logits = model(embedding(tokens) + places)[:, -1]
        if update % 50 == 0:
            right = (logits.argmax(1) == answers).float().mean()
            print(f"{name:16} update {update:3}: {right:4.0%} of 64 new questions right")
        optimizer.zero_grad()
        F.cross_entropy(logits, answers).backward()
        optimizer.step()
    if gated:
        learnt = ", ".join(f"{value:.3f}" for value in model[1].gate.threshold.tolist())
        print(f"thresholds of the second layer's heads, 0 at the start: {learnt}")
