"""The vLLM plugin: it checks recipes before admission and fuses them in the workers. Only this package imports vLLM.

before start    command.py    command line, environment and number of slots of the vLLM process
                __main__.py   imports vLLM and runs its server
every process   plugin.py     makes vLLM's workers fuse recipes
                patches.py    every name of vLLM that is replaced or overridden, with the reason
                metrics.py    counts and durations of adapters, on the API process's `/metrics`
API process     admission/    endpoint.py wires it; requests pass access.py, prepare.py and user_adapters.py
engine core     admission/    fair_scheduler.py decides which requests wait when slots are short
every worker    fusing/       manager.py sums the rows of a recipe (prefetch.py) and writes a slot (slots.py)
on CPUs         cpu/          kernels (lora.py), and the start and the threads of the engine core (core.py)
"""
