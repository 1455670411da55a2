"""docs/mutants.md, made from the table of mutants: each bug in words, where it is planted, and the test that dies. And
those of docs/proof.md, by what hid them.

    python docs/make_mutants.py        tests/mutants/table.py --> docs/mutants.md
                                       tests/mutants/hidden.py --> docs/proof.md

tests/mutants/test_table.py fails while the pages do not say what the tables say.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from mutants.hidden import HIDDEN  # noqa: E402 # a folder of tests, which no installation has
from mutants.table import AREAS, MUTANTS  # noqa: E402

PAGE, PROOF = ROOT / "docs" / "mutants.md", ROOT / "docs" / "proof.md"
BEGIN, END = "<!-- hidden: docs/make_mutants.py -->\n", "<!-- end of hidden -->"
HEAD = """\
# Mutants

A proof that could not fail would say nothing. So {count} bugs, each of a kind that a person writes, are planted one
after another, and the suite must notice each: the test that is named beside it has to fail, by a comparison and not by
an error.

    make mutants                                   # all of them: a line for each, the living at the end
    python -m tests.mutants.run --only NAME ...    # some

A mutant is an edit of the source, in a copy of the repository. So **both sides** of every comparison run it, the layout
and the single process, as with a real bug. What only several ranks can get wrong is seen by comparing them with one
process, where the edit changes nothing; what both would get wrong alike is seen only by tests against something else:
plain autograd, torch's own optimizer, `transformers`, a formula of a paper. A sample of them dies in every `make test`,
which also checks that all of them can still be planted and that their tests exist.

## Mutants that nobody has thought of

The tables have bugs that somebody has thought of. A second program looks for the others: it changes a file wherever an
operator, a number, a condition, a keyword or a statement could be another, draws some of these places, and runs the
tests that concern the file until one fails.

    python -m tests.mutants.systematic --seed 42 --sample 160 \\
        --files parallel world learning/objectives learning/data learning/models/vocab_head \\
        runs/train/step runs/train/check_finite assembly/passes

What lives gets a test that kills it, or a line in
[`equivalent.txt`](../tests/mutants/equivalent.txt) that says why it changes nothing that could be seen. Drawn so far
from the 3,139 places of tensor and pipeline parallelism, sharding, random numbers, the optimizer, ZeRO's reference,
objectives, the order of data and the step:

| seed | drawn | change nothing | died when they were drawn | die now |
|---|---|---|---|---|
| 10 | 54 | 5 | 37 of 49 (76 %) | 48 of 48; one place is gone |
| 11, after what the first one led to | 20 | 3 | 16 of 17 (94 %) | 17 of 17 |
| 40, much code later | 160 | 11 | 132 of 149 (89 %) | 149 of 149 |
| 41, after what that one led to | 47 | 5 | 38 of 42 (90 %) | 42 of 42 |
| 42, with exact runs of all axes | 160 | 11 | 127 of 149 (85 %) | 149 of 149 |

So all of the 405 places drawn so far that change something die now, and of a fresh draw 85 to 90 % do. The tests that
the program runs for a file are a part of the suite: of the 43 places of the last three rows that lived at first,
thirteen died of tests that were there and that the lists did not name. Behind the others were a run whose scored
targets took the memory of all logits, an exact run that could lose the head's gradient in every layout alike, and
rules that nothing tested: which documents a pair begins in, what is gathered ahead under ZeRO-3, what learns beside
adapters, a soft cap in DPO's gradient, random draws that no run could repeat, one expert on a rank, sums of four
ranks in an order.

*Made by `docs/make_mutants.py` from [`tests/mutants`](../tests/mutants/table.py).*
"""


def page() -> str:
    parts = [HEAD.format(count=len(MUTANTS)).rstrip()]
    for area, mutants in AREAS.items():
        parts += ["", f"## {area}", "", "| mutant | bug | planted in | test that dies |", "|---|---|---|---|"]
        for mutant in mutants:
            files = ", ".join(f"`{file}`" for file in dict.fromkeys(edit.file for edit in mutant.edits))
            parts.append(f"| `{mutant.name}` | {mutant.bug} | {files} | `{mutant.test}` |")
    return "\n".join(parts) + "\n"


def proof_page() -> str:
    """docs/proof.md with its table made anew."""
    before, _, rest = PROOF.read_text(encoding="utf-8").partition(BEGIN)
    rows = ["| hidden, because | mutant, on both sides | test that dies |", "|---|---|---|"]
    for why, names in HIDDEN.items():
        for i, name in enumerate(names):
            rows.append(f"| {'' if i else why} | {MUTANTS[name].bug} | `{MUTANTS[name].test}` |")
    return before + BEGIN + "\n" + "\n".join(rows) + "\n\n" + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    PROOF.write_text(proof_page(), encoding="utf-8")
