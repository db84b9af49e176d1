"""What runs inside vLLM: recipes are checked before admission and fused in the workers. The only importer of vLLM.

API process     admission/endpoint.py       wires the plugin in and adds the private route `/mta/v1/`
                admission/door.py           lets through what the product uses of vLLM's routes, with a key
                admission/prepare.py        checks a recipe before vLLM admits the request that names it
                admission/names.py          gives recipes their engine ids, bounded in number
                admission/user_adapters.py  fetches and verifies users' own adapters, and says which workers hold
                admission/metrics.py        adapter gauges with a fixed set of labels
every worker    plugin.py                   puts our adapter manager in the place of vLLM's
                fusing/manager.py           fuses a recipe, and decides what stays
                fusing/slots.py             writes fused adapters into vLLM's slots
                fusing/adapted_rows.py      keeps LoRA on CPU to the rows that have an adapter
                fusing/extension.py         calls the API process makes on the workers
                executor.py                 runs the worker in the engine core's process, on CPU
both            banks.py                    the banks this engine serves
before          command.py                  the command line and environment of the vLLM process
"""
