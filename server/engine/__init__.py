"""What runs inside vLLM: recipes are checked before admission and fused in the workers. Nothing else imports vLLM.

API process     admission/endpoint.py       wires the plugin in and adds the private route `/mta/v1/`
                admission/door.py           lets through only the vLLM routes that the product uses, with a key
                admission/prepare.py        checks a recipe before vLLM admits the request that names it
                admission/names.py          gives recipes their engine ids, bounded in number
                admission/user_adapters.py  fetches and verifies users' own adapters; knows which ones workers hold
                admission/metrics.py        what `/metrics` says of adapters, with a fixed set of labels
every worker    plugin.py                   replaces vLLM's adapter manager with ours
                fusing/manager.py           fuses recipes, and decides which ones stay
                fusing/ahead.py             fuses in a thread of its own, from when a request arrives
                fusing/slots.py             writes fused adapters into vLLM's slots
                fusing/cells.py             where in a slot's tensors an adapter's numbers lie
                fusing/figures.py           durations and counts, where they happen
                fusing/kernels/             LoRA on CPU: each row its own adapter, in one compiled call a layer
                fusing/extension.py         the calls that the API process makes on the workers
                executor.py                 runs the worker in the engine core's process, on CPU
engine core     admission/turns.py          whose turn it is when slots are short
both            banks.py                    the banks this engine serves
before          command.py                  the command line and environment of the vLLM process
                sizing.py                   how many slots fit the memory
                __main__.py                 imports vLLM, and becomes its server
                forked_core.py              has the engine core forked, not started anew, on CPU
"""
