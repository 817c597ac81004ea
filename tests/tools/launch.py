"""torchrun whose Ctrl-C is the one line that rank 0 prints; run.sh starts several GPUs with it.

    python tests/tools/launch.py --standalone --nproc_per_node=2 forgetting.py --model M --data rows.jsonl

torchrun itself answers a signal with a traceback of its own and exit code 1.
"""

import logging
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.run import main

if __name__ == "__main__":
    logging.disable(logging.WARNING)  # here, not in the ranks: which process got which signal
    try:
        main()
    except SignalException as stop:
        sys.exit(128 + stop.sigval)
