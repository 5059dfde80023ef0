"""The adversary of secure aggregation, played: what it tries, why it fails, and which check it fails at.

`players.py` is an honest world in one process. `malicious_server.py` holds what a server does instead: it tells members
different things, pools what colluding members know, and strips masks with what it gets. `weakened.py` switches off one
check at a time. Each attack comes in two tests: against the protocol it fails; against the build without one check, by
the very same steps, it yields the update, or the partial sum, that it was after.

- `test_lists.py`: overlapping sets, a list for each client, repeated requests, thresholds (property A2)
- `test_partitions.py`: sums of groups instead of one sum, on sparse graphs
- `test_substitution.py`: other keys, members, models, sessions; replays; shrunken cohorts (property A4)
- `test_members.py`: wrong shares, wrong commitments, false complaints
- `test_leakage.py`: what the bytes beside the masked vector say (property A3), and where randomness is from (A6)
- `test_decoders.py`: mutated and random bytes at every decoder of `decoders.py`, and, in `fuzz.py`, a fuzzer
"""
