#!/bin/bash
# numpy 2.4.6: quantiles of floats among which one is infinite.
# Guessed: the quantile 1 is the largest value however the 1 is written; 0.5 of an odd count agrees with median.
# Seen: of 1 2 inf the quantile 1 is inf, and 1.0 is nan (with a warning); 0.5 of -inf 1 inf is nan, whose median is 1. A step
# to a neighbour is reckoned even where none is taken, inf times 0. method="lower" gives the values.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet numpy==2.4.6
venv/bin/python - <<'END'
import numpy as np

infinity = np.inf
np.seterr(invalid="ignore")
whole, decimal = np.quantile([1, 2, infinity], 1), np.quantile([1, 2, infinity], 1.0)
print("of 1 2 inf: quantile 1 is", whole, " quantile 1.0 is", decimal)
assert whole == infinity and np.isnan(decimal)
values = [-infinity, 1, infinity]
middle, lower = np.quantile(values, 0.5), np.quantile(values, 0.5, method="lower")
print("of -inf 1 inf: quantile 0.5 is", middle, " with method=lower", lower, " median", np.median(values))
assert np.isnan(middle) and lower == np.median(values) == 1
END
