"""`mta up`: starts the parts of one machine, keeps them running, and leaves nothing behind.

supervisor.py   the loop: start in order, restart what dies, stop in reverse
parts.py        what a part is: command, environment, how to tell that it is ready
guard.py        the small process between us and each part; it ends when we do, and takes the part with it
services.py     Valkey, the engines, the gateway and the worker as parts
router.py       the router in front of several engines
data_folder.py  the lock, the secret, the logs
status.py       what people see
"""
