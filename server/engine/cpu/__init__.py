"""What only CPUs need: LoRA in one compiled call a layer, and an engine core that shares few cores fairly.

operators.py    LoRA operators of which each row has its own adapter, tried out at start
rows.py         which rows of a step have which adapter, and what the kernels know of slots
native.py       compiles and loads the kernels (lora.cpp, rows.h)
manager.py      slots as the kernels read them, and sums as they make them
executor.py     runs the model in the engine core's process
forked_core.py  has the engine core forked, not started anew
mends.py        two faults of vLLM
"""
