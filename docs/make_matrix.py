"""Write the rows of docs/proof.md's table of measured differences: `roots verify --matrix`, one row for each layout and
dtype.

python docs/make_matrix.py configs/quickstart.yaml [parallel.cp=2]      # layouts that have these values only
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import groupby

from roots_dist.config.load import load
from roots_dist.config.schema import Config
from roots_dist.verify.proof import Proof
from roots_dist.verify.verify import MATRIX, Wanted, matrix_proofs

COLUMNS = ("loss", "gradient norm", "gradients", "weights", "exp_avg", "exp_avg_sq", "evaluation", "other metrics")


def title_of(proof: Proof) -> tuple[str, str]:
    """Layout and dtype."""
    layout, dtype, *_ = proof.title.split(", ")
    return layout, dtype


def row(proofs: list[Proof]) -> str:
    """Largest difference of the proofs of one layout in one dtype, with a word for those that failed."""
    found = {name: [d.largest for p in proofs for d in p.rows if d.what == name] for name in COLUMNS}
    layout, dtype = title_of(proofs[0])
    cells = [f"{max(values):.1e}".replace("0.0e+00", "0") if values else "–" for values in found.values()]
    wrong = "" if all(p.passed for p in proofs) else " failed"
    return f"| {short(layout)} | {dtype}{wrong} | {' | '.join(cells)} |"


def short(layout: str) -> str:
    """`TP1×PP2×DP1 1f1b ZeRO-0` without degrees of 1 and a stage of 0."""
    degrees, *words = layout.removesuffix(" ZeRO-0").split()
    return " ".join(["×".join(name for name in degrees.split("×") if name[2:] != "1"), *words]).strip()


def rows(config: Config, wanted: dict[str, str]) -> Iterator[str]:
    chosen = [values for values in MATRIX if all(str(values[key]) == value for key, value in wanted.items())]
    for values in chosen:
        if values["parallel.ep"] == 1 or config.model.experts is not None:
            for _, same in groupby(matrix_proofs(config, Wanted(), (values,)), key=title_of):
                yield row(list(same))


def main() -> None:
    path, *only = sys.argv[1:]
    for line in rows(load(path), dict(word.split("=") for word in only)):
        print(line, flush=True)


if __name__ == "__main__":
    main()
