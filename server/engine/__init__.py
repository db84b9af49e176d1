"""What runs inside vLLM: recipes are checked before admission and fused in the workers. Nothing else imports vLLM.

before          command.py    the command line and environment of the vLLM process, and how many slots it has
                __main__.py   imports vLLM, and becomes its server
every process   plugin.py     has vLLM's workers fuse recipes
                patches.py    every name of vLLM that is replaced or overridden, and why
API process     admission/    endpoint.py wires it; requests pass door.py, prepare.py and user_adapters.py
engine core     admission/    turns.py: whose turn it is when slots are short
every worker    fusing/       manager.py is the loop: a recipe comes in, rows are summed (ahead.py), a slot is written
on CPUs         cpu/          kernels, an executor in the core's process, and fixes of vLLM
"""
