"""The vLLM plugin: it checks recipes before admission and fuses them in the workers. Only this package imports vLLM.

before start    command.py    command line, environment and number of slots of the vLLM process
                __main__.py   imports vLLM and runs its server
every process   plugin.py     makes vLLM's workers fuse recipes
                patches.py    every name of vLLM that is replaced or overridden, with the reason
                metrics.py    counts and durations of adapters, on the API process's `/metrics`
API process     admission/    endpoint.py wires it; requests pass access.py, prepare.py and user_adapters.py
engine core     admission/    fair_scheduler.py decides which requests wait when slots are short
every worker    fusing/       manager.py gives each recipe of a step a slot (slots.py)
on CPUs         cpu/          rows are summed ahead (manager.py, prefetch.py) and copied into slots (slots.py); kernels
                              (lora.py), and the start and the threads of the engine core (core.py)
on GPUs         gpu/          rows lie on the device (slots.py) and are summed straight into a slot (kernel.py)
"""
