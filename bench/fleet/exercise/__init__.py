"""Exercise a fleet: kill, pause and replace its parts under load, and check all guarantees at the end.

parts.py      what an exercise needs of a fleet: `deploy.containers` has it for containers
machine.py    parts of one `mta up --replicas 2`
processes.py  parts that are processes of their own
crowds.py     people who send requests and writes, and the acknowledgements they got
asking.py     one request and how it ended
faults.py     faults of parts under that load, and when they are over
replacing.py  a fleet whose parts are replaced one after the other, without a failed request
census.py     processes, memory, descriptors and keys
claims.py     the claims and their findings
"""
