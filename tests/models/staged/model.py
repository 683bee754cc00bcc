"""Four layers as `stages()`. Each row's order is [ranks, what, amount]; `ranks` has a bit for every rank that is meant.

What: 1 sleep for `amount` ms, 2 raise, 3 fill `amount` MiB of memory; 0 nothing. Anything else is refused as the caller's fault.
Settings: `row_mb`, memory that every rank fills for each row of a step; `room_mb`, address space that is left to a rank once it has loaded;
`dies` and `sleeps`, the rank that ends, or that never gets done, while it loads.
"""

import os
import resource
import time
from pathlib import Path

import torch

from tensorway.model import Inputs, InvalidInput, Model, ModelContext, Outputs

RANK = int(os.environ["RANK"])
WIDTH = 8
NUM_LAYERS = 4


def obey(what: int, amount: int) -> None:
    if what == 1:
        time.sleep(amount / 1000)
    elif what == 2:
        raise ValueError(f"order 2, for rank {RANK}")
    elif what == 3:
        torch.empty(amount << 20, dtype=torch.uint8).fill_(1)
    elif what:
        raise InvalidInput(f"there is no order {what}", field="inputs.order")


class Layer(torch.nn.Module):
    """Takes x and the orders, and returns x and the orders that are still to be obeyed; the last returns the output."""

    def __init__(self, row_mb: int, is_last: bool) -> None:
        super().__init__()
        self.up = torch.nn.Linear(WIDTH, 2 * WIDTH)
        self.down = torch.nn.Linear(2 * WIDTH, WIDTH)
        self.row_mb = row_mb
        self.is_last = is_last

    def forward(self, value: Inputs) -> Outputs:
        x, order = value["x"], value["order"]
        if not x.is_meta:
            order = self.obeyed(order)
            if self.row_mb:
                torch.empty(self.row_mb * len(x) << 20, dtype=torch.uint8).fill_(1)
        x = x + self.down(torch.relu(self.up(x)))
        return {"y": x} if self.is_last else {"x": x, "order": order}

    def obeyed(self, order: torch.Tensor) -> torch.Tensor:
        """The orders without this rank's, which have been carried out."""
        mine = (order[:, 0] >> RANK) & 1 == 1
        for _, what, amount in order[mine].tolist():
            obey(what, amount)
        return torch.where(mine.unsqueeze(1), torch.zeros_like(order), order)


class Staged(Model):
    def load(self, context: ModelContext) -> None:
        settings = context.settings
        self.layers = [Layer(int(settings.get("row_mb", 0)), index == NUM_LAYERS - 1) for index in range(NUM_LAYERS)]
        for index, layer in enumerate(self.layers):
            context.load_into(layer, "weights.safetensors", prefix=f"{index}.")
        if settings.get("dies") == RANK:
            print("about to die", flush=True)
            os.abort()
        if settings.get("sleeps") == RANK:
            print("about to sleep", flush=True)
            time.sleep(600)
        if "room_mb" in settings:
            taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (taken + (int(settings["room_mb"]) << 20), resource.RLIM_INFINITY))

    def stages(self) -> list[torch.nn.Module]:
        return list(self.layers)

    def example(self, rows: int) -> Inputs:
        return {"x": torch.ones(rows, WIDTH), "order": torch.zeros(rows, 3, dtype=torch.int64)}

    def forward(self, inputs: Inputs) -> Outputs:
        value = inputs
        for layer in self.layers:
            value = layer(value)
        return value
