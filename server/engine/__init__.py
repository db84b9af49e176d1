"""What runs inside vLLM: recipes are checked before admission and fused in the workers. Nothing else imports vLLM.

API process     admission/endpoint.py       wires the plugin in and adds the private route `/mta/v1/`
                admission/door.py           lets through only the vLLM routes that the product uses, with a key
                admission/prepare.py        checks a recipe before vLLM admits the request that names it
                admission/names.py          gives recipes their engine ids, bounded in number
                admission/user_adapters.py  fetches and verifies users' own adapters; knows which ones workers hold
                admission/metrics.py        adapter gauges with a fixed set of labels
every worker    plugin.py                   replaces vLLM's adapter manager with ours
                fusing/manager.py           fuses recipes, and decides which ones stay
                fusing/slots.py             writes fused adapters into vLLM's slots
                fusing/kernels/             LoRA on CPU: each row its own adapter, in one compiled call a layer
                fusing/extension.py         the calls that the API process makes on the workers
                executor.py                 runs the worker in the engine core's process, on CPU
both            banks.py                    the banks this engine serves
before          command.py                  the command line and environment of the vLLM process
"""
