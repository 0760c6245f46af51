"""How often the default policy errs: ``python -m benchmarks.rollout.simulate``.

Healthy rollouts must be rolled back in 1 % at most, and regressions of twice the margin in 99 % at
least; exit 1 otherwise. Ten thousand healthy ones take about ten minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

from moe_serve.rollout.policy import Policy
from moe_serve.rollout.simulation import play, scenarios, simulate, summarise
from moe_serve.rollout.workload import Scenario


def main() -> None:
    """Play, print one JSON line per scenario and policy, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--healthy", type=int, default=10_000)
    parser.add_argument("--others", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    policy = Policy()
    began = time.monotonic()
    wrong = []
    for name, scenario in scenarios(policy).items():
        number = options.healthy if scenario == Scenario() else options.others
        ours, fixed = simulate(policy, scenario, min(number, options.others), options.seed)
        more = range(options.seed + len(ours), options.seed + number)
        ours += [play(policy, scenario, seed) for seed in more]
        for summary in (summarise(name, "policy", ours), summarise(name, "thresholds", fixed)):
            print(json.dumps(summary.to_json()), flush=True)
        found = summarise(name, "policy", ours)
        harmful = not name.startswith("healthy")
        if (harmful and found.rolled_back < 0.99) or (not harmful and found.rolled_back > 0.01):
            wrong.append(name)
    print(json.dumps({"wrong": wrong, "seconds": round(time.monotonic() - began)}))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
