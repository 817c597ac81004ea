"""torchrun whose Ctrl-C is the one line that rank 0 prints; run.sh starts several GPUs with it.

    python tests/tools/launch.py --standalone --nproc_per_node=2 forgetting.py --model M --data rows.jsonl

torchrun itself answers a signal with a traceback of its own and exit code 1.
"""

import logging
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from check_flags import stop_in_one_line  # noqa: E402

if __name__ == "__main__":
    signal.signal(signal.SIGINT, stop_in_one_line)  # until main, below, has handlers of its own
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.run import main

    logging.disable(logging.WARNING)  # here, not in the ranks: which process got which signal
    try:
        main()
    except SignalException as stop:
        sys.exit(128 + stop.sigval)
