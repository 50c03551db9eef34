"""`make bench`: the tables of the README. Run it on an idle machine; compare ratios, not times.

`bench_plan`, `bench_memory` (minutes) and `bench_schedule` (an hour) are run by their names.
"""

import torch

from tests.benchmarks import (
    bench_crf,
    bench_loading,
    bench_simulation,
    bench_thresholds,
    bench_tracking,
    bench_training,
    bench_walk,
)


def main() -> None:
    torch.set_num_threads(1)
    print("| what | plain | ours | ratio |\n|---|---:|---:|---:|")
    for row in bench_training.run():
        plain, ours = row["plain"], row["ours"]
        print(f"| {row['what']} | {plain:.1f} images/s | {ours:.1f} images/s | {row['ratio']:.1f}x |", flush=True)
        memory = f"| {row['what']}, kept for its gradients | {row['plain_kept']:.0f} MiB | {row['kept']:.0f} MiB"
        print(
            memory + (f", in four pieces {row['in_pieces']:.0f} MiB" if "in_pieces" in row else "") + " | |", flush=True
        )
    bench_loading.main([])
    bench_thresholds.main()
    bench_walk.main()
    bench_crf.main()
    bench_tracking.main()
    print("\nA day on 1,000 spot GPUs, simulated:", flush=True)
    bench_simulation.main()


if __name__ == "__main__":
    main()
