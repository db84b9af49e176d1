"""Kill and pause parts under mixed load, and check all guarantees at the end.

faults.py   faults of parts, and when they are over
load.py     people who send requests and writes, and the acknowledgements they got
asking.py   one request and its end
census.py   processes, memory, descriptors and keys
verdict.py  the claims and their findings
"""
