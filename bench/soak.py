"""Does memory stay flat? A run of many short epochs, resident memory printed as it goes.

    python bench/soak.py                     # 1,000 epochs of 4 pictures, a few minutes on one core
    python bench/soak.py --method score --epochs 200

After every tenth of the run: epoch, resident memory of the process in MB (10^6 bytes), mean reward. Last:
growth of the resident memory from a tenth of the run to its end, and that divided by the epochs between.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rlcm


def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def main():
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument("--epochs", type=int, default=1000)
    p.add_argument("--method", default="rlcm", choices=list(rlcm.METHODS))
    args = p.parse_args()
    rlcm.quiet()
    seen, save_metrics, tenth = [], rlcm.save_metrics, max(1, args.epochs // 10)

    def watched(rows, path):
        seen.append(resident_mb())
        if len(seen) % tenth == 0:
            reward = rows[-1]["reward_mean"]
            print(f"epoch {len(seen):5d}   {seen[-1]:8.1f} MB   reward {reward:.3f}", flush=True)
        save_metrics(rows, path)

    small = dict(model="tiny", method=args.method, steps=2, batch_size=4, micro_batch=4)
    changed = mock.patch.multiple(rlcm, save_metrics=watched, say=lambda line: None)
    with tempfile.TemporaryDirectory() as folder, changed:
        cfg = rlcm.configure(**small, epochs=args.epochs, save_every=tenth, out=f"{folder}/run")
        rlcm.train(cfg)
    grown = seen[-1] - seen[tenth - 1]
    each = 1000 * grown / max(1, args.epochs - tenth)
    print(
        f"resident memory grew by {grown:.1f} MB from epoch {tenth} to {args.epochs}, {each:.2f} kB an epoch"
    )


if __name__ == "__main__":
    main()
