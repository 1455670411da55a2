"""Tables of `roots verify`: one per layout, and the verdict. The output also reads as Markdown."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from roots_dist.verify.proof import Proof


def table(proof: Proof) -> Table:
    made = Table("what", "largest difference", "bound", "", box=None, pad_edge=False)
    for row in proof.rows:
        verdict = "[green]✓[/]" if row.passed else f"[red]✗ {row.where}[/]"
        made.add_row(
            row.what, f"{row.largest:.1e}", f"{row.bound:.1e}".replace(".0e", "e") if row.bound else "0", verdict
        )
    return made


def show(proofs: Iterable[Proof]) -> bool:
    """Print each proof when it is ready, and at the end the first difference or that there is none. Returns whether all
    passed."""
    console = Console(highlight=False)
    failed: list[Proof] = []
    told: set[str] = set()
    number = 0
    for number, proof in enumerate(proofs, 1):  # noqa: B007 # read after the loop
        console.print(f"[bold]{proof.title}[/] against one process")
        for note in (note for note in proof.notes if note not in told):
            console.print(f"  ({note})")
        told |= {*proof.notes}
        console.print(table(proof))
        console.print()
        if not proof.passed:
            failed.append(proof)
    if not failed:
        console.print(f"[green]✓[/] {number} comparisons: this layout computes what one process computes")
        return True
    row = next(row for row in failed[0].rows if not row.passed)
    console.print(f"[red]✗[/] {len(failed)} of {number} comparisons failed; first in {failed[0].title}:")
    console.print(f"  {row.what}: {row.where} differs by {row.largest:.1e}, bound {row.bound:.0e}")
    return False
