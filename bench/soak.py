"""Does memory stay flat? A run of many short epochs, resident memory printed as it goes.

    python bench/soak.py                  # 1,000 epochs of 4 pictures, a few minutes on one core

Last line: growth of the resident memory from a tenth of the run to its end, in MB and per epoch.
"""
import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rlcm


def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--epochs", type=int, default=1000)
    p.add_argument("--method", default="rlcm", choices=list(rlcm.METHODS))
    args = p.parse_args()
    seen, save_metrics = [], rlcm.save_metrics

    def watched(rows, path):
        seen.append(resident_mb())
        if len(seen) % (args.epochs // 10) == 0:
            print(f"epoch {len(seen):5d}   {seen[-1]:8.1f} MB   reward {rows[-1]['reward_mean']:.3f}", flush=True)
        save_metrics(rows, path)

    rlcm.save_metrics = watched
    with tempfile.TemporaryDirectory() as folder:
        rlcm.train(rlcm.Config(model="tiny", method=args.method, steps=2, epochs=args.epochs, batch_size=4, micro_batch=4, save_every=args.epochs // 10, out=f"{folder}/run"))
    tenth = args.epochs // 10
    print(f"resident memory grew by {seen[-1] - seen[tenth - 1]:.1f} MB from epoch {tenth} to {args.epochs}, {1000 * (seen[-1] - seen[tenth - 1]) / (args.epochs - tenth):.2f} kB an epoch")


if __name__ == "__main__":
    main()
