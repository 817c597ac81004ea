#!/bin/bash
# torchmetrics 1.9.0: BLEUScore and SacreBLEUScore with smooth=True, texts in which no n-gram of some order is found again.
# Guessed: smoothing, which is there for this case, gives a low score, as sacrebleu 2.6.0's add-k with 1 does (the same formula).
# Seen: 0, as without smoothing. Where every order has a match the libraries agree on the smoothed score, so that one word more
# of difference takes a text from 59 to 0 in one of them and to 41 in the other; short replies often score 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torchmetrics==1.9.0 sacrebleu==2.6.0 torch==2.13.0 numpy==2.4.6
venv/bin/python - <<'END'
import sacrebleu
from torchmetrics.text import BLEUScore, SacreBLEUScore

def scores(text, reference):
    found = [metric(smooth=True)([text], [[reference]]).item() * 100 for metric in (BLEUScore, SacreBLEUScore)]
    expected = sacrebleu.corpus_bleu([text], [[reference]], smooth_method="add-k", smooth_value=1).score
    print(f"{text!r}: torchmetrics {found[0]:.2f} and {found[1]:.2f}, sacrebleu {expected:.2f}")
    return found, expected

reference = "the cat sat on a mat today"
found, expected = scores("the cat sat on the mat today", reference)
assert expected > 59 and all(abs(score - expected) < 1e-3 for score in found)
found, expected = scores("the cat sat in the mat today", reference)
assert expected > 40 and found == [0, 0]
found, expected = scores("a cat sat here", "a cat sat there")
assert expected > 30 and found == [0, 0]
END
