"""What `import keras_distill` costs beyond `import keras`, in new processes.

python examples/benchmarks/import_time.py [--smoke] [--rounds 15]
"""

from __future__ import annotations

import statistics
import subprocess
import sys

from measure import RESULTS, TRIALS, interleaved, parser, write

CASES = ("import keras", "import keras_distill")
BOUND = 0.3


def run(statement: str) -> float:
    """Seconds that a statement takes in a fresh interpreter."""
    code = (
        f"import time; start = time.perf_counter(); {statement}; "
        "print(time.perf_counter() - start)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return float(result.stdout.splitlines()[-1])


def main() -> None:
    """Measures and writes."""
    options = parser("What the import costs.", "import_time").parse_args()
    rounds = options.rounds or (1 if options.smoke else 15)
    warm_up = 0 if options.smoke else 1
    seconds: dict[str, list[float]] = {statement: [] for statement in CASES}

    def measured(statement: str) -> None:
        seconds[statement].append(run(statement))

    # The first round fills the disk cache and does not count.
    interleaved({s: lambda s=s: measured(s) for s in CASES}, rounds, warm_up)
    kept = [seconds[statement][warm_up:] for statement in CASES]
    median = {s: statistics.median(k) for s, k in zip(CASES, kept, strict=True)}
    extra = statistics.median(ours - base for base, ours in zip(*kept, strict=True))
    for statement, value in median.items():
        print(f"{statement:<24} {value:6.2f} s")
    print(f"{'more':<24} {extra:6.2f} s  to reach {BOUND}")
    result = {
        "setting": {"rounds": rounds, "backend": "tensorflow"},
        "median seconds": median,
        "more seconds": {"median": extra, "to reach": BOUND},
    }
    default = (TRIALS if options.smoke else RESULTS) / "import_time.json"
    write(options.out or default, "What `import keras_distill` costs", result)


if __name__ == "__main__":
    main()
