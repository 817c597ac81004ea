#!/bin/bash
# torch 2.13.0: a DataLoader that shuffles with a generator of its own, left by break at the last batch of an epoch.
# Guessed: all rows were seen, so the next epoch is ordered as after a loop that ran out (a count of steps often ends a loop so).
# Seen: another order. The sampler draws a second permutation after the last row, of which it takes nothing; a break leaves that
# draw out. accelerate 1.15.0's prepared loader reads one batch ahead and so has drawn it by then: it gives the other order.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 accelerate==1.15.0 numpy==2.4.6
venv/bin/python - <<'END'
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

def second_epoch(prepare, batches):
    loader = DataLoader(range(6), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(0))
    loader = prepare(loader)
    for count, batch in enumerate(loader, start=1):
        if count == batches:
            break
    return [int(row) for batch in loader for row in batch]

def plain(loader):
    return loader

prepared = Accelerator(cpu=True).prepare
whole = second_epoch(plain, None)
at_last = second_epoch(plain, 3)
print("second epoch after a whole first:", *whole, " after a break in batch 3 of 3:", *at_last)
print("with accelerate:", *second_epoch(prepared, None), "and", *second_epoch(prepared, 3))
assert whole != at_last and second_epoch(plain, 2) == at_last
assert second_epoch(prepared, None) == second_epoch(prepared, 3) == whole
END
