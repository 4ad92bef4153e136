from __future__ import annotations

from isthmus.edge_agent.cost_profiles import open_profile
from isthmus.edge_agent.ledger import Ledger
from isthmus.edge_agent.policy.budgets import HOUR_S, Budget
from isthmus.edge_agent.radio import Radio, probe_charge


def test_probes_pay() -> None:
    ledger, radio = Ledger([Budget("bytes", 100_000, HOUR_S)]), Radio()
    charge = probe_charge(ledger, open_profile("wifi"), radio)
    assert charge(2300, 0.25) and not charge(2300, 0.25)
    assert ledger.totals.spent[::3] == (2300, 0), "and are no calls"


def test_a_probe_that_is_refused_leaves_the_radio_asleep() -> None:
    radio = Radio()
    charge = probe_charge(Ledger([Budget("bytes", 100, HOUR_S)]), open_profile("wifi"), radio)
    assert not charge(2300, 1.0) and radio.since_s() == float("inf")
