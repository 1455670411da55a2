"""Programs that do harm at random, for as long as they are told to: kills, power loss, damages, full disks, signals.

    python -m tests.chaos.run --minutes 10 [FAMILY ...] --results docs/trust.json    # goes on where it was
    python docs/make_trust.py                                                        # docs/trust.md, from the results

A family is a row of table.py. tests/chaos/test_chaos.py runs a few trials of each in every `make test`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # commands.py, as the suite finds it
