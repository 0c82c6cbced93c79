"""A small model to train, and its data."""

import random

import numpy as np
import torch
from torch import nn


class Block(nn.Module):
    """A small model with the names of the field: attention projections, a feed-forward layer, a convolution."""

    def __init__(self, width=24, text=16):
        super().__init__()
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        self.attn1 = nn.ModuleDict({"to_q": nn.Linear(width, width, bias=False), "to_out": nn.Linear(width, width)})
        self.attn2 = nn.ModuleDict({"to_k": nn.Linear(text, width, bias=False)})
        self.ff = nn.Linear(width, width)

    def forward(self, x, text):
        x = self.conv_in(x).flatten(2).transpose(1, 2)
        mixed = torch.softmax(self.attn1["to_q"](x) @ self.attn2["to_k"](text).transpose(1, 2), -1)
        return self.ff(self.attn1["to_out"](x + mixed.mean(-1, keepdim=True) * x))


def made(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return Block().to(dtype)


def data(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 3, 4, 4), (2, 5, 16), (2, 16, 24))
    return [torch.randn(*shape, generator=generator, dtype=dtype) for shape in shapes]


def loss_of(model, noise=0.1):
    """A loss that draws from all three sources of random numbers."""
    x, text, y = data(next(model.parameters()).dtype)

    def loss(call):
        x_now = x + noise * torch.randn_like(x) + noise * float(np.random.rand()) + noise * random.random()
        return (model(x_now, text) - y).square().mean()

    return loss
