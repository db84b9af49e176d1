"""Parts are killed and paused under mixed load, and at the end everything that was promised is looked for.

faults.py   what befalls which part, and when it is over
load.py     people who ask and write, and what they were promised
asking.py   one generation, and how it ended
census.py   processes, memory, descriptors and keys
verdict.py  the claims, each with what was found
"""
